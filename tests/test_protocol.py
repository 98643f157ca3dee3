"""What a client sends, or doesn't: limits of its head, and of how long it may take."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import bundle_files, encoded, picture
from test_serve import Server, received, wait_for

from bench.processes import resident_mb
from service.protocol import MAX_HEAD

PICTURE = encoded(picture())
HEAD = (
    "POST /v1/inspect?render=none HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\n"
    f"Content-Length: {len(PICTURE)}\r\n\r\n"
).encode()
LIVE = b"GET /livez HTTP/1.1\r\nHost: test\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("protocol")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Waits for clients two seconds."""
    for name, data in bundle_files().items():
        path = folder / "models" / "part" / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    server = Server(folder, receive_timeout_s="2").wait_until_ready()
    yield server
    server.stop()


@pytest.fixture
def connection(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        yield connection


def drip(connection: socket.socket, data: bytes) -> bytes:
    """Sends `data` again and again, bit by bit, until the service has enough; what it answered."""
    connection.settimeout(0.2)
    answer, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            connection.sendall(data)
            chunk = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return answer
        if not chunk:
            return answer
        answer += chunk
    pytest.fail("the service kept the connection")


def answers(connection: socket.socket, expected: bytes) -> None:
    """Receives until there is an answer that begins so, after what is left of the one before."""
    received = b""
    while expected not in received:
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk


def problem(answer: bytes) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return json.loads(body)


def test_who_says_nothing_is_disconnected(connection: socket.socket) -> None:
    assert received(connection) == b""


@pytest.mark.parametrize("data", [b"\r\n", b"x", b"X-Slow: 1\r\n"])
def test_who_never_ends_a_head_is_disconnected(connection: socket.socket, data: bytes) -> None:
    connection.sendall(b"" if data == b"\r\n" else b"GET /livez HTTP/1.1\r\nHost: t")

    drip(connection, data)


@pytest.mark.parametrize(
    "path", ["/v1/inspect", "/v1/calibrate", f"/v1/inspections/ins_{'0' * 28}/feedback"]
)
def test_a_body_that_stops_ends_the_connection(server: Server, path: str) -> None:
    with server.half_sent(path) as connection:
        received(connection)

    wait_for(lambda: server.metric("skrd4ad_inspections_in_progress") == 0, "a place is held")


def test_a_body_that_comes_slowly_and_steadily_is_taken(connection: socket.socket) -> None:
    connection.sendall(HEAD)
    step = len(PICTURE) // 5 + 1

    for start in range(0, len(PICTURE), step):
        connection.sendall(PICTURE[start : start + step])
        time.sleep(0.8)  # in all more than may pass without a byte

    answers(connection, b"HTTP/1.1 200")


def test_the_rest_of_what_was_answered_must_come_to_an_end(connection: socket.socket) -> None:
    connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000000\r\n\r\n")

    assert drip(connection, b"x" * 100).startswith(b"HTTP/1.1 404")


def test_an_answer_that_needs_no_body_leaves_the_connection_to_the_next_request(
    connection: socket.socket,
) -> None:
    body = b"x" * 500_000
    head = f"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    answers(connection, b"HTTP/1.1 404")

    connection.sendall(LIVE)

    answers(connection, b"HTTP/1.1 200")


def test_a_connection_rests_between_requests(connection: socket.socket) -> None:
    for _ in range(2):
        connection.sendall(LIVE)
        answers(connection, b"HTTP/1.1 200")
        time.sleep(3)  # more than may pass within a request


def test_line_ends_between_requests_are_no_rest(connection: socket.socket) -> None:
    connection.sendall(LIVE)
    answers(connection, b"HTTP/1.1 200")

    drip(connection, b"\r\n")


def test_requests_that_come_at_once_are_each_answered(connection: socket.socket) -> None:
    connection.sendall((HEAD + PICTURE) * 3 + LIVE)

    answers = b""
    while answers.count(b"HTTP/1.1 200") < 4:
        chunk = connection.recv(65536)
        assert chunk, answers
        answers += chunk


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: t\r\nX-Large: " + b"x" * (MAX_HEAD + 1) + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: t\r\n" + b"X-Many: 0123456789\r\n" * 4000 + b"\r\n",
        b"GET /livez?" + b"x" * (MAX_HEAD + 1) + b" HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: t\r\nX-Endless: " + b"x" * 1_000_000,
    ],
    ids=["one header", "many headers", "query", "no end"],
)
def test_a_head_that_is_too_large_is_431(connection: socket.socket, head: bytes) -> None:
    try:
        connection.sendall(head)
        answer = received(connection)
    except ConnectionError:  # it was refused while it was sent
        return

    assert answer.startswith(b"HTTP/1.1 431")
    assert problem(answer)["detail"].endswith(f"the limit is {MAX_HEAD} bytes")


