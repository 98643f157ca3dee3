"""The load generator: what it counts, what it leaves out, and whom it waits for."""

import asyncio
import email
import json
import math
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat

import numpy as np
import pytest
import uvloop

from bench import load, processes
from bench.load import LOST, Answer, Usage, closed_loop, open_loop, picture_request

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"
REQUEST = picture_request("http://127.0.0.1/inspect", b"pixels", "image/jpeg")
Answering = Callable[[asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def server(answer: Answering) -> Iterator[load.Address]:
    """Reads whole requests and lets `answer` write what it likes; on a thread of its own."""
    ready: Future[tuple[load.Address, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await answer(writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()  # the client has gone, or the test is over

    async def run() -> None:
        listening, over = await asyncio.start_server(serve, "127.0.0.1", 0), asyncio.Event()
        ready.set_result((listening.sockets[0].getsockname(), asyncio.get_running_loop(), over))
        async with listening:
            await over.wait()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(asyncio.run, run())
        address, loop, over = ready.result(30)
        try:
            yield address
        finally:
            loop.call_soon_threadsafe(over.set)
            done.result(30)


def in_turn(*answers: bytes) -> Answering:
    """One of these after the other, then the last for ever."""
    left = list(answers)

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return answer


def ask(address: load.Address, count: int, clients: int = 1) -> list[str]:
    """The statuses of `count` answers in the closed loop."""
    requests = repeat(REQUEST, count)
    return [a.status for a in uvloop.run(closed_loop(address, requests, clients, math.inf))]


def test_every_request_is_answered_and_no_more_are_under_way_than_there_are_clients():
    under_way, most = 0, 0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        while under_way < 3 and most < 3:  # until all three clients have asked
            await asyncio.sleep(0)
        under_way -= 1
        writer.write(OK)

    with server(answer) as address:
        assert ask(address, 30, clients=3) == ["200"] * 30
    assert most == 3


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\nconTENT-length: 3\r\n", b"\r\na", b"bc"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\n{}", b"\r\n0\r\n\r\n"],
    ],
)
def test_an_answer_may_come_in_pieces_and_in_chunks(pieces):
    async def answer(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)  # so that they don't travel together

    with server(answer) as address:
        assert ask(address, 2) == ["200", "200"]


def test_an_answer_without_a_length_ends_the_run():
    endless = in_turn(b"HTTP/1.1 200 OK\r\n\r\n")
    with server(endless) as address, pytest.raises(ExceptionGroup) as raised:
        ask(address, 1)
    assert raised.group_contains(ValueError, match="unknown length")


def test_a_connection_that_breaks_off_is_lost_and_replaced():
    answers = iter([OK, b"", OK])

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(said := next(answers))
        if not said:
            writer.transport.abort()

    with server(answer) as address:
        assert ask(address, 3) == ["200", LOST, "200"]


def test_where_nobody_listens_all_is_lost():
    with server(in_turn(OK)) as address:
        pass
    assert ask(address, 2) == [LOST, LOST]


def test_arrivals_do_not_wait_for_answers():
    """The server answers nobody before it has heard all: a closed loop would wait for ever."""
    count, heard = 12, 0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += 1
        while heard < count:
            await asyncio.sleep(0.001)
        writer.write(OK)

    async def load_it(address: load.Address) -> list[Answer]:
        moments = load.now() + np.linspace(0, 0.05, count)
        return await asyncio.wait_for(open_loop(address, repeat(REQUEST), moments), 30)

    with server(answer) as address:
        answers = uvloop.run(load_it(address))
    assert [a.status for a in answers] == ["200"] * count
    assert all(a.due <= a.sent <= a.done for a in answers)


def test_arrivals_come_at_the_rate_and_are_the_same_for_everybody():
    moments = load.arrivals(200.0, 10.0, 30.0)
    assert len(moments) == pytest.approx(4000, rel=0.05)
    gaps = np.diff(moments)
    assert (gaps > 0).all() and gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential
    assert moments[0] >= 10 and moments[-1] < 30
    np.testing.assert_array_equal(load.arrivals(200.0, 10.0, 30.0), moments)


def test_latency_counts_from_the_plan_and_of_good_answers_only():
    answers = [Answer(due=1.0, sent=1.5, done=2.0, status="200")] * 3
    answers += [Answer(1.0, 1.0, 9.0, "429"), Answer(1.0, 1.0, 9.0, LOST), Answer(1, 1, 9, "429")]
    found = load.summary(answers, 2.0, Usage(1.0, 5.0, 100.0), Usage(1.1, 8.0, 120.0))
    assert (found.p50_ms, found.max_ms, found.images_per_s) == (1000, 1000, 1.5)
    assert (found.answered, found.errors) == (3, {"429": 2, LOST: 1})
    assert found.load_cores == pytest.approx(0.05)
    assert (found.server_cores, found.server_mb) == (1.5, 120.0)


def test_where_nothing_is_answered_there_is_no_latency():
    found = load.summary([Answer(0, 0, 1, "500")], 1.0, Usage(0, None, None), Usage(0, None, None))
    assert (found.images_per_s, found.p50_ms, found.max_ms) == (0, None, None)
    assert found.server_cores is None
    assert "ms: none" in load.described(found) and "{'500': 1}" in load.described(found)


def test_a_p99_takes_a_hundred_answers():
    answers = [Answer(0, 0, n, "200") for n in range(100)]
    few, enough = (load.summary(a, 1, *[Usage(0, None, None)] * 2) for a in (answers[1:], answers))
    assert few.p99_ms is None and few.p95_ms and few.answered == 99
    assert enough.p95_ms < enough.p99_ms < enough.max_ms


def test_percentiles_are_in_milliseconds():
    assert load.percentiles([i / 1e3 for i in range(101)]) == pytest.approx([50, 95, 99, 100])


def test_a_request_is_the_picture_itself_or_a_form_with_it():
    url = "http://127.0.0.1:8123/v1/inspect?render=none"
    head, _, body = picture_request(url, b"\xff\xd8\r\n\r\nx", "image/jpeg").partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/inspect?render=none HTTP/1.1\r\nHost: 127.0.0.1:8123\r\n")
    assert b"Content-Length: 7" in head and body == b"\xff\xd8\r\n\r\nx"

    _, _, form = picture_request(url, b"pixels", "image/jpeg", "images").partition(b"\r\n")
    assert form.endswith(b"\r\n--b--\r\n")
    message = email.message_from_bytes(form)
    (part,) = message.get_payload()
    assert part.get_param("name", header="content-disposition") == "images"
    assert part.get_payload(decode=True).strip() == b"pixels"
    assert int(message["content-length"]) == len(form.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("rate", [[], ["--rate", "100"]])
def test_the_command_tells_everything_as_json(capsys, tmp_path, rate):
    picture = tmp_path / "part.jpg"
    picture.write_bytes(b"pixels")
    with server(in_turn(OK, BUSY, OK)) as (host, port):
        flags = ["--url", f"http://{host}:{port}/a", f"http://{host}:{port}/b", "--json"]
        flags += ["--image", str(picture), "--pid", str(os.getpid()), "--warm-up", "0"]
        assert load.main([*flags, "--seconds", "0.3", "--clients", "2", *rate]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] == round(found["images_per_s"] * 0.3) > 0
    assert found["errors"] == {"429": 1}
    assert found["p50_ms"] <= found["p95_ms"] <= found["max_ms"]
    assert found["server_mb"] > 1 and found["server_cores"] >= 0 and found["load_cores"] > 0


def test_a_process_is_measured_with_its_descendants():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    while len(family := processes.tree(parent.pid)) < 2:
        assert parent.poll() is None
    assert family[0] == parent.pid
    own = processes.tree(os.getpid())
    assert set(family) < set(own)
    assert processes.resident_mb(os.getpid()) > processes.resident_mb(parent.pid) > 0
    parent.communicate(b"\n")
    assert processes.tree(parent.pid) == [parent.pid]
    assert processes.cpu_s(parent.pid) == processes.resident_mb(parent.pid) == 0


def test_a_key_is_sent_with_the_picture():
    request = picture_request("http://127.0.0.1/inspect", b"pixels", "image/jpeg", key="sk_1")
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"\r\nAuthorization: Bearer sk_1" in head and body == b"pixels"


@pytest.mark.parametrize(
    ("url", "image", "told"),
    [
        ("https://127.0.0.1/v1/inspect", "part.jpg", "--url https://127.0.0.1/v1/inspect: must"),
        ("http://127.0.0.1/v1/inspect", "part.gif", "part.gif: must be a file that ends in .jpg"),
        ("http://127.0.0.1/v1/inspect", "none.jpg", "none.jpg: must be a file that ends in .jpg"),
    ],
)
def test_what_can_not_be_sent_is_refused(url, image, told, tmp_path, capsys):
    for name in ("part.jpg", "part.gif"):
        (tmp_path / name).write_bytes(b"pixels")
    with pytest.raises(SystemExit):
        load.main(["--url", url, "--image", str(tmp_path / image)])
    assert told in capsys.readouterr().err


def test_a_run_that_nobody_answers_fails(tmp_path, capsys):
    (tmp_path / "part.jpg").write_bytes(b"pixels")
    with server(in_turn(BUSY)) as (host, port, *_):
        words = ["--url", f"http://{host}:{port}/", "--image", str(tmp_path / "part.jpg")]
        words += ["--seconds", "0.2", "--warm-up", "0"]
        assert load.main(words) == 1
    assert "errors: {'429': " in capsys.readouterr().out
