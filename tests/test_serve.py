"""The service as a process: start, load, departures, signals, restarts."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from conftest import (
    PostgreSql,
    SlowDisk,
    brightness_graph,
    encoded,
    golden_of,
    normal_pictures,
    picture,
    spotted,
)

from bench.processes import resident_mb
from service.bundle import Bundle
from training.rehearsal import free_port

ROOT = Path(__file__).parent.parent
Write = Callable[..., Bundle]


class Server:
    """`python -m service serve` on a free port."""

    def __init__(
        self, folder: Path, *, trusting: ssl.SSLContext | None = None, **environment: str
    ) -> None:
        self.port = free_port()
        self.log = folder / "log"
        self._folder = folder
        environment = {
            "database_url": f"sqlite:///{folder / 'state.sqlite'}",
            "shutdown_delay_s": "0",
            "receive_timeout_s": "10",
        } | environment
        self._environment = {f"SKRD4AD_{k.upper()}": v for k, v in environment.items()}
        self.process = self._started()
        scheme, verify = ("https", trusting) if trusting else ("http", True)
        url = f"{scheme}://127.0.0.1:{self.port}"
        self.client = httpx2.Client(base_url=url, timeout=30, verify=verify)

    def _started(self) -> "subprocess.Popen[bytes]":
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "service", "serve", "--port", str(self.port)]
                + ["--models", str(self._folder / "models"), "--device", "cpu", "--threads", "1"],
                env=os.environ | self._environment,
                cwd=ROOT,
                stderr=log,
            )

    def restart(self) -> None:
        """In order, under the same address."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0
        self.process = self._started()

    def wait_until_ready(self) -> "Server":
        wait_for(lambda: self._answers(), f"the service is not ready:\n{self.log.read_text()}")
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(httpx2.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    def inspect(self, data: bytes, **query: str) -> httpx2.Response:
        headers = {"Content-Type": "image/png"}
        return self.client.post("/v1/inspect", content=data, params=query, headers=headers)

    def half_sent(self, path: str = "/v1/inspect", header: str = "") -> socket.socket:
        """A connection whose request promises more bytes than it sends."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\n"
            f"Content-Length: 1000\r\n{header}\r\nhalf".encode()
        )
        return connection

    def metric(self, line: str) -> float:
        for found in self.client.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.split()[-1])
        return 0.0

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(number)
        return self.process.wait(30)


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    answer = b""
    while chunk := connection.recv(65536):
        answer += chunk
    return answer


def wait_for(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


@pytest.fixture
def serve(tmp_path: Path, write_bundle: Write) -> Iterator[Callable[..., Server]]:
    """Starts servers over one models folder and one database; stops what the test left."""
    write_bundle()
    servers: list[Server] = []

    def start(trusting: ssl.SSLContext | None = None, **environment: str) -> Server:
        servers.append(Server(tmp_path, trusting=trusting, **environment))
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


def run_serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_service("serve", *flags, **environment)


def run_service(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_many_clients_at_once_get_each_their_own_answer(serve: Callable[..., Server]) -> None:
    server = serve()
    brightness = [0.35 + 0.01 * i for i in range(40)]
    scores: dict[float, float] = {}

    def ask(value: float) -> None:
        answer = server.inspect(encoded(spotted(value)), render="none").json()
        scores[value] = answer["score"]

    threads = [threading.Thread(target=ask, args=(value,)) for value in brightness]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert scores == pytest.approx({v: round(255 * v) / 255 for v in brightness}, rel=1e-5)
    assert server.metric("skrd4ad_batch_size_sum") == len(brightness)
    assert server.metric("skrd4ad_batch_size_count") < len(brightness)  # some shared a batch


def test_a_full_queue_is_429_with_retry_after_and_health_still_answers(
    serve: Callable[..., Server],
) -> None:
    server = serve(max_queue="1")
    with server.half_sent():  # holds the only place from the door on
        in_progress = "skrd4ad_inspections_in_progress"
        wait_for(lambda: server.metric(in_progress) == 1, "the place was never taken")

        refused = server.inspect(encoded(picture()))

        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert "the limit is 1" in refused.json()["detail"]
        assert server.client.get("/livez").status_code == 200
        assert server.client.get("/readyz").status_code == 200

    wait_for(lambda: server.inspect(encoded(picture())).status_code == 200, "place not freed")


@pytest.mark.parametrize(
    ("limit", "header", "deadline"),
    [
        ("600", "X-Request-Timeout-Ms: 50\r\n", "0.05"),
        ("0.3", "X-Request-Timeout-Ms: 9999\r\n", "0.3"),
    ],
)
def test_a_caller_may_ask_for_an_earlier_deadline_and_not_for_a_later_one(
    serve: Callable[..., Server], limit: str, header: str, deadline: str
) -> None:
    server = serve(request_timeout_s=limit)

    with server.half_sent(header=header) as connection:
        answer = received(connection).decode()

    assert answer.startswith("HTTP/1.1 504")
    assert f"not answered within {deadline} s" in answer


def test_a_body_that_never_comes_is_504_at_the_deadline(serve: Callable[..., Server]) -> None:
    server = serve(request_timeout_s="0.3")

    with server.half_sent() as connection:
        answer = received(connection).decode()

    assert answer.startswith("HTTP/1.1 504")
    assert "not answered within 0.3 s" in answer
    assert server.inspect(encoded(picture())).status_code == 200


def test_a_client_that_leaves_in_the_middle_frees_its_place_and_is_no_error(
    serve: Callable[..., Server],
) -> None:
    server = serve(max_queue="1", request_timeout_s="600")

    for _ in range(3):
        server.half_sent().close()

    left = 'skrd4ad_requests_total{method="POST",route="/v1/inspect",status="499"}'
    wait_for(lambda: server.metric(left) >= 1, "no 499 counted")
    wait_for(lambda: server.inspect(encoded(picture())).status_code == 200, "place not freed")
    failed = 'skrd4ad_requests_total{method="POST",route="/v1/inspect",status="500"}'
    assert server.metric(failed) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_second_calibration_at_once_is_429(serve: Callable[..., Server]) -> None:
    server = serve()
    head = (
        "POST /v1/calibrate HTTP/1.1\r\nHost: t\r\nContent-Length: 1000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    )
    files = [("images", (name, data)) for name, data in normal_pictures(20)]

    def status() -> int:
        return server.client.post("/v1/calibrate?target_fpr=0.05", files=files).status_code

    def refused() -> bool:
        # Anew each time: where this one came second it has had its 429, and holds no place.
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head.encode())
            return status() == 429

    wait_for(refused, "two calibrations at once")
    wait_for(lambda: status() == 201, "the place was not freed")


def test_sigterm_answers_what_was_accepted_and_exits_cleanly(
    serve: Callable[..., Server],
) -> None:
    server = serve()
    data = encoded(spotted())
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST /v1/inspect HTTP/1.1\r\nHost: t\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    connection.sendall(head + data[:10])
    wait_for(lambda: server.client.get("/livez").status_code == 200, "not live")

    server.process.send_signal(signal.SIGTERM)
    connection.sendall(data[10:])
    answer = received(connection)
    connection.close()

    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["decision"] == "anomalous"
    assert server.process.wait(30) == 0


def test_sigterm_fails_readiness_first_and_goes_on_answering_for_the_delay(
    serve: Callable[..., Server],
) -> None:
    server = serve(shutdown_delay_s="5")
    kept = server.client
    assert server.inspect(encoded(picture())).headers.get("connection") is None

    server.process.send_signal(signal.SIGTERM)

    wait_for(lambda: kept.get("/readyz").status_code == 503, "still ready")
    assert "going" in kept.get("/readyz").json()["detail"]
    assert kept.get("/livez").status_code == 200
    answer = server.inspect(encoded(picture()))
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert server.process.wait(30) == 0


def test_a_second_signal_skips_the_delay(serve: Callable[..., Server]) -> None:
    server = serve(shutdown_delay_s="600")
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.client.get("/readyz").status_code == 503, "still ready")

    assert server.stop() == 0


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_what_is_broken_off_at_the_end_is_told_so(
    serve: Callable[..., Server], signals: tuple[int, ...]
) -> None:
    """By the time that is allowed, or by whoever presses Ctrl-C twice."""
    server = serve(shutdown_timeout_s="1" if len(signals) == 1 else "600")
    with server.half_sent() as stalled:
        wait_for(lambda: server.metric("skrd4ad_inspections_in_progress") == 1, "not begun")
        server.client.close()

        for number in signals:
            server.process.send_signal(number)
            time.sleep(1)  # so that the next one finds it closing

        answer = received(stalled)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"broke this request off" in answer and b"retry-after: 5" in answer
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_device_that_hangs_fails_liveness_and_holds_up_neither_the_end_nor_the_records(
    serve: Callable[..., Server], write_bundle: Write
) -> None:
    write_bundle(version=2, graph=brightness_graph(hanging=True))
    server = serve(hang_timeout_s="1", shutdown_timeout_s="1")
    id = server.inspect(encoded(picture())).json()["id"]
    headers = {"Content-Type": "image/png", "X-Request-Timeout-Ms": "100"}

    hung = server.client.post("/v1/inspect", content=encoded(picture(1.0)), headers=headers)

    assert hung.status_code == 504
    wait_for(lambda: server.client.get("/livez").status_code == 503, "alive")
    assert "has not come back for" in server.client.get("/livez").json()["detail"]
    assert server.client.get("/readyz").status_code == 503
    waits = server.client.post("/v1/inspect", content=encoded(picture()), headers=headers)
    assert waits.status_code == 504
    assert server.stop() == 1

    again = serve()
    assert again.client.get(f"/v1/inspections/{id}").status_code == 200


def test_a_device_that_hung_just_now_holds_the_end_up_no_longer_than_is_said(
    serve: Callable[..., Server], write_bundle: Write
) -> None:
    write_bundle(version=2, graph=brightness_graph(hanging=True))
    server = serve(shutdown_timeout_s="1")
    id = server.inspect(encoded(picture())).json()["id"]
    headers = {"Content-Type": "image/png", "X-Request-Timeout-Ms": "100"}
    server.client.post("/v1/inspect", content=encoded(picture(1.0)), headers=headers)

    assert server.stop() == 1

    assert serve().client.get(f"/v1/inspections/{id}").status_code == 200


def test_the_end_waits_for_nobody_who_reads_nothing(serve: Callable[..., Server]) -> None:
    server = serve(shutdown_timeout_s="600")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        for _ in range(50):  # far more than the buffers of both sides take
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: t\r\n\r\n")
            time.sleep(0.01)

        server.process.send_signal(signal.SIGINT)
        time.sleep(1)
        server.process.send_signal(signal.SIGINT)

        assert server.process.wait(30) == 0


def test_a_killed_service_comes_back_with_its_calibration(serve: Callable[..., Server]) -> None:
    server = serve()
    files = [("images", (name, data)) for name, data in normal_pictures(25)]
    made = server.client.post("/v1/calibrate?target_fpr=0.05", files=files).json()
    server.stop(signal.SIGKILL)

    answer = serve().inspect(encoded(picture())).json()

    assert answer["calibration"]["id"] == made["id"]
    assert answer["threshold"] == made["threshold"]


def recorded(server: Server) -> set[str]:
    lines = server.client.get("/v1/inspections/export?format=jsonl").text.splitlines()
    return {json.loads(line)["id"] for line in lines}


def test_a_stopped_service_has_recorded_every_inspection_that_it_answered(
    serve: Callable[..., Server],
) -> None:
    server, data, ids = serve(), encoded(picture()), set[str]()

    def ask() -> None:
        client = httpx2.Client(base_url=server.client.base_url, timeout=30)
        with client, contextlib.suppress(httpx2.TransportError):  # the server has stopped
            while True:
                ids.add(client.post("/v1/inspect?render=none", content=data).json()["id"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(ids) > 200, "no answers")
    assert server.stop() == 0
    for thread in threads:
        thread.join(60)

    assert recorded(serve()) == ids


def test_a_killed_service_has_recorded_all_but_the_last_second(
    serve: Callable[..., Server],
) -> None:
    server, data, answered = serve(), encoded(picture()), dict[str, float]()
    began = time.monotonic()
    while time.monotonic() < began + 3:
        id = server.inspect(data, render="none").json()["id"]
        answered[id] = time.monotonic()
    last = time.monotonic()
    server.stop(signal.SIGKILL)

    there = recorded(serve())

    assert {id for id, moment in answered.items() if moment < last - 1} <= there
    assert there <= answered.keys()


def test_the_log_has_one_line_for_a_request_with_its_id(serve: Callable[..., Server]) -> None:
    server = serve()

    request_id = server.inspect(encoded(picture())).json()["request_id"]

    # Written when the answer has gone out, which may be after it has come in here.
    wait_for(lambda: request_id in server.log.read_text(), "not logged")
    lines = [line for line in server.log.read_text().splitlines() if request_id in line]
    assert len(lines) == 1
    assert "POST /v1/inspect 200" in lines[0]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="CUDA may be had here")
def test_a_device_that_cannot_be_had_stops_the_start(tmp_path: Path, write_bundle: Write) -> None:
    write_bundle()

    result = run_serve(
        *("--models", str(tmp_path / "models"), "--device", "cuda"),
        SKRD4AD_DATABASE_URL=f"sqlite:///{tmp_path / 's.sqlite'}",
    )

    assert result.returncode == 1
    assert "error: device cuda was asked for" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_precision_that_cannot_be_had_stops_the_start(
    tmp_path: Path, write_bundle: Write
) -> None:
    write_bundle()

    result = run_serve(
        *("--models", str(tmp_path / "models"), "--device", "cpu", "--precision", "tf32"),
        SKRD4AD_DATABASE_URL=f"sqlite:///{tmp_path / 's.sqlite'}",
    )

    assert result.returncode == 1
    assert "error: precision tf32 was asked for, but device cpu offers float32" in result.stderr


def test_a_models_folder_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    result = run_serve(
        "--models",
        str(tmp_path / "nowhere"),
        SKRD4AD_DATABASE_URL=f"sqlite:///{tmp_path / 's.sqlite'}",
    )

    assert result.returncode == 1
    assert "nowhere: No such file" in result.stderr
    assert "Traceback" not in result.stderr


def test_listening_beyond_loopback_without_keys_or_permission_stops_the_start(
    tmp_path: Path,
) -> None:
    result = run_serve(
        "--host", "0.0.0.0", SKRD4AD_DATABASE_URL=f"sqlite:///{tmp_path / 's.sqlite'}"
    )

    assert result.returncode == 1
    assert "error: host 0.0.0.0 is reachable" in result.stderr
    assert "python -m service keys create" in result.stderr
    assert "SKRD4AD_ALLOW_ANONYMOUS=true" in result.stderr


def test_listening_beyond_loopback_needs_no_permission_once_there_is_a_key(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"line-3 inspect {'t' * 40}\n")

    server = serve(host="0.0.0.0", keys_file=str(keys))

    assert server.inspect(encoded(picture())).status_code == 401
    server.client.headers["X-API-Key"] = "t" * 40
    assert server.inspect(encoded(picture())).status_code == 200


def test_being_open_to_everybody_is_warned_of(serve: Callable[..., Server]) -> None:
    server = serve(host="0.0.0.0", allow_anonymous="true")

    assert server.inspect(encoded(picture())).status_code == 200
    assert "WARNING service.app there are no API keys" in server.log.read_text()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A folder with `certificate.pem` for 127.0.0.1 and its `key.pem`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate: apt-get install openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        + ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "certificate.pem")],
        check=True,
        capture_output=True,
    )
    return tmp_path


def test_https_is_served_with_a_certificate(
    serve: Callable[..., Server], certificate: Path
) -> None:
    file, key = str(certificate / "certificate.pem"), str(certificate / "key.pem")
    trusting = ssl.create_default_context(cafile=file)

    server = serve(tls_certificate=file, tls_key=key, trusting=trusting)

    assert server.inspect(encoded(picture())).status_code == 200
    assert f"listening on https://127.0.0.1:{server.port}" in server.log.read_text()
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"http://127.0.0.1:{server.port}/livez")


@pytest.mark.parametrize(
    ("certificate", "key", "told"),
    [
        ("nonsense.pem", "nonsense.pem", "can't be used together"),
        ("nowhere.pem", "nonsense.pem", "SKRD4AD_TLS_CERTIFICATE names no file"),
        ("nonsense.pem", "-----BEGIN PRIVATE KEY----- secret", "SKRD4AD_TLS_KEY names no file"),
    ],
)
def test_a_certificate_that_is_none_stops_the_start(
    tmp_path: Path, certificate: str, key: str, told: str
) -> None:
    (tmp_path / "nonsense.pem").write_text("nonsense")

    result = run_serve(
        *("--tls-certificate", str(tmp_path / certificate), "--tls-key", str(tmp_path / key)),
        SKRD4AD_DATABASE_URL=f"sqlite:///{tmp_path / 's.sqlite'}",
    )

    assert result.returncode == 1
    assert told in result.stderr and "secret" not in result.stderr


def test_an_encrypted_key_asks_nobody_for_its_password(certificate: Path, tmp_path: Path) -> None:
    encrypt = ["openssl", "rsa", "-aes256", "-passout", "pass:secret"]
    files = ["-in", str(certificate / "key.pem"), "-out", str(tmp_path / "encrypted.pem")]
    subprocess.run([*encrypt, *files], check=True, capture_output=True)

    result = run_serve(
        *("--tls-certificate", str(certificate / "certificate.pem")),
        *("--tls-key", str(tmp_path / "encrypted.pem")),
        SKRD4AD_DATABASE_URL=f"sqlite:///{tmp_path / 's.sqlite'}",
    )

    assert result.returncode == 1
    assert "the key must be that of the certificate, and not encrypted" in result.stderr


def test_a_port_that_is_taken_stops_the_start_with_its_number(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()

    result = run_serve(
        "--models",
        str(tmp_path / "models"),
        "--port",
        str(server.port),
        SKRD4AD_DATABASE_URL=f"sqlite:///{tmp_path / 'other.sqlite'}",
    )

    assert result.returncode == 1
    assert str(server.port) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_request_that_stalls_does_not_hold_the_end_up(serve: Callable[..., Server]) -> None:
    server = serve(shutdown_timeout_s="1")
    stalled = server.half_sent()

    assert server.stop() == 0  # within 30 s, where the request would be waited for

    stalled.close()


# Versions


def activate(server: Server, version: int) -> httpx2.Response:
    return server.client.post(f"/v1/models/part/versions/{version}/activate")


def version_of(answer: httpx2.Response) -> int:
    return int(answer.json()["model"]["version"])


def write_large_versions(write_bundle: Write) -> None:
    """Versions 2 and 3 with 16 MB of weights each."""
    for version, gain in ((2, 0.5), (3, 0.25)):
        graph = brightness_graph(fragile=True, zeros=4_000_000, gain=gain)
        golden = golden_of(0.4, gain * 102 / 255)
        write_bundle(version=version, graph=graph, golden=golden)


def settled_mb(server: Server) -> float:
    """Memory once what was replaced is freed, which an answer doesn't wait for."""
    found = []
    for _ in range(30):
        time.sleep(0.1)
        found.append(resident_mb(server.process.pid))
    return min(found)


def test_fifty_swaps_under_load_lose_no_request_and_leave_memory_flat(
    serve: Callable[..., Server], write_bundle: Write
) -> None:
    server = serve(request_timeout_s="60")
    write_large_versions(write_bundle)
    data, over = encoded(picture()), threading.Event()
    answers: list[tuple[int, int]] = []

    def ask_on() -> None:
        with httpx2.Client(base_url=server.client.base_url, timeout=60) as client:
            while not over.is_set():
                answer = client.post("/v1/inspect?render=none", content=data)
                answers.append((answer.status_code, version_of(answer)))

    clients = [threading.Thread(target=ask_on) for _ in range(4)]
    for client in clients:
        client.start()
    wait_for(lambda: bool(answers), "no answer")
    levels = []
    for number in range(60):
        assert version_of(activate(server, 2 + number % 2)) == 2 + number % 2
        if number in (9, 59):
            levels.append(settled_mb(server))
    over.set()
    for client in clients:
        client.join(60)

    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {1, 2, 3}
    assert levels[1] <= 1.05 * levels[0]
    assert server.metric("skrd4ad_model_load_seconds_count") == 61


def test_a_version_answers_what_it_began_after_it_was_replaced(
    serve: Callable[..., Server], write_bundle: Write
) -> None:
    server = serve()
    write_bundle(version=2)
    data = encoded(picture())
    head = f"POST /v1/inspect HTTP/1.1\r\nHost: t\r\nContent-Length: {len(data)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + data[:10])
        in_progress = "skrd4ad_inspections_in_progress"
        wait_for(lambda: server.metric(in_progress) == 1, "the place was never taken")

        activate(server, 2)
        assert version_of(server.inspect(data)) == 2
        connection.sendall(data[10:])
        answer = received(connection)

    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["model"]["version"] == 1


def test_replicas_agree_on_what_is_active_and_count_a_shadow_together(
    serve: Callable[..., Server], write_bundle: Write, postgresql: PostgreSql
) -> None:
    shared = {"database_url": postgresql.new_database(), "sync_interval_s": "0.1"}
    first, second = serve(**shared), serve(**shared)
    write_bundle(version=2, graph=brightness_graph(gain=0.5))
    write_bundle(version=3, graph=brightness_graph(gain=2))
    data = encoded(picture(0.2))

    activate(first, 2)
    wait_for(lambda: version_of(second.inspect(data)) == 2, "not taken up")
    activate(second, 3)
    wait_for(lambda: version_of(first.inspect(data)) == 3, "not taken up")
    assert first.client.post("/v1/models/part/roll-back").json()["model"]["version"] == 2
    wait_for(lambda: version_of(second.inspect(data)) == 2, "not rolled back")

    first.client.put("/v1/models/part/shadow?version=3")
    tried = "/v1/models/part"
    wait_for(lambda: second.client.get(tried).json()["shadow"] == 3, "no shadow taken up")
    for server in (first, second):
        server.inspect(data)
    changed = "normal_to_anomalous"
    for server in (first, second):
        shadow = f"{tried}/shadow"
        wait_for(lambda s=server, u=shadow: s.client.get(u).json()[changed] == 2, "not added up")


def test_a_replica_without_the_bundle_serves_on_and_says_so_until_it_has_it(
    serve: Callable[..., Server], write_bundle: Write, postgresql: PostgreSql, tmp_path: Path
) -> None:
    shared = {"database_url": postgresql.new_database(), "sync_interval_s": "0.1"}
    here = serve(**shared)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "models", elsewhere / "models")
    bundle = write_bundle(version=2)
    there = Server(elsewhere, **shared).wait_until_ready()
    try:
        activate(here, 2)
        model = "/v1/models/part"
        wait_for(lambda: bool(there.client.get(model).json()["problems"]), "no problem told")
        (problem,) = there.client.get(model).json()["problems"]
        assert "version 2" in problem and bundle.digest in problem
        assert version_of(there.inspect(encoded(picture()))) == 1
        assert there.client.get("/readyz").status_code == 200

        shutil.copytree(bundle.folder, elsewhere / "models" / "part" / "2")
        wait_for(lambda: version_of(there.inspect(encoded(picture()))) == 2, "not taken up")
        assert there.client.get(model).json()["problems"] == []
    finally:
        there.stop(signal.SIGKILL)


