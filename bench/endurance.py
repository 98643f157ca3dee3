"""What a service is like after hours, and under far more than it can do.

    make soak [MINUTES=30]         # into bench/results/soak
    make overload [MINUTES=5]      # into bench/results/overload
    make bombs                     # into bench/results/bombs

`soak` sends a mixture: pictures of many sizes and formats in every rendering, damaged ones, clients
that leave in the middle, lists, exports, metrics, calibrations, and swaps between two versions.
Memory, open files and threads are looked at all the while; growth is what the last quarter has over
the second one.

`overload` measures what 32 clients get, sends ten times that at planned moments, and asks the
probes beside it; then what 32 clients get once more.

`bombs` sends what is small and unpacks to much: how soon it is refused, and what that took.
"""

import argparse
import asyncio
import gzip
import io
import json
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import cv2
import httpx2
import numpy as np
import uvloop
from PIL import Image

from bench import charts, graphs, load, processes
from bench.servers import Server, ours, serving
from bench.serving import mixed_requests, write_pictures
from service.bundle import Bundle

BUNDLE = Path("models/demo/1")
CLIENTS, MOST = 6, 32
LOOK_S, PROBE_S = 5.0, 0.2
CALIBRATE_S, SWAP_S = 30.0, 20.0
ANSWERS = {"200", "201", "400", "404", "413", "415", "422", "429", "503", "504"}
OVERLOADED = {"200", "429", "503", "504"}
PROBES = ("/livez", "/readyz", "/metrics")
GROWTH = {"resident_mb": 1.05, "files": 1.25, "threads": 1.25}  # a pool may grow by one
BOMB_MB = 50.0
TIMES = 10  # what is sent over what can be answered


@dataclass(frozen=True)
class Look:
    """A service at a moment."""

    minutes: float
    resident_mb: float
    files: int
    threads: int
    answered: int  # so far


@dataclass
class Soak:
    looks: list[Look] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)

    def count(self, status: str) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def growth(self, what: str) -> float:
        """The median of the last quarter over that of the second one."""
        values = np.array([getattr(look, what) for look in self.looks], float)
        quarter = len(values) // 4
        return float(np.median(values[-quarter:]) / np.median(values[quarter : 2 * quarter]))

    def unexpected(self) -> dict[str, int]:
        return {status: n for status, n in self.statuses.items() if status not in ANSWERS}


@dataclass(frozen=True)
class Overload:
    before_per_s: float  # images that 32 clients get
    sent_per_s: float
    answered_per_s: float  # of these, with 200
    statuses: dict[str, int]
    without_retry_after: int  # refusals that don't say when to come again
    probes_p99_ms: dict[str, float]
    probe_failures: int
    resident_mb: tuple[float, float, float]  # before, the most meanwhile, after
    after_per_s: float


@dataclass(frozen=True)
class Bomb:
    """A file that is sent `times` times, one after the other."""

    name: str
    kilobytes: float
    times: int
    statuses: list[int]  # all that came back
    median_ms: float
    worst_ms: float
    grown_mb: float  # the most memory meanwhile over that before


@contextmanager
def service(folder: Path, *flags: str) -> Iterator[Server]:
    """The demo model twice, as versions 1 and 2, in a service with its own database."""
    models = folder / "models" / "demo"
    for version in (1, 2):
        graphs.copied(Bundle(BUNDLE), models / str(version))
    picture = write_pictures(folder / "pictures", 512)[0].read_bytes()
    with serving(ours("ours", *flags), models / "2", folder, picture) as server:
        yield server


async def soak(server: Server, minutes: float) -> Soak:
    """A mixture of all that a service does, for so long."""
    found, end = Soak(), time.monotonic() + 60 * minutes
    requests = mixed_requests(server, 1000)
    base = f"http://127.0.0.1:{server.port}"
    rng = np.random.default_rng(0)

    async def inspect() -> None:
        client = load.Client(server.address)
        while time.monotonic() < end:
            found.count(await client.ask(requests[rng.integers(len(requests))]))
        client.close()

    async def leave() -> None:
        while time.monotonic() < end:
            with suppress(OSError):
                _, writer = await asyncio.open_connection(*server.address)
                request = requests[rng.integers(len(requests))]
                writer.write(request[: rng.integers(1, len(request))])
                await writer.drain()
                await asyncio.sleep(0.05)
                writer.transport.abort()
            await asyncio.sleep(0.5)

    async def repeat(seconds: float, ask: Callable[[], Awaitable[httpx2.Response]]) -> None:
        while time.monotonic() < end:
            found.count(str((await ask()).status_code))
            await asyncio.sleep(seconds)

    async def look() -> None:
        began = time.monotonic()
        while time.monotonic() < end:
            found.looks.append(_look(server.pid, time.monotonic() - began, found.statuses))
            await asyncio.sleep(LOOK_S)

    samples = _samples()
    async with httpx2.AsyncClient(base_url=base, timeout=120) as client:
        versions = [1, 2]

        async def swap() -> httpx2.Response:
            versions.reverse()
            return await client.post(f"/v1/models/demo/versions/{versions[0]}/activate")

        async def calibrate() -> httpx2.Response:
            return await client.post("/v1/calibrate?target_fpr=0.1", files=samples)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(inspect())
            tasks.create_task(leave())
            tasks.create_task(look())
            tasks.create_task(repeat(SWAP_S, swap))
            tasks.create_task(repeat(CALIBRATE_S, calibrate))
            for path in ("/v1/inspections", "/metrics", "/v1/models", "/v1/calibrations"):
                tasks.create_task(repeat(1.0, partial(client.get, path)))
            rare = "/v1/inspections/export?format=jsonl&min_score=1.5"
            tasks.create_task(repeat(10.0, partial(client.get, rare)))
    return found


