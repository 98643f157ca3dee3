"""The image and docker-compose.yml for real, with the shipped `demo` model.

    build -> up -> healthy -> inspect -> scraped by Prometheus -> calibrate -> kill -> still there

Grafana isn't started: its dashboard's queries are put to Prometheus instead.
"""

import base64
import json
import os
import re
import socket
import subprocess
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
import pytest
from PIL import Image

from service.metrics import Metrics

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "inspection.json"
IMAGE = "skrd4ad:test"  # stays, so that the next run finds its layers
OVERRIDE = f"services: {{inspect: {{image: '{IMAGE}'}}}}"
DEMO = {"model": "demo"}

T = TypeVar("T")


@dataclass(frozen=True)
class Stack:
    """Inspection service and Prometheus, run by compose."""

    command: list[str]
    environment: dict[str, str]
    service: str
    prometheus: str

    def compose(self, *arguments: str, timeout_s: float = 180) -> str:
        return run(*self.command, *arguments, timeout_s=timeout_s, environment=self.environment)

    def container(self, template: str) -> str:
        """What `docker inspect` says about the service's container, stopped or not."""
        ids = self.compose("ps", "--all", "--quiet", "inspect").split()
        return run("docker", "inspect", "--format", template, *ids).strip()

    def wait_until_healthy(self) -> None:
        def health() -> bool:
            return self.container("{{.State.Health.Status}}") == "healthy"

        wait_for(health, 120, "healthy container")


def run(*command: str, timeout_s: float = 60, environment: dict[str, str] | None = None) -> str:
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s, env=environment
    )
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-4000:]}{ended.stderr}"
    return ended.stdout


def answers(*command: str, timeout_s: float = 60) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout_s).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def wait_for(condition: Callable[[], T], seconds: float, what: str) -> T:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.5)
    return value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def base_images() -> list[str]:
    python = re.search(r"^ARG BASE_IMAGE=(.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    prometheus = re.search(r"prom/prometheus:\S+", (ROOT / "docker-compose.yml").read_text())
    assert python and prometheus
    return [python[1], prometheus[0]]


@pytest.fixture(scope="module")
def compose() -> list[str]:
    if not answers("docker", "info"):
        pytest.skip("no Docker engine answers")
    for command in (["docker", "compose"], ["docker-compose"]):
        if answers(*command, "version"):
            break
    else:
        pytest.skip("neither `docker compose` nor `docker-compose` is installed")
    for image in base_images():
        here = answers("docker", "image", "inspect", image)
        if not (here or answers("docker", "pull", "--quiet", image, timeout_s=300)):
            pytest.skip(f"image {image} can't be pulled")
    return command


def stack_of(compose: list[str], folder: Path, *overlays: str, **environment: str) -> Stack:
    """docker-compose.yml and what is laid over it, under a name and on ports of its own."""
    override = folder / "override.yml"
    override.write_text(OVERRIDE)
    ports = {"PORT": str(free_port()), "PROMETHEUS_PORT": str(free_port())}
    project = f"skrd4ad-test-{uuid.uuid4().hex[:8]}"
    files = [ROOT / "docker-compose.yml", *(ROOT / overlay for overlay in overlays), override]
    return Stack(
        command=[*compose, "-p", project, *(f"-f{file}" for file in files)],
        environment=os.environ | ports | {"RUNTIME": "cpu", "SKRD4AD_DEVICE": "cpu"} | environment,
        service=f"http://127.0.0.1:{ports['PORT']}",
        prometheus=f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}",
    )