def test_sigterm_while_a_model_loads_still_answers_and_exits_cleanly(
    serve: Callable[..., Server], write_bundle: Write
) -> None:
    server = serve()
    slow = SlowDisk(write_bundle(version=2))
    statuses: list[int] = []
    waiting = threading.Thread(target=lambda: statuses.append(activate(server, 2).status_code))
    waiting.start()
    slow.wait_for_reader()

    server.process.send_signal(signal.SIGTERM)
    slow.let_go()
    waiting.join(60)

    assert statuses == [200]
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


LARGE_BUFFERS = """
from bench.processes import resident_mb
from service.__main__ import return_memory
import os
return_memory()
before = resident_mb(os.getpid())
for _ in range(2):
    large, small = [], []
    for _ in range(10):
        large.append(bytearray(20_000_000))
        small.append(bytearray(200_000))
    del large
print(resident_mb(os.getpid()) - before)
"""


def memory_kept(**environment: str) -> float:
    """MB that a process keeps of 200 MB that it freed."""
    output = subprocess.run(
        [sys.executable, "-c", LARGE_BUFFERS],
        cwd=ROOT,
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return float(output)


def test_the_memory_of_large_buffers_goes_back_although_small_ones_lie_between() -> None:
    assert memory_kept() < 20


def test_what_the_environment_says_of_memory_stays_in_force() -> None:
    heap = str(1 << 30)  # nothing is mapped, all of it comes from the heap
    kept = memory_kept(MALLOC_MMAP_THRESHOLD_=heap, MALLOC_TRIM_THRESHOLD_=heap)
    assert kept > 100