async def overload(
    server: Server, minutes: float, pictures: Sequence[Path], *, closed_s: float = 15
) -> Overload:
    """Ten times what 32 clients get, and the probes meanwhile."""
    requests = [
        load.picture_request(server.url("none"), path.read_bytes(), "image/jpeg")
        for path in pictures
    ]
    seconds = 60 * minutes

    async def closed() -> float:
        found = await load.measure(server.address, requests, clients=MOST, seconds=closed_s)
        return found.images_per_s

    before = await closed()
    settled = processes.resident_mb(server.pid)
    sending = asyncio.ensure_future(
        load.measure(server.address, requests, seconds=seconds, rate=TIMES * before)
    )
    probed = await _probe(server, requests[0], time.monotonic() + seconds)
    result = await sending
    await asyncio.sleep(5)  # what it accepted at last
    after = await closed()
    return Overload(
        before_per_s=before,
        sent_per_s=TIMES * before,
        answered_per_s=result.images_per_s,
        statuses={"200": result.answered} | result.errors,
        without_retry_after=probed.without_retry_after,
        probes_p99_ms={path: float(np.percentile(ms, 99)) for path, ms in probed.ms.items()},
        probe_failures=probed.failures,
        resident_mb=(settled, probed.most_mb, processes.resident_mb(server.pid)),
        after_per_s=after,
    )


@dataclass
class _Probed:
    ms: dict[str, list[float]] = field(default_factory=lambda: {path: [] for path in PROBES})
    failures: int = 0
    without_retry_after: int = 0
    most_mb: float = 0.0


async def _probe(server: Server, request: bytes, end: float) -> _Probed:
    found = _Probed()
    body = request.partition(b"\r\n\r\n")[2]
    base = f"http://127.0.0.1:{server.port}"
    async with httpx2.AsyncClient(base_url=base, timeout=120) as client:
        while time.monotonic() < end:
            for path in PROBES:
                asked = time.perf_counter()
                answer = await client.get(path)
                found.ms[path].append(1e3 * (time.perf_counter() - asked))
                found.failures += answer.status_code != 200
            headers = {"Content-Type": "image/jpeg"}
            answer = await client.post("/v1/inspect?render=none", content=body, headers=headers)
            refused = answer.status_code in (429, 503)
            found.without_retry_after += refused and "retry-after" not in answer.headers
            found.most_mb = max(found.most_mb, processes.resident_mb(server.pid))
            await asyncio.sleep(PROBE_S)
    return found


async def bombs(server: Server, times: int = 50) -> list[Bomb]:
    """A picture and archives that unpack to far more than is allowed, over HTTP."""
    zeros = bytes(1 << 28)
    tarred = tarfile.TarInfo("part.png")
    tarred.size = len(zeros)
    zipped, bundled = _zip("part.png", zeros), _zip("manifest.json", zeros)
    lying = bytearray(zipped)
    lying[22:26] = struct.pack("<I", 1000)  # the size in the file's own header
    packed = gzip.compress(tarred.tobuf() + zeros)
    del zeros
    sent = {
        "PNG of 400 megapixels": ("/v1/inspect", "image/png", _black_png(20_000)),
        "zip of 268 MB": ("/v1/calibrate", "application/zip", zipped),
        "the same, which says 1 kB": ("/v1/calibrate", "application/zip", bytes(lying)),
        "tar.gz of 268 MB": ("/v1/calibrate", "application/gzip", packed),
        "bundle with a manifest of 268 MB": ("/v1/models", "application/zip", bundled),
    }
    base = f"http://127.0.0.1:{server.port}"
    async with httpx2.AsyncClient(base_url=base, timeout=60) as client:
        await client.get("/livez")  # the client's own first steps
        return [await _bomb(server, client, name, *each, times) for name, each in sent.items()]


async def _bomb(
    server: Server,
    client: httpx2.AsyncClient,
    name: str,
    path: str,
    kind: str,
    data: bytes,
    times: int,
) -> Bomb:
    ms, statuses, before = [], set(), processes.reset_peak_mb(server.pid)
    for _ in range(times):
        asked = time.perf_counter()
        answer = await client.post(path, content=data, headers={"Content-Type": kind})
        ms.append(1e3 * (time.perf_counter() - asked))
        statuses.add(answer.status_code)
    grown = processes.peak_mb(server.pid) - before
    return Bomb(
        name, len(data) / 1000, times, sorted(statuses), float(np.median(ms)), max(ms), grown
    )


