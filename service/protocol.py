"""HTTP with limits that uvicorn's doesn't have: of a request's head in bytes, of requests that wait
for their turn on a connection, and of how long a client may take to send and to read.

Else who opens connections and says nothing keeps them, and who says too much, or reads nothing,
fills the memory. What is waited for is the client: a service that is busy itself lets nobody run
out of time.
"""

import asyncio
import logging
import uuid
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.schemas import Problem

log = logging.getLogger(__name__)
# It tells each request that is no HTTP without saying whose; `send_400_response` does.
logging.getLogger("uvicorn.error").addFilter(
    lambda record: record.msg != "Invalid HTTP request received."
)

MAX_HEAD = 64 * 2**10  # bytes of request line and headers, and of what comes behind a body
MAX_PIPELINED = 16  # requests that wait behind one that is being answered
CLOSE_S = 1.0  # for a connection that is closed to end in order
_LOOKS = 4  # in the time that a client has


class _Refused(Exception):
    """Ends the parsing of what won't be answered."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `timeout_s` is for a head to come in whole, for a body to go on, for its rest
    once it was answered, and for an answer to be read on."""

    timeout_s = 30.0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._timer: asyncio.TimerHandle | None = None
        self._awaiting_head = self._receiving = False
        self._head_bytes = 0
        self._unparsed = 0  # bytes that came since the parser last made something of them
        self._parsed = False
        self._heard = 0.0  # loop time of the last byte that counts
        self._unread = 0  # bytes of answers, when the client was last seen to read
        self._refusal: tuple[HTTPStatus, str] | None = None
        self._running: RequestResponseCycle | None = None  # uvicorn's `cycle` is the last that came

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._receiving and not self._answered:
            self._heard = self.loop.time()
        self._parsed = False
        super().data_received(data)
        self._unparsed = 0 if self._parsed else self._unparsed + len(data)
        if self.transport.is_closing():
            return
        if self._unparsed > MAX_HEAD:  # a header, or line ends, without end
            self._refuse_head()
            self.send_400_response("")
        elif self._rests and self.timeout_keep_alive_task is None:
            self._await_head()  # line ends between requests, which stop uvicorn's clock

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._parsed, self._head_bytes = True, 0
        if not self._awaiting_head:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        if self._awaiting_head:  # else it comes behind a body, where nobody looks for any
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = (
                HTTPStatus.TOO_MANY_REQUESTS,
                f"more than {MAX_PIPELINED} requests wait on this connection, which is the limit",
            )
            raise _Refused
        self._parsed, self._awaiting_head, self._receiving = True, False, True
        self._heard = self.loop.time()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._parsed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._parsed, self._receiving = True, False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # those that came are answered first
        if self._receiving:  # the answer didn't need the rest, which is read to be thrown away
            self._heard = self.loop.time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread, self._heard = self.transport.get_write_buffer_size(), self.loop.time()
        self._start_timer()

    def shutdown(self) -> None:
        """uvicorn goes; who has been answered everything is not waited for."""
        super().shutdown()
        if self._answered:
            self.loop.call_later(CLOSE_S, self.abort)

    def abort(self) -> None:
        """End the connection now; what is still written to it goes nowhere."""
        if self._running is not None:
            self._running.disconnected = True
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Also of what httptools can't parse."""
        status, detail = self._refusal or (HTTPStatus.BAD_REQUEST, msg)
        log.info("%s: %s", self._client, detail)
        if not self._answered:  # it would get in the way of an answer that is being made
            self.abort()
            return
        problem = Problem(
            type=f"urn:skrd4ad:problem:{status.phrase.lower().replace(' ', '-')}",
            title=status.phrase,
            status=status,
            detail=detail,
            request_id=uuid.uuid4().hex,
        )
        body = problem.model_dump_json().encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    @property
    def _answered(self) -> bool:
        """Whether nothing that was asked for is still to be answered."""
        return self.cycle is None or self.cycle.response_complete  # the last that came

    @property
    def _rests(self) -> bool:
        """Whether nothing is asked for, nor begun."""
        return self._answered and not self._awaiting_head and not self._receiving

    @property
    def _client_waits(self) -> bool:
        """For us, to use what it sent already, or to say that it may send."""
        waiting_for_100 = self.cycle is not None and self.cycle.waiting_for_100_continue
        return self.flow.read_paused or (waiting_for_100 and not self._answered)

    @property
    def _client(self) -> str:
        return f"{self.client[0]}:{self.client[1]}" if self.client else "a client"

    def _count_head(self, size: int) -> None:
        self._parsed = True
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD:
            self._refuse_head()
            raise _Refused

    def _refuse_head(self) -> None:
        self._refusal = (
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"request line and headers are too large: the limit is {MAX_HEAD} bytes",
        )

    def _await_head(self) -> None:
        self._awaiting_head = True
        self._heard = self.loop.time()
        self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.timeout_s / _LOOKS, self._look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Whether the client has let too much time pass."""
        self._timer = None
        doing = self._reads_on() or self._sends_on()
        if doing is None:
            return
        if self.loop.time() - self._heard < self.timeout_s:
            self._start_timer()
            return
        log.info("%s: %s within %g s", self._client, doing, self.timeout_s)
        self.abort()  # closing would wait for it to read what it was answered

    def _reads_on(self) -> str | None:
        """What is wrong with how it reads its answers; None: nothing."""
        if not self.flow.write_paused:
            return None
        unread = self.transport.get_write_buffer_size()
        if unread < self._unread:
            self._heard = self.loop.time()
        self._unread = unread
        return "nothing of an answer was read"

    def _sends_on(self) -> str | None:
        """The same of how it sends."""
        if not (self._awaiting_head or self._receiving):
            return None
        if self._client_waits:
            self._heard = self.loop.time()
        return f"{'a head' if self._awaiting_head else 'a body'} did not come"
