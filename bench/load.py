"""Load for an HTTP service: what came back, how soon, and what asking cost.

    python -m bench.load --url 'http://127.0.0.1:8000/v1/inspect?render=none' --image part.jpg \\
      --clients 8 --seconds 5 [--key TOKEN] [--rate 50] [--pid PID] [--json]

Closed loop: each client sends its next picture when it has its answer. With `--rate` pictures are
sent at planned moments (Poisson), whoever still waits, and latency counts from the plan, so that a
server that stalls can't hide it (coordinated omission).

Requests are made once, as bytes; of an answer only status and length are read. What that still
takes of the processor, which server and generator share, is part of the result.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path
from re import IGNORECASE, compile
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

from bench import processes

WARM_UP_S = 1.0
DRAIN_S = 60.0  # for what is under way when time is up
REFUSED_S = 0.1  # before the next try, where nobody listens
P99_OF = 100  # answers at least: 99 % of fewer are all but the highest
LOST = "lost"  # in place of a status where the connection broke off
CONTENT_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}
_LENGTH = compile(rb"\r\ncontent-length: *(\d+)", IGNORECASE)
_CHUNKED = compile(rb"\r\ntransfer-encoding: *chunked", IGNORECASE)
_LAST_CHUNK = b"\r\n0\r\n\r\n"  # no JSON ends like this

Address = tuple[str, int]
now = time.perf_counter


class Answer(NamedTuple):
    due: float  # when it was planned to be sent; in the closed loop, when it was
    sent: float
    done: float
    status: str


@dataclass(frozen=True)
class Usage:
    """Processor seconds so far, and memory."""

    load_s: float
    server_s: float | None
    server_mb: float | None


@dataclass(frozen=True)
class Result:
    images_per_s: float
    p50_ms: float | None  # None: nothing was answered
    p95_ms: float | None
    p99_ms: float | None  # None as well where it would be no more than the highest
    max_ms: float | None
    answered: int  # with 200: what the figures above are of
    errors: dict[str, int]  # everything else, by status
    seconds: float
    late_ms: float | None  # the generator's fault: 99 % were sent sooner after their moment
    load_cores: float  # processor time of the generator over wall time
    server_cores: float | None  # of the server and its descendants
    server_mb: float | None


class Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answer.cancel()  # nothing is asked yet

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._is_whole():
            status = self._received[9:12].decode()  # of HTTP/1.1 200 OK
            self._received.clear()
            self._answer.set_result(status)

    def _is_whole(self) -> bool:
        head = self._received.find(b"\r\n\r\n") + 4
        if head < 4:
            return False
        if length := _LENGTH.search(self._received, 0, head):
            return len(self._received) >= head + int(length[1])
        if _CHUNKED.search(self._received, 0, head):
            return self._received.endswith(_LAST_CHUNK)
        self._answer.set_exception(ValueError("an answer of unknown length"))
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_result(LOST)

    async def ask(self, request: bytes) -> str:
        """The status of the answer, or LOST."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    @property
    def closed(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()


class Client:
    """Asks one thing at a time, over a connection that is opened anew where it was closed."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Connection | None = None

    async def ask(self, request: bytes) -> str:
        """As `Connection.ask`; LOST as well where nobody listens."""
        if self._connection is None or self._connection.closed:
            loop = asyncio.get_running_loop()
            try:
                _, self._connection = await loop.create_connection(Connection, *self._address)
            except OSError:
                await asyncio.sleep(REFUSED_S)
                return LOST
        return await self._connection.ask(request)

    def close(self) -> None:
        if self._connection:
            self._connection.close()


def picture_request(
    url: str, data: bytes, content_type: str, field: str | None = None, key: str | None = None
) -> bytes:
    """The picture as the body, or as the only file of a multipart form; with an API key."""
    if field:
        head = f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="picture"\r\n'
        head += f"Content-Type: {content_type}\r\n\r\n"
        data = head.encode() + data + b"\r\n--b--\r\n"
        content_type = "multipart/form-data; boundary=b"
    parts = urlsplit(url)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    head = (
        f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(data)}\r\n"
    )
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    return head.encode() + b"\r\n" + data


async def closed_loop(
    address: Address, requests: Iterator[bytes], clients: int, end: float
) -> list[Answer]:
    """Each client asks anew as soon as it is answered, until `end` or until requests run out."""
    answers: list[Answer] = []

    async def ask_on() -> None:
        with closing(Client(address)) as client:
            while (sent := now()) < end and (request := next(requests, None)):
                status = await client.ask(request)
                answers.append(Answer(sent, sent, now(), status))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(ask_on())
    return answers


async def open_loop(
    address: Address, requests: Iterator[bytes], moments: np.ndarray
) -> list[Answer]:
    """A request at each moment, by a client who waits for nothing or, if all do, by a new one."""
    answers: list[Answer] = []
    idle: list[Client] = []

    async def one(due: float, request: bytes) -> None:
        client = idle.pop() if idle else Client(address)
        sent = now()
        status = await client.ask(request)
        # The loop's timers may be a millisecond early: then it was due when it was sent.
        answers.append(Answer(min(due, sent), sent, now(), status))
        idle.append(client)

    async with asyncio.TaskGroup() as tasks:
        for due in moments.tolist():
            if due > now():
                await asyncio.sleep(due - now())
            tasks.create_task(one(due, next(requests)))
    for client in idle:
        client.close()
    return answers


def arrivals(rate: float, begin: float, end: float) -> np.ndarray:
    """Moments of a Poisson process; the same for everybody who is asked."""
    count = int(rate * (end - begin) * 1.5) + 100
    moments = begin + np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))
    return np.asarray(moments[moments < end])


async def measure(
    address: Address,
    requests: Sequence[bytes],
    *,
    clients: int = 1,
    seconds: float,
    rate: float | None = None,
    warm_up_s: float = WARM_UP_S,
    pid: int | None = None,
) -> Result:
    """Load for `warm_up_s`, which isn't counted, and `seconds`."""
    first = now()
    begin, end = first + warm_up_s, first + warm_up_s + seconds
    work: Awaitable[list[Answer]]
    if rate:
        work = open_loop(address, cycle(requests), arrivals(rate, first, end))
    else:
        work = closed_loop(address, cycle(requests), clients, end)
    loading = asyncio.ensure_future(work)
    await asyncio.sleep(warm_up_s)
    before = usage(pid)
    await asyncio.sleep(end - now())
    after = usage(pid)
    answers = await asyncio.wait_for(loading, DRAIN_S)
    # An arrival counts in the window that it was planned for, a client's answer where it falls.
    counted = [a for a in answers if begin <= (a.due if rate else a.done) < end]
    return summary(counted, seconds, before, after)


def usage(pid: int | None) -> Usage:
    if pid is None:
        return Usage(time.process_time(), None, None)
    return Usage(time.process_time(), processes.cpu_s(pid), processes.resident_mb(pid))


def summary(answers: list[Answer], seconds: float, before: Usage, after: Usage) -> Result:
    good = [answer for answer in answers if answer.status == "200"]
    p50, p95, p99, highest = percentiles([answer.done - answer.due for answer in good])
    late = [answer.sent - answer.due for answer in answers]
    server_s = None
    if before.server_s is not None and after.server_s is not None:
        server_s = after.server_s - before.server_s
    return Result(
        images_per_s=len(good) / seconds,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99 if len(good) >= P99_OF else None,
        max_ms=highest,
        answered=len(good),
        errors=dict(Counter(answer.status for answer in answers if answer.status != "200")),
        seconds=seconds,
        late_ms=percentiles(late)[2],
        load_cores=(after.load_s - before.load_s) / seconds,
        server_cores=None if server_s is None else server_s / seconds,
        server_mb=after.server_mb,
    )


def percentiles(seconds: Sequence[float]) -> Sequence[float | None]:
    """50, 95, 99 and 100 %, in ms."""
    if not seconds:
        return (None,) * 4
    found: list[float] = (1e3 * np.percentile(seconds, (50, 95, 99, 100))).tolist()
    return found


def described(result: Result) -> str:
    figures = (("p50", result.p50_ms), ("p95", result.p95_ms), ("p99", result.p99_ms))
    latency = ", ".join(f"{name} {ms:.1f}" for name, ms in figures if ms is not None)
    return (
        f"{result.images_per_s:.1f} images/s; ms: {latency or 'none'}; errors: "
        f"{result.errors or 'none'}; the generator took {result.load_cores:.2f} of a core"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--url",
        nargs="+",
        required=True,
        help="http:// address that pictures are posted to; of one host, in turn",
    )
    add("--image", type=Path, nargs="+", required=True, help=f"{', '.join(CONTENT_TYPES)}; in turn")
    add("--field", help="send a multipart form with the picture in this field (default: raw body)")
    add("--key", metavar="TOKEN", help="API key to send")
    add("--clients", type=int, default=1, help="of the closed loop (default: 1)")
    add("--seconds", type=float, default=5.0, help="that count (default: 5)")
    add("--warm-up", type=float, default=WARM_UP_S, help=f"seconds before (default: {WARM_UP_S:g})")
    add("--rate", type=float, help="arrivals per second (default: closed loop)")
    add("--pid", type=int, help="of the server, whose processor time and memory are told as well")
    add("--json", action="store_true", help="print everything, as JSON")
    arguments = parser.parse_args(argv)
    for url in arguments.url:
        if urlsplit(url).scheme != "http":  # TLS would take more of the cores than all the rest
            parser.error(f"--url {url}: must begin with http://")
    for path in arguments.image:
        if path.suffix not in CONTENT_TYPES or not path.is_file():
            parser.error(f"--image {path}: must be a file that ends in {', '.join(CONTENT_TYPES)}")

    parts = urlsplit(arguments.url[0])
    requests = [
        picture_request(
            url, path.read_bytes(), CONTENT_TYPES[path.suffix], arguments.field, arguments.key
        )
        for path, url in product(arguments.image, arguments.url)
    ]
    result = uvloop.run(
        measure(
            (parts.hostname or "", parts.port or 80),
            requests,
            clients=arguments.clients,
            seconds=arguments.seconds,
            rate=arguments.rate,
            warm_up_s=arguments.warm_up,
            pid=arguments.pid,
        )
    )
    if arguments.json:
        print(json.dumps(asdict(result)))
    else:
        print(described(result))
    return 0 if result.answered or arguments.json else 1


if __name__ == "__main__":
    sys.exit(main())
