"""The servers that are measured, each a process of its own: ours and its peers.

All get the same bundle, the same cores and the same pictures. A peer lives in the environment that
`make bench-peers` makes for it; one without is not measured.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import pair, processes
from bench.load import picture_request
from training.rehearsal import free_port

ENVIRONMENTS = Path("runs/bench/env")
PAIR = "ours-pair"
READY_S = 120.0
POLL_S = 0.02
STOP_S = 20.0
SETTLE_S = 0.3
JPEG = "image/jpeg"


@dataclass(frozen=True)
class Kind:
    """A way to serve: how it is started and how it is asked."""

    name: str
    command: Callable[[Path, int, Path], list[str]]  # of bundle, port and folder to write in
    targets: dict[str, str]  # path and query, by what is rendered
    form_field: str | None = None  # of a multipart form; None: the picture is the body
    environment: dict[str, str] = field(default_factory=dict)
    install: str = "make bench-peers"  # what brings what it lacks
    present: Callable[[], bool] = lambda: True  # what it needs beside its program

    def url(self, port: int, render: str) -> str:
        return f"http://127.0.0.1:{port}{self.targets[render]}"

    def installed(self) -> bool:
        return Path(self.command(Path(), 0, Path())[0]).exists() and self.present()


def _targets(path: str) -> dict[str, str]:
    return {render: f"{path}?render={render}" for render in ("none", "heatmap", "overlay", "mask")}


def ours(name: str, *flags: str) -> Kind:
    def command(bundle: Path, port: int, folder: Path) -> list[str]:
        serve = [sys.executable, "-m", "service", "serve", "--port", str(port)]
        return [*serve, *_settings(name, bundle, folder), *flags]

    return Kind(name, command, _targets("/v1/inspect"))


def _settings(name: str, bundle: Path, folder: Path) -> list[str]:
    return [
        *("--models", str(bundle.parent.parent), "--log-level", "warning"),
        # Of its own: another one may be paused while it writes.
        *("--database-url", f"sqlite:///{folder / name}.sqlite"),
    ]


def _pair(name: str) -> Kind:
    def command(bundle: Path, port: int, folder: Path) -> list[str]:
        start = [sys.executable, "-m", "bench.pair", "--port", str(port)]
        start += ["--services", str(free_port()), str(free_port())]
        start += ["--folder", str(folder / "nginx")]
        # On the peers' provider, which is what it is compared on.
        return [*start, *_settings(name, bundle, folder), "--device", "cpu"]

    return Kind(
        name,
        command,
        _targets("/v1/inspect"),
        install="apt-get install nginx",
        present=lambda: pair.NGINX is not None,
    )


def _peer(name: str, *module: str, **options: object) -> Kind:
    python = str(ENVIRONMENTS / name / "bin" / "python")

    def command(bundle: Path, port: int, folder: Path) -> list[str]:
        return [python, *(word.format(port=port) for word in module)]

    return Kind(name, command, **({"targets": _targets("/inspect")} | options))  # type: ignore[arg-type]


KINDS = {
    kind.name: kind
    for kind in (
        ours("ours"),
        ours("ours-cpu", "--device", "cpu"),
        _pair(PAIR),
        _peer("litserve", "-m", "bench.peers.litserve", "{port}"),
        _peer("ray", "-m", "bench.peers.ray", "{port}"),
        _peer(
            "bentoml",
            *("-m", "bentoml", "serve", "bench.peers.bentoml:Inspect", "--host", "127.0.0.1"),
            *("--port", "{port}"),
            targets={"none": "/inspect", "heatmap": "/inspect_heatmap"},
            form_field="images",
            environment={
                "BENTOML_DO_NOT_TRACK": "1",
                # A line for each request and worker, which no other peer writes.
                "BENTOML_CONFIG_OPTIONS": "services.Inspect.logging.access.enabled=false",
            },
        ),
    )
}
PEERS = ("litserve", "ray", "bentoml")


@dataclass(frozen=True)
class Server:
    """One that answers."""

    kind: Kind
    port: int
    pid: int
    ready_s: float  # from its start to its first inspection

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def url(self, render: str) -> str:
        return self.kind.url(self.port, render)

    def pause(self) -> None:
        """Stop its processes as they stand: some peers take a quarter of a core when idle."""
        _signal(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on, and give their watchdogs a moment."""
        _signal(self.pid, signal.SIGCONT)
        time.sleep(SETTLE_S)


@contextlib.contextmanager
def serving(
    kind: Kind, bundle: Path, folder: Path, picture: bytes, query: str = ""
) -> Iterator[Server]:
    """A running server that has answered a picture; what it prints goes to a file in `folder`.

    Raises RuntimeError with the file's end where it stops or doesn't answer.
    """
    port = free_port()
    log = folder / f"{kind.name}.log"
    environment = os.environ | {"BENCH_BUNDLE": str(bundle.resolve())} | kind.environment
    environment |= {"BENTOML_HOME": str(folder / "bentoml")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # none compiles itself at each start
    with log.open("wb") as output:
        started = time.perf_counter()
        deadline = started + READY_S
        process = subprocess.Popen(
            kind.command(bundle, port, folder), env=environment, stdout=output, stderr=output
        )
        url = kind.url(port, "none") + query
        request = picture_request(url, picture, JPEG, kind.form_field)
        try:
            while not _answers(port, request, deadline):
                if process.poll() is not None or time.perf_counter() > deadline:
                    raise RuntimeError(f"{kind.name} doesn't answer:\n{log.read_text()[-2000:]}")
                time.sleep(POLL_S)
            yield Server(kind, port, process.pid, time.perf_counter() - started)
        finally:
            _stop(process)


def _answers(port: int, request: bytes, deadline: float) -> bool:
    """Whether it says 200 before `deadline`; one that accepts and stays silent doesn't."""
    left = max(POLL_S, deadline - time.perf_counter())
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=left) as connection,
    ):
        connection.sendall(request)
        return connection.recv(12).endswith(b"200")
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends the server and whatever it started, in order where it can."""
    _signal(process.pid, signal.SIGCONT)
    family = processes.tree(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _signal(pid: int, number: signal.Signals) -> None:
    for each in processes.tree(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)
