"""Serving side by side: the same pictures, graph and cores for us, our peers and the bare engine.

    make bench-peers && python -m bench.serving --out bench/results/serving
    python -m bench.serving --part load --only litserve --graph light --render none --clients 32

    load      closed loop at 1, 4, 8 and 32 clients; open loop at 70 % of what 32 clients got
    memory    resident memory after 1,000 and 10,000 mixed requests
    size      how cost grows with the side of the pictures that are sent,
    batch       with the largest batch that is allowed,
    models      and with the number of models that are loaded
    trace     recording every inspection, beside not recording any
    swap      one version replacing the other without a pause, beside the same load without
    anomalib  its inferencers, from file to score, beside our service

Servers take turns at each load, the others paused, so that each has the machine to itself but for
the load generator, whose share is told. Ratios are formed within a round, in which all were asked
the same within seconds of each other, as other work on the machine slows all alike.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import uvloop

from bench import graphs, load, processes, report
from bench.report import CLIENTS, MOST
from bench.servers import ENVIRONMENTS, KINDS, PAIR, Kind, Server, ours, serving
from service.bundle import Bundle
from service.detector import Detector

FOLDER = Path("runs/bench")
PARTS = ("load", "memory", "size", "batch", "models", "trace", "swap", "anomalib")
GRAPHS = ("light", "resnet18", "wide-resnet50")
RENDERS = ("none", "heatmap")
ENGINE = "engine"
OPEN_LOAD = 0.7
SIDE, PICTURES = 512, 4
WARM_UP_S = {"light": 0.5, "resnet18": 1.0, "wide-resnet50": 3.0}
# A p99 takes 100 answers: few servers give one client of resnet18 as many.
SECONDS = {"light": 2.0, "resnet18": 4.0, "wide-resnet50": 10.0}
SIDES, BATCHES, MODELS = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16), (1, 2, 4, 8)
# Ray Serve reloads its proxy once more after its first answer, and a pause midway is its end.
STARTED_S = 4.0
FEW = 8  # clients, where it isn't about them
MIXED, MIXED_ROUNDS = 1000, 10
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure: everything, or the rows that somebody repeats."""

    parts: Sequence[str]
    only: Sequence[str]
    graphs: Sequence[str]
    renders: Sequence[str]
    clients: Sequence[int]
    rounds: int
    seconds: float | None  # None: SECONDS
    folder: Path  # for bundles, pictures and what servers write


