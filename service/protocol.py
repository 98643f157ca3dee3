"""HTTP with limits that uvicorn's doesn't have: of a request's head in bytes, of how long a client
may take to send it, and of how long its body may stand still.

Else who opens connections and says nothing keeps them, and who says too much fills the memory. What
is waited for is the client: a service that is busy itself lets nobody run out of time.
"""

import asyncio
import logging
import uuid
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.schemas import Problem

log = logging.getLogger(__name__)

MAX_HEAD = 64 * 2**10  # bytes of request line and headers


class _Refused(Exception):
    """Ends the parsing of what won't be answered."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `timeout_s` is for a head to come in whole, for a body to go on, and for its
    rest once it was answered."""

    timeout_s = 30.0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._timer: asyncio.TimerHandle | None = None
        self._awaiting_head = self._receiving = False
        self._head_bytes = 0
        self._heard = 0.0  # loop time of the last byte that counts
        self._refusal: tuple[HTTPStatus, str] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._receiving and not self._answered:
            self._heard = self.loop.time()
        awaited_head = self._awaiting_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._awaiting_head:
            if awaited_head:  # else a body's end is in it, and the rest is counted when it is whole
                self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse_head()
                self.send_400_response("")
        elif not self._receiving and self._answered and self.timeout_keep_alive_task is None:
            self._await_head()  # line ends between requests, which stop uvicorn's clock

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._awaiting_head:
            self._await_head()

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._awaiting_head = False
        if head > MAX_HEAD:
            self._refuse_head()
            raise _Refused
        self._receiving = True
        self._heard = self.loop.time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving = False
        if not self._awaiting_head:
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._receiving:  # the answer didn't need the rest, which is read to be thrown away
            self._heard = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Also of what httptools can't parse."""
        status, detail = self._refusal or (HTTPStatus.BAD_REQUEST, msg)
        log.info("%s: %s", self._client, detail)
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
        return self.cycle is None or self.cycle.response_complete

    @property
    def _client_waits(self) -> bool:
        """For us, to use what it sent already, or to say that it may send."""
        waiting_for_100 = self.cycle is not None and self.cycle.waiting_for_100_continue
        return self.flow.read_paused or (waiting_for_100 and not self._answered)

    @property
    def _client(self) -> str:
        return f"{self.client[0]}:{self.client[1]}" if self.client else "a client"

    def _refuse_head(self) -> None:
        self._refusal = (
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"request line and headers are too large: the limit is {MAX_HEAD} bytes",
        )

    def _await_head(self) -> None:
        self._awaiting_head, self._head_bytes = True, 0
        self._heard = self.loop.time()
        self._start_timer(self.timeout_s)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Whether the client has let too much time pass."""
        self._timer = None
        if not (self._awaiting_head or self._receiving) or self.transport.is_closing():
            return
        if self._receiving and self._client_waits:
            self._heard = self.loop.time()
        left_s = self._heard + self.timeout_s - self.loop.time()
        if left_s > 0:
            self._start_timer(left_s)
            return
        what = "a request's head" if self._awaiting_head else "a body"
        log.info("%s: %s did not come within %g s", self._client, what, self.timeout_s)
        self.transport.abort()  # closing would wait for it to read what it was answered
