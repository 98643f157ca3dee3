"""docker/nginx.conf in a real nginx: TLS, two services, and one after the other restarted."""

import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx2
import pytest
from conftest import encoded, listening, normal_pictures, picture
from test_replicas import replicas
from test_serve import Server, certificate, wait_for

from bench import pair
from training.rehearsal import free_port

__all__ = ["certificate", "replicas"]  # fixtures

pytestmark = pytest.mark.skipif(
    pair.NGINX is None, reason="no nginx is installed: apt-get install nginx"
)
PICTURE = encoded(picture())
Start = Callable[..., list[Server]]


class Proxy:
    """nginx with the shipped configuration, but for addresses and files."""

    def __init__(self, folder: Path, services: list[Server], certificate: Path) -> None:
        port = free_port()
        listen = f"listen 127.0.0.1:{port} ssl;"
        for name, file in (("certificate", "certificate.pem"), ("certificate_key", "key.pem")):
            listen += f" ssl_{name} {certificate / file};"
        self._process = pair.started(
            folder, pair.site(listen, [service.port for service in services])
        )
        self.errors = folder / "error.log"
        self.trusting = ssl.create_default_context(cafile=certificate / "certificate.pem")
        self.client = httpx2.Client(
            base_url=f"https://127.0.0.1:{port}", verify=self.trusting, timeout=60
        )

    def ready(self) -> bool:
        assert self._process.poll() is None, self.errors.read_text()
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def close(self) -> None:
        self.client.close()
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def start_proxy(tmp_path: Path, certificate: Path) -> Iterator[Callable[[list[Server]], Proxy]]:
    proxies: list[Proxy] = []

    def start(services: list[Server]) -> Proxy:
        folder = tmp_path / "nginx"
        folder.mkdir()
        proxies.append(Proxy(folder, services, certificate))
        wait_for(proxies[-1].ready, "nginx doesn't answer")
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


def test_a_proxy_adds_tls_and_passes_keys_and_large_bodies(
    replicas: Start, start_proxy: Callable[[list[Server]], Proxy], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"line-3 calibrate {'t' * 40}\n")
    services = replicas(f"sqlite:///{tmp_path / 's.sqlite'}", keys_file=str(keys))
    client = start_proxy(services).client

    assert client.get("/v1/models").status_code == 401
    client.headers["Authorization"] = f"Bearer {'t' * 40}"
    assert client.get("/v1/models").status_code == 200
    files = [("images", (name, data, "image/png")) for name, data in normal_pictures(40)]
    files += [("images", ("large.png", b"x" * 5_000_000, "image/png"))]
    made = client.post("/v1/calibrate", files=files, params={"target_fpr": 0.05})
    assert made.status_code == 201, made.text


class Stub:
    """In place of a service: answers every POST with a status, and counts them."""

    def __init__(self, status: int) -> None:
        self.status, self.posts, self.port = status, 0, 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.command == "POST"
        if asked:
            self.posts += 1
            handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(self.status if asked else 200)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@pytest.mark.parametrize("status", [500, 503])
def test_what_one_service_fails_to_inspect_the_other_inspects(
    status: int, start_proxy: Callable[..., Proxy]
) -> None:
    failing, healthy = Stub(status), Stub(200)
    with listening(failing.answer) as failing.port, listening(healthy.answer) as healthy.port:
        client = start_proxy([failing, healthy]).client
        inspections = [client.post("/v1/inspect", content=PICTURE).status_code for _ in range(20)]
        assert inspections == [200] * 20
        assert failing.posts > 0 and healthy.posts == 20

        before = failing.posts + healthy.posts
        calibrations = [client.post("/v1/calibrate", content=b"x").status_code for _ in range(20)]
        assert set(calibrations) == {200, status}
        assert failing.posts + healthy.posts == before + 20  # nothing is calibrated twice


def test_services_are_restarted_one_after_the_other_and_no_request_is_lost(
    replicas: Start, start_proxy: Callable[[list[Server]], Proxy], tmp_path: Path
) -> None:
    services = replicas(f"sqlite:///{tmp_path / 's.sqlite'}", shutdown_delay_s="0.5")
    proxy = start_proxy(services)
    done, statuses = threading.Event(), []

    def inspect() -> None:
        headers = {"Content-Type": "image/png"}
        with httpx2.Client(base_url=proxy.client.base_url, verify=proxy.trusting) as client:
            while not done.is_set():
                answer = client.post("/v1/inspect?render=none", content=PICTURE, headers=headers)
                statuses.append(answer.status_code)

    threads = [threading.Thread(target=inspect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for service in services:
        before = len(statuses)
        wait_for(lambda before=before: len(statuses) > before + 50, "no load")
        service.restart()
        service.wait_until_ready()
    before = len(statuses)
    wait_for(lambda: len(statuses) > before + 50, "no load")
    done.set()
    for thread in threads:
        thread.join()

    assert set(statuses) == {200}
    assert "no live upstreams" not in proxy.errors.read_text()