@pytest.fixture(scope="module")
def stack(compose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = stack_of(compose, tmp_path_factory.mktemp("docker"))
    stack.compose("build", "inspect", timeout_s=900)
    with ExitStack() as afterwards:
        afterwards.callback(stack.compose, "down", "--volumes")
        # Shown by pytest where a test failed.
        afterwards.callback(lambda: print(stack.compose("logs", "inspect")))
        stack.compose("up", "--detach", "--no-build", "inspect", "prometheus")
        stack.wait_until_healthy()
        yield stack


@pytest.fixture
def service(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.service, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture
def prometheus(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.prometheus, timeout=30, trust_env=False) as client:
        yield client


def inspect(service: httpx2.Client, picture: Path) -> Any:
    headers = {"Content-Type": "image/png"}
    answer = service.post("/v1/inspect", params=DEMO, content=picture.read_bytes(), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_image_says_the_version_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert f"\nARG VERSION={package['version']}\n" in DOCKERFILE.read_text()


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    shown = set(re.findall(r"skrd4ad_\w+", " ".join(queries())))

    exposed = {family.name: family.type for family in Metrics().registry.collect()}
    endings = {"counter": "_total", "histogram": "_(bucket|sum|count)", "gauge": ""}
    patterns = [name + endings[kind] for name, kind in exposed.items()]
    assert [name for name in shown if not any(re.fullmatch(p, name) for p in patterns)] == []
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in shown)] == []


@pytest.mark.docker
def test_the_container_can_do_nothing_but_serve(stack: Stack) -> None:
    script = """
import importlib.util, json, os
def writable(path):
    try:
        open(path + "/probe", "w").close()
    except OSError:
        return False
    os.remove(path + "/probe")
    return True
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
print(json.dumps({
    "user": os.getuid(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "no_new_privileges": int(status["NoNewPrivs"]),
    "writable": [p for p in ("/", "/opt/venv", "/models", "/state", "/tmp") if writable(p)],
    "torch": [m for m in ("torch", "onnx", "timm") if importlib.util.find_spec(m)],
}))
"""

    said = stack.compose("exec", "-T", "inspect", "python", "-c", script)

    assert json.loads(said) == {
        "user": 10001,
        "capabilities": 0,
        "no_new_privileges": 1,
        "writable": ["/state", "/tmp"],
        "torch": [],
    }


@pytest.mark.docker
def test_the_port_is_published_on_loopback_only(stack: Stack) -> None:
    ports = json.loads(stack.container("{{json .NetworkSettings.Ports}}"))

    assert [binding["HostIp"] for bindings in ports.values() for binding in bindings] == [
        "127.0.0.1"
    ]


@pytest.mark.docker
def test_the_image_alone_refuses_to_be_open_unless_told(stack: Stack) -> None:
    ended = subprocess.run(
        ["docker", "run", "--rm", IMAGE], capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == 1
    assert "SKRD4AD_ALLOW_ANONYMOUS=true" in ended.stderr
    assert "keys create" in ended.stderr


@pytest.mark.docker
def test_keys_come_from_a_secret_and_from_the_command(
    compose: list[str], stack: Stack, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"line-3 inspect {'t' * 40}\n")
    closed = stack_of(compose, tmp_path, "docker/keys.yml", KEYS=str(tmp_path / "keys"))
    for folder in (tmp_path, *tmp_path.parents[:3]):  # the container's user must reach the file
        folder.chmod(folder.stat().st_mode | 0o055)
    with ExitStack() as afterwards:
        afterwards.callback(closed.compose, "down", "--volumes")
        afterwards.callback(lambda: print(closed.compose("logs", "inspect")))
        closed.compose("up", "--detach", "--no-build", "inspect")
        closed.wait_until_healthy()
        create = ("keys", "create", "--name", "boss", "--scope", "admin")
        token = closed.compose("exec", "-T", "inspect", "python", "-m", "service", *create)

        def models(**headers: str) -> int:
            url = f"{closed.service}/v1/models"
            return httpx2.get(url, headers=headers, trust_env=False).status_code

        assert (models(), models(Authorization="Bearer " + "x" * 40)) == (401, 401)
        assert models(Authorization="Bearer " + "t" * 40) == 200
        assert models(Authorization=f"Bearer {token.strip()}") == 200
        assert httpx2.get(f"{closed.service}/metrics", trust_env=False).status_code == 200
        logs = closed.compose("logs", "inspect")
        assert "t" * 40 not in logs and token.strip() not in logs


@pytest.mark.docker
def test_the_examples_are_decided(service: httpx2.Client) -> None:
    good = inspect(service, ROOT / "examples" / "normal.png")
    bad = inspect(service, ROOT / "examples" / "anomalous.png")

    assert (good["decision"], bad["decision"]) == ("normal", "anomalous")
    assert base64.b64decode(bad["heatmap"]).startswith(b"\x89PNG")


@pytest.mark.docker
def test_prometheus_scrapes_the_service_and_answers_the_dashboard(
    service: httpx2.Client, prometheus: httpx2.Client
) -> None:
    def target_is_up() -> bool:
        targets = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
        return [(t["labels"]["job"], t["health"]) for t in targets] == [("skrd4ad", "up")]

    inspect(service, ROOT / "examples" / "normal.png")
    wait_for(target_is_up, 60, "target that is up")

    def is_answered(query: str) -> bool:
        answer = prometheus.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        nothing_yet = "ALERTS" in query or "skrd4ad_shadow_" in query  # as nothing happened
        return nothing_yet or bool(answer["data"]["result"])

    for query in queries():  # a rate needs two scrapes
        wait_for(lambda query=query: is_answered(query), 60, f"answer to {query}")


@pytest.mark.docker
def test_a_calibration_survives_a_killed_container(
    stack: Stack, service: httpx2.Client, tmp_path: Path
) -> None:
    made = service.post(
        "/v1/calibrate", params={**DEMO, "target_fpr": 0.1}, files=normal_pictures(tmp_path, 12)
    )
    assert made.status_code == 201, made.text

    stack.compose("kill", "-s", "SIGKILL", "inspect")
    assert stack.container("{{.State.ExitCode}}") == "137"
    stack.compose("up", "--detach", "--no-build", "--force-recreate", "inspect")
    stack.wait_until_healthy()

    listed = service.get("/v1/calibrations", params=DEMO).json()
    assert [(c["id"], c["active"]) for c in listed] == [(made.json()["id"], True)]
    answer = inspect(service, ROOT / "examples" / "normal.png")
    assert answer["calibration"]["id"] == made.json()["id"]


@pytest.mark.docker
def test_a_stopped_container_ends_by_itself(stack: Stack) -> None:
    stack.compose("stop", "inspect")

    assert stack.container("{{.State.ExitCode}}") == "0"  # 137 is SIGKILL, after the grace


def queries() -> list[str]:
    """The dashboard's PromQL, with what Grafana puts in for its variables."""
    values = {"$__rate_interval": "1m", "$__range": "1h", "$model": ".*", "$quantile": "95"}
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in values.items():
                query = query.replace(variable, value)
            assert "$" not in query, query
            found.append(query)
    return found


def normal_pictures(folder: Path, count: int) -> list[tuple[str, tuple[str, bytes, str]]]:
    synthetic = pytest.importorskip("training.synthetic")
    files = []
    for seed in range(count):
        path = folder / f"{seed}.png"
        picture, _ = synthetic.draw(np.random.default_rng(1000 + seed), None, 512)
        Image.fromarray(picture).save(path)
        files.append(("images", (path.name, path.read_bytes(), "image/png")))
    return files