class Bench:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.rows = plan, list[Row]()
        self.telling = telling(plan)
        self.scratch = plan.folder / "scratch"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.pictures = write_pictures(plan.folder / "pictures", SIDE)
        self.picture = self.pictures[0].read_bytes()
        written = graphs.write(plan.folder / "models", wide="wide-resnet50" in plan.graphs)
        self.bundles = {bundle.name: bundle for bundle in written}

    def run(self) -> None:
        for part in self.plan.parts:
            getattr(self, f"_{part}")()

    def _load(self) -> None:
        for graph in self.plan.graphs:
            takers = self._takers(graph)
            with contextlib.ExitStack() as stack:
                servers = {
                    name: self._started(stack, name, graph) for name in takers if name != ENGINE
                }
                for number in range(self.plan.rounds):
                    turn = number % len(takers)  # so that nobody always comes first
                    self._round(graph, number, [*takers[turn:], *takers[:turn]], servers)

    def _started(self, stack: contextlib.ExitStack, name: str, graph: str) -> Server:
        server = stack.enter_context(self._serving(KINDS[name], self.bundles[graph]))
        cell = {"server": name, "graph": graph, "round": 0}
        self._add("start", cell, {"ready_s": server.ready_s})
        time.sleep(STARTED_S)
        server.pause()
        return server

    def _round(
        self, graph: str, number: int, takers: Sequence[str], servers: dict[str, Server]
    ) -> None:
        """Everybody's turn at each load; what isn't measured is paused."""
        for (render, clients), name in product(self._cells(graph), takers):
            cell = {"server": name, "graph": graph, "render": render, "round": number}
            cell |= {"loop": "closed", "clients": clients}
            if name != ENGINE:
                found = self._ask(servers[name], graph, render, clients)
                self._add("load", cell, found)
                if clients == MOST and found["answered"]:  # at once, while the machine is as it was
                    rate = OPEN_LOAD * found["images_per_s"]
                    found = self._ask(servers[name], graph, render, clients, rate=rate)
                    self._add("load", cell | {"loop": "open"}, found)
            elif render == "none":
                self._add("load", cell, self._bare(graph, clients))

    def _cells(self, graph: str) -> list[tuple[str, int]]:
        """Render and clients; of everything, a heatmap only where its cost shows: on the light
        graph, alone and under load."""
        cells = list(product(self.plan.renders, self.plan.clients))
        if tuple(self.plan.clients) != CLIENTS:
            return cells
        shows = (1, MOST) if graph == "light" else ()
        return [cell for cell in cells if cell[0] == "none" or cell[1] in shows]

    def _takers(self, graph: str) -> list[str]:
        """Who is measured: ours on the peers' provider only where `auto` finds another one, and two
        of ours only where the graph leaves cores idle."""
        bundle = self.bundles[graph]
        found = Detector(bundle.read_graph(), bundle.manifest.image_size, "auto").device
        needless = {"ours-cpu": found == "cpu", PAIR: graph != "light"}
        skipped = {name for name in needless if needless[name] and "ours" in self.plan.only}
        takers = []
        for name in self.plan.only:
            if name != ENGINE and not KINDS[name].installed():
                print(f"{name} is not installed: {KINDS[name].install}", file=sys.stderr)
            elif name not in skipped:
                takers.append(name)
        return takers

    def _bare(self, graph: str, clients: int) -> Row:
        flags = ["--bundle", str(self.bundles[graph].folder), "--clients", str(clients)]
        flags += ["--device", "cpu"] if graph == "light" else []
        return self._run("bench.bare", graph, self.pictures, flags)

    def _memory(self) -> None:
        with self._serving(KINDS["ours"], self.bundles["light"]) as server:
            requests = mixed_requests(server, MIXED)
            statuses: Counter[str] = Counter()
            resident = []
            for _ in range(MIXED_ROUNDS):
                answers = uvloop.run(
                    load.closed_loop(server.address, iter(requests), FEW, math.inf)
                )
                statuses.update(answer.status for answer in answers)
                resident.append(processes.resident_mb(server.pid))
        values = {"resident_mb": resident, "statuses": dict(statuses)}
        self._add("memory", {"server": "ours", "graph": "light"}, values)

    def _size(self) -> None:
        with self._serving(KINDS["ours"], self.bundles["light"]) as server:
            for side in SIDES:
                pictures = write_pictures(self.plan.folder / "pictures", side)
                found = self._ask(server, "light", "none", FEW, pictures=pictures)
                self._add("size", {"server": "ours", "graph": "light", "side": side}, found)

    def _batch(self) -> None:
        for most in BATCHES:
            kind = ours("ours", "--max-batch-size", str(most))
            with self._serving(kind, self.bundles["resnet18"]) as server:
                found = self._ask(server, "resnet18", "none", MOST)
            self._add("batch", {"server": "ours", "graph": "resnet18", "batch": most}, found)

    def _models(self) -> None:
        for count in MODELS:
            names = [f"part-{number}" for number in range(count)]
            copies = copied(self.bundles["resnet18"], self.plan.folder / f"models-{count}", names)
            with self._serving(KINDS["ours"], copies, f"&model={names[0]}") as server:
                urls = [f"{server.url('none')}&model={name}" for name in names]
                found = self._ask(server, "resnet18", "none", FEW, urls=urls)
                found["ready_s"] = server.ready_s
            self._add("models", {"server": "ours", "graph": "resnet18", "models": count}, found)

    def _trace(self) -> None:
        """Two of ours in turns, which differ in nothing else, each with a database of its own."""
        for graph in self.telling:
            with contextlib.ExitStack() as stack:
                servers = {}
                for name, traced in report.TRACED.items():
                    database = f"sqlite:///{self.scratch / name}-{graph}.sqlite"
                    kind = ours(name, "--trace", traced, "--database-url", database)
                    servers[name] = stack.enter_context(self._serving(kind, self.bundles[graph]))
                    servers[name].pause()
                for number in range(self.plan.rounds):
                    for name in sorted(servers, reverse=number % 2 == 0):
                        found = self._ask(servers[name], graph, "none", MOST)
                        cell = {"server": name, "graph": graph, "round": number, "clients": MOST}
                        self._add("trace", cell, found | {"core_ms": core_ms(found)})

    def _swap(self) -> None:
        for graph in self.telling:
            folder, name = self.plan.folder / "models-swap", f"{graph}-swapped"
            for version in ("1", "2"):
                graphs.copied(self.bundles[graph], folder / graph / name / version)
            with self._serving(KINDS["ours"], Bundle(folder / graph / name / "1")) as server:
                for number in range(self.plan.rounds):
                    for swapping in (True, False) if number % 2 else (False, True):
                        cell = {"server": "ours", "graph": graph, "round": number}
                        cell |= {"swapping": swapping, "clients": FEW}
                        with swaps(server, name) if swapping else contextlib.nullcontext() as done:
                            found = self._ask(server, graph, "none", FEW)
                        self._add("swap", cell, found | {"swaps": len(done or ())})

    def _anomalib(self) -> None:
        python = ENVIRONMENTS / "anomalib" / "bin" / "python"
        if not python.exists():
            print("anomalib is not installed: make bench-peers", file=sys.stderr)
            return
        seconds = str(self.plan.seconds or SECONDS["resnet18"])
        command = [str(python), "-m", "bench.peers.anomalib", "--seconds", seconds]
        command += ["--image", str(self.pictures[0])]
        output = subprocess.run(command, check=True, capture_output=True, text=True)
        for name, found in json.loads(output.stdout.splitlines()[-1]).items():
            self._add("anomalib", {"server": name, "graph": "resnet18", "clients": 1}, found)
        with self._serving(KINDS["ours"], self.bundles["resnet18"]) as server:
            for clients in (1, FEW):
                found = self._ask(server, "resnet18", "none", clients)
                cell = {"server": "ours", "graph": "resnet18", "clients": clients}
                self._add("anomalib", cell, found)

    def _serving(
        self, kind: Kind, bundle: Bundle, query: str = ""
    ) -> contextlib.AbstractContextManager[Server]:
        return serving(kind, bundle.folder, self.scratch, self.picture, query)

    def _ask(
        self,
        server: Server,
        graph: str,
        render: str,
        clients: int,
        *,
        rate: float | None = None,
        pictures: Sequence[Path] = (),
        urls: Sequence[str] = (),
    ) -> Row:
        """What `bench.load` finds, in a process of its own as a client would be."""
        server.resume()
        flags = ["--json", "--clients", str(clients), "--pid", str(server.pid)]
        flags += ["--url", *(urls or [server.url(render)])]
        flags += ["--rate", str(rate)] if rate is not None else []
        flags += ["--field", server.kind.form_field] if server.kind.form_field else []
        longer = 1 / OPEN_LOAD if rate is not None else 1.0  # for as many pictures
        found = self._run("bench.load", graph, pictures or self.pictures, flags, longer)
        server.pause()
        return found

    def _run(
        self,
        module: str,
        graph: str,
        pictures: Sequence[Path],
        flags: Sequence[str],
        longer: float = 1.0,
    ) -> Row:
        seconds = longer * (self.plan.seconds or SECONDS[graph])
        command = [sys.executable, "-m", module, *flags, "--warm-up", str(WARM_UP_S[graph])]
        command += ["--seconds", str(seconds), "--image", *map(str, pictures)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found: Row = json.loads(output)
        return found

    def _add(self, part: str, cell: Row, values: Row) -> None:
        row = {"part": part, **cell, **values, "command": command_of(part, cell)}
        self.rows.append(row)
        print(report.brief(row), flush=True)


def telling(plan: Plan) -> list[str]:
    """Graphs to swap and to record with. Of everything the light one alone: others give too few
    answers within seconds to tell a few per cent, or a p99."""
    if tuple(plan.parts) != PARTS:
        return list(plan.graphs)
    for graph in plan.graphs:
        if graph != "light":
            again = f"python -m bench.serving --part trace swap --graph {graph} --seconds 30"
            print(f"{graph} is too slow to tell within seconds: {again}", file=sys.stderr)
    return [graph for graph in plan.graphs if graph == "light"]


@contextlib.contextmanager
def swaps(server: Server, name: str) -> Iterator[list[float]]:
    """Lets the other version of a model serve, again and again; seconds that each time took."""
    taken: list[float] = []
    over = threading.Event()

    def swap_on() -> None:
        for version in cycle("21"):
            began = time.perf_counter()
            address = f"http://127.0.0.1:{server.port}/v1/models/{name}/versions/{version}/activate"
            with urllib.request.urlopen(urllib.request.Request(address, method="POST")):
                taken.append(time.perf_counter() - began)
            if over.is_set():
                return

    thread = threading.Thread(target=swap_on)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        server.resume()  # it was paused when it had been asked
        thread.join()


def core_ms(found: Row) -> float | None:
    """Processor time of the server for an image, which other work on the machine hardly changes."""
    if not found["answered"]:
        return None
    return float(1e3 * found["server_cores"] * found["seconds"] / found["answered"])


def command_of(part: str, cell: Row) -> str:
    """What measures this row again (a start is measured with whatever it is started for)."""
    words = ["python -m bench.serving", "--part", "load" if part == "start" else part]
    if part in ("load", "start"):
        words += ["--only", cell["server"], "--graph", cell["graph"]]
    if part in ("trace", "swap"):
        words += ["--graph", cell["graph"]]
    if part == "load":
        words += ["--render", cell["render"], "--clients", str(cell["clients"])]
    return " ".join(words)


def write_pictures(folder: Path, side: int) -> list[Path]:
    """JPEGs of a good part, turned so that not all are the same; those that are there stay."""
    part = cv2.imread("examples/normal.png")
    assert part is not None
    enlarged = cv2.resize(part, (side, side), interpolation=cv2.INTER_CUBIC)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{side}-{number}.jpg" for number in range(PICTURES)]
    for number, path in enumerate(paths):
        if not path.exists():
            turned = np.ascontiguousarray(np.rot90(enlarged, number))
            cv2.imwrite(str(path), turned, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return paths


def mixed_requests(server: Server, count: int) -> list[bytes]:
    """Pictures of many sizes and formats, one in ten of them damaged, rendered in every way."""
    rng = np.random.default_rng(0)
    part = cv2.imread("examples/normal.png")
    assert part is not None
    requests = []
    for side, suffix in product((64, 200, 512, 900), (".jpg", ".png", ".webp", ".bmp")):
        data = cv2.imencode(suffix, cv2.resize(part, (side, side)))[1].tobytes()
        for render in server.kind.targets:
            whole = load.picture_request(server.url(render), data, "image/*")
            cut = load.picture_request(server.url(render), data[: len(data) // 2], "image/*")
            requests += [whole] * 9 + [cut]
    return [requests[i] for i in rng.integers(0, len(requests), count)]


def copied(bundle: Bundle, models: Path, names: Sequence[str]) -> Bundle:
    """The same graph under several names in one models folder; the first of them."""
    return [Bundle(graphs.copied(bundle, models / name / "1")) for name in names][0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    everybody = (*KINDS, ENGINE)
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--only", nargs="+", choices=everybody, default=everybody, help="default: everybody")
    add("--graph", nargs="+", choices=GRAPHS, default=GRAPHS[:2], help="default: not the wide one")
    add("--render", nargs="+", choices=RENDERS, default=RENDERS, help="default: both")
    add("--clients", nargs="+", type=int, choices=CLIENTS, default=CLIENTS, help="default: all")
    add(
        "--rounds",
        type=int,
        default=3,
        help="of parts load and trace; ratios are formed within one",
    )
    add("--seconds", type=float, help="for each row (default: by graph)")
    add("--folder", type=Path, default=FOLDER, help=f"for what is needed (default: {FOLDER})")
    add("--out", type=Path, metavar="FOLDER", help="write rows, table and plots here")
    arguments = parser.parse_args(argv)

    plan = Plan(
        arguments.part,
        arguments.only,
        arguments.graph,
        arguments.render,
        sorted(arguments.clients),
        arguments.rounds,
        arguments.seconds,
        arguments.folder,
    )
    bench = Bench(plan)
    try:
        bench.run()
    finally:  # what was measured before something failed is worth having
        print(report.markdown(bench.rows))
        if arguments.out:
            report.write(arguments.out, bench.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