def _zip(name: str, data: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return packed.getvalue()


def _black_png(side: int) -> bytes:
    """A square with a bit for each pixel."""
    packed = io.BytesIO()
    Image.new("1", (side, side)).save(packed, "PNG")
    return packed.getvalue()


def _samples() -> list[tuple[str, tuple[str, bytes, str]]]:
    """Pictures of a good part, no two the same."""
    part = cv2.imread("examples/normal.png")
    assert part is not None
    rng = np.random.default_rng(1)
    samples = []
    for number in range(25):
        noise = rng.normal(0, 3, part.shape)
        pixels = np.clip(part + noise, 0, 255).astype(np.uint8)
        data = cv2.imencode(".jpg", pixels)[1].tobytes()
        samples.append(("images", (f"{number}.jpg", data, "image/jpeg")))
    return samples


def _look(pid: int, seconds: float, statuses: dict[str, int]) -> Look:
    family = processes.tree(pid)
    return Look(
        minutes=seconds / 60,
        resident_mb=processes.resident_mb(pid),
        files=sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in family),
        threads=sum(len(list(Path(f"/proc/{each}/task").iterdir())) for each in family),
        answered=sum(statuses.values()),
    )


def soak_table(found: Soak) -> str:
    rows = ["| | last quarter over second | least | most |", "|---|---|---|---|"]
    for what, label in (("resident_mb", "MB"), ("files", "open files"), ("threads", "threads")):
        values = [getattr(look, what) for look in found.looks]
        rows.append(f"| {label} | {found.growth(what):.3f} | {min(values):g} | {max(values):g} |")
    told = ", ".join(f"{n} of {status}" for status, n in sorted(found.statuses.items()))
    minutes = found.looks[-1].minutes
    return "\n".join(rows) + f"\n\n{minutes:.1f} minutes, answers: {told}.\n"


def overload_table(found: Overload) -> str:
    answers = ", ".join(f"{n} of {status}" for status, n in sorted(found.statuses.items()))
    probes = ", ".join(f"{path} {ms:.1f}" for path, ms in found.probes_p99_ms.items())
    before, most, after = found.resident_mb
    rows = {
        "images/s of 32 clients, before": f"{found.before_per_s:.1f}",
        "sent a second": f"{found.sent_per_s:.0f}",
        "answered a second": f"{found.answered_per_s:.1f}",
        "answers": answers,
        "refusals without Retry-After": f"{found.without_retry_after}",
        "probes, p99 ms": probes,
        "probes that failed": f"{found.probe_failures}",
        "memory before, at most, after, MB": f"{before:.0f}, {most:.0f}, {after:.0f}",
        "images/s after over before": f"{found.after_per_s / found.before_per_s:.2f}",
    }
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def bombs_table(found: Sequence[Bomb]) -> str:
    rows = [
        "| | kB | times | answers | ms: median | worst | MB more |",
        "|---|---|---|---|---|---|---|",
    ]
    for bomb in found:
        answers = ", ".join(map(str, bomb.statuses))
        numbers = f"{bomb.median_ms:.1f} | {bomb.worst_ms:.1f} | {bomb.grown_mb:.1f}"
        rows.append(
            f"| {bomb.name} | {bomb.kilobytes:.0f} | {bomb.times} | {answers} | {numbers} |"
        )
    return "\n".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """1 where something came back that must not, or more grew than may."""
    parser = argparse.ArgumentParser(prog="python -m bench.endurance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("part", choices=("soak", "overload", "bombs"))
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="default: 30; of a soak or an overload"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write table, rows and plot here"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = write_pictures(folder / "pictures", 512)
        with service(folder) as server:
            if arguments.part == "soak":
                soaked = uvloop.run(soak(server, arguments.minutes))
                table, rows, bad = soak_table(soaked), asdict(soaked), bool(soaked.unexpected())
                bad |= any(soaked.growth(what) > most for what, most in GROWTH.items())
                looks = soaked.looks
                plot = charts.over_time(
                    f"Soak of {arguments.minutes:g} minutes",
                    {
                        "resident memory, MB": [(each.minutes, each.resident_mb) for each in looks],
                        "open files": [(each.minutes, float(each.files)) for each in looks],
                        "threads": [(each.minutes, float(each.threads)) for each in looks],
                    },
                )
            elif arguments.part == "bombs":
                sent = uvloop.run(bombs(server))
                table, plot = bombs_table(sent), None
                rows = {"bombs": [asdict(each) for each in sent]}
                bad = any(each.statuses != [413] or each.grown_mb > BOMB_MB for each in sent)
            else:
                pushed = uvloop.run(overload(server, arguments.minutes, pictures))
                table, rows, plot = overload_table(pushed), asdict(pushed), None
                bad = not pushed.statuses.keys() <= OVERLOADED or bool(pushed.probe_failures)
    print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "table.md").write_text(table)
        (arguments.out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
        if plot:
            (arguments.out / "plot.svg").write_text(plot)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