def test_a_head_below_the_limit_is_taken(connection: socket.socket) -> None:
    value = b"x" * (MAX_HEAD - 100)
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: t\r\nX-Large: " + value + b"\r\n\r\n")

    answers(connection, b"HTTP/1.1 200")


def test_a_large_head_after_a_body_is_refused_as_well(connection: socket.socket) -> None:
    connection.sendall(HEAD + PICTURE)
    answers(connection, b"HTTP/1.1 200")
    connection.sendall(b"GET /livez HTTP/1.1\r\nX-Large: " + b"x" * MAX_HEAD + b"\r\n\r\n")

    assert b"HTTP/1.1 431" in received(connection)


@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_no_http_is_400(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)

    answer = received(connection)

    assert answer.startswith(b"HTTP/1.1 400")
    assert problem(answer)["status"] == 400


@pytest.mark.parametrize("data", [b"a: b\r\n", b"x" * 1000], ids=["many", "one without end"])
def test_what_comes_behind_a_body_is_limited_as_well(
    server: Server, connection: socket.socket, data: bytes
) -> None:
    settled = resident_mb(server.process.pid)
    connection.sendall(
        b"POST /nowhere HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1\r\nx\r\n0\r\n" + (b"" if data.endswith(b"\n") else b"a: ")
    )

    with pytest.raises(ConnectionError):
        for _ in range(200):
            connection.sendall(data * 100_000 if len(data) < 100 else data * 1000)

    assert resident_mb(server.process.pid) < settled + 50


def test_what_comes_behind_a_body_is_left_out(connection: socket.socket) -> None:
    head = HEAD.split(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%s\r\n0\r\nX-Checksum: 1\r\n\r\n" % (len(PICTURE), PICTURE)

    connection.sendall(head + body)

    answers(connection, b"HTTP/1.1 200")


def test_requests_that_wait_for_their_turn_are_limited(connection: socket.socket) -> None:
    connection.sendall(LIVE * 5000)

    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    assert received.count(b"HTTP/1.1 200") < 5000


def test_who_reads_no_answers_is_disconnected(server: Server) -> None:
    settled = resident_mb(server.process.pid)
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: t\r\n\r\n"
    with socket.socket() as connection, contextlib.suppress(ConnectionError, TimeoutError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.port))
        for _ in range(200):
            connection.sendall(ask)
            time.sleep(0.02)

    wait_for(lambda: "nothing of an answer was read" in server.log.read_text(), "kept")
    assert resident_mb(server.process.pid) < settled + 50


def test_who_reads_an_answer_slowly_gets_all_of_it(server: Server) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(LIVE.replace(b"/livez", b"/openapi.json"))
        received = b""
        while not received.endswith(b"}}}}") and b'"Problem"' not in received[-2000:]:
            chunk = connection.recv(4096)
            assert chunk, "broken off"
            received += chunk
            time.sleep(0.05)


def test_a_request_and_a_part_of_the_next_are_no_large_head(connection: socket.socket) -> None:
    body = b"x" * 100_000
    head = f"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n"

    connection.sendall(head.encode() + body + LIVE[:10])
    answers(connection, b"HTTP/1.1 404")
    connection.sendall(LIVE[10:])

    answers(connection, b"HTTP/1.1 200")


def test_the_service_goes_on_after_all_that(server: Server) -> None:
    assert server.inspect(PICTURE).status_code == 200
    log = server.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 300 :][:6000]
