"""Rows of `bench.serving` -> goals beside what was found, tables and plots.

A ratio is formed within a round, from rows that differ in nothing but the server; told are the
median over rounds, the least and the most.
"""

import math
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from bench import charts
from bench.servers import PAIR, PEERS
from service import cores
from training import files
from training.benchmark import processor

Row = dict[str, Any]
CLIENTS = (1, 4, 8, 32)
MOST = CLIENTS[-1]
LATENCIES = ("images_per_s", "p50_ms", "p95_ms", "p99_ms")
COSTS = ("load_cores", "server_cores", "server_mb")
SCALED = {"size": "side", "batch": "batch", "models": "models"}  # part: what grows in it
TRACED = {"traced": "true", "untraced": "false"}  # server: whether it records inspections
CLOSED_PLAIN = ("closed", "none")  # loop and render of what is plotted against clients
PLOTTED = {  # part: title and what the axis says
    "size": ("light, square JPEGs, 8 clients", "side of the picture, pixels"),
    "batch": ("resnet18, 32 clients", "largest batch"),
    "models": ("resnet18, 8 clients over all models in turn", "models loaded"),
}


@dataclass(frozen=True)
class Found:
    """A figure in each round that has one."""

    values: list[float]
    failed: int = 0  # rows of ours with errors or without an answer, which no goal survives

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, unit: str = "") -> str:
        said = [f"{self.median:.3g}{unit}"] if self.values else []
        if len(self.values) > 1:
            said.append(f"({min(self.values):.3g} to {max(self.values):.3g})")
        if self.failed:
            said.append(f"with errors in {self.failed}")
        return " ".join(said)


@dataclass(frozen=True)
class Goal:
    name: str
    found: Found | None  # None: not measured
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}{self.unit}"
        return f"<= {self.at_most:g}{self.unit}"

    @property
    def met(self) -> bool:
        if self.found is None or self.found.failed:
            return False
        median = self.found.median
        return (self.at_least is None or median >= self.at_least) and (
            self.at_most is None or median <= self.at_most
        )


def brief(row: Row) -> str:
    """A row as one line for who waits."""
    cell = [str(row[key]) for key in ("part", "server", "graph", "render", "loop") if key in row]
    for key in ("round", "clients", "side", "batch", "models", "swapping"):
        cell += [f"{key} {row[key]}"] if key in row else []
    said = []
    if "images_per_s" in row:
        said.append(f"{row['images_per_s']:.1f} images/s")
    if row.get("p50_ms") is not None:
        said.append(f"p50 {row['p50_ms']:.1f}, p95 {row['p95_ms']:.1f} ms")
    if row.get("swaps"):
        said.append(f"p99 {row['p99_ms'] or math.nan:.1f} ms through {row['swaps']} swaps")
    if row.get("errors"):
        said.append(f"errors {row['errors']}")
    if "ready_s" in row:
        said.append(f"ready after {row['ready_s']:.1f} s")
    if "resident_mb" in row:
        said.append(" ".join(f"{mb:.0f}" for mb in row["resident_mb"]) + f" MB; {row['statuses']}")
    return f"{' '.join(cell)}: {', '.join(said)}"


def by_round(rows: Sequence[Row], part: str, value: str, **cell: Any) -> dict[int, float]:
    """A value of the rows with this cell, by round; none where nothing was answered, or too little
    for a p99."""
    return {row["round"]: row[value] for row in _with(rows, part=part, **cell) if row[value]}


def _with(rows: Sequence[Row], **cell: Any) -> list[Row]:
    return [row for row in rows if cell.items() <= row.items()]


def compared(
    rows: Sequence[Row],
    value: str,
    server: str,
    others: Sequence[str],
    of: Callable[[float, float], float] = operator.truediv,
    best: Callable[..., float] = max,
    part: str = "load",
    **cell: Any,
) -> Found | None:
    """Ours against the best of the others, in every round that has both; None where none has and
    none of ours failed."""
    mine = by_round(rows, part, value, server=server, **cell)
    theirs = [by_round(rows, part, value, server=other, **cell) for other in others]
    found = []
    for number, ours in mine.items():
        there = [each[number] for each in theirs if number in each]
        if there:
            found.append(of(ours, best(there)))
    asked = _with(rows, part=part, server=server, **cell)
    failed = sum(bool(row["errors"]) or not row["answered"] for row in asked)
    return Found(found, failed) if found or failed else None


def worst_p99(rows: Sequence[Row], server: str, graph: str) -> Found | None:
    """Our p99 over the lowest of the peers', at the load where that is highest."""
    loads: list[Row] = [{"loop": "closed", "clients": n} for n in CLIENTS] + [{"loop": "open"}]
    found = [
        compared(rows, "p99_ms", server, PEERS, best=min, graph=graph, render=render, **each)
        for each in loads
        for render in ("none", "heatmap")
    ]
    measured = [each for each in found if each]
    if not measured:
        return None
    worst = max(
        (each.values for each in measured if each.values), key=statistics.median, default=[]
    )
    return Found(worst, sum(each.failed for each in measured))


def goals(rows: Sequence[Row]) -> list[Goal]:
    """All of them; what the rows don't hold has no figure."""
    same = {graph: _on_the_peers_provider(rows, graph) for graph in ("light", "resnet18")}
    paired = _with(rows, part="load", server=PAIR)
    starts = by_round(rows, "start", "ready_s", server="ours", graph="resnet18")
    return [
        *_light_goals(rows, same["light"], "light"),
        *(_light_goals(rows, PAIR, "light, two services behind nginx") if paired else ()),
        _alone_goal(rows, same["light"], "light"),
        _engine_goal(rows, "ours", "resnet18", "resnet18"),
        _alone_goal(rows, "ours", "resnet18"),
        Goal(
            f"resnet18: images/s over the best peer's, ours on the peers' provider, {MOST} clients",
            _throughput(rows, same["resnet18"], PEERS, "resnet18"),
            at_least=1.0,
        ),
        Goal(
            f"resnet18: the same, ours on the device that it chooses, {MOST} clients",
            _throughput(rows, "ours", PEERS, "resnet18"),
            at_least=2.0,
        ),
        Goal(
            "resnet18: p99 over the best peer's, worst load",
            worst_p99(rows, same["resnet18"], "resnet18"),
            at_most=1.0,
        ),
        Goal(
            "start to first answer, demo bundle",
            Found([*starts.values()]) if starts else None,
            at_most=5.0,
            unit=" s",
        ),
        Goal(
            "resident memory after 10,000 over that after 1,000 mixed requests",
            _growth(rows),
            at_most=1.05,
        ),
        *(goal for graph in ("light", "resnet18") for goal in _trace_goals(rows, graph)),
        *(
            Goal(f"{graph}: p99 while versions are swapped over that without", found, at_most=2.0)
            for graph in ("light", "resnet18")
            if (found := _swapping(rows, graph))
        ),
    ]


def _light_goals(rows: Sequence[Row], server: str, said: str) -> list[Goal]:
    """What serving alone is to reach, by one service and, beside it, by two."""
    return [
        Goal(
            f"{said}: images/s over the best peer's, {MOST} clients",
            _throughput(rows, server, PEERS, "light"),
            at_least=1.5,
        ),
        _engine_goal(rows, server, "light", said),
        Goal(
            f"{said}: p99 over the best peer's, worst load",
            worst_p99(rows, server, "light"),
            at_most=1.0,
        ),
    ]


def _trace_goals(rows: Sequence[Row], graph: str) -> list[Goal]:
    def ratio(value: str) -> Found | None:
        on, off = TRACED
        return compared(rows, value, on, [off], part="trace", graph=graph)

    recorded = "with every inspection recorded over that without"
    return [
        Goal(f"{graph}: images/s {recorded}, {MOST} clients", ratio("images_per_s"), at_least=0.97),
        Goal(f"{graph}: processor time of an image {recorded}", ratio("core_ms"), at_most=1.03),
    ]


def _on_the_peers_provider(rows: Sequence[Row], graph: str) -> str:
    """Ours where it was told to use that provider, or where `auto` finds no other one."""
    return "ours-cpu" if _with(rows, server="ours-cpu", graph=graph) else "ours"


def _growth(rows: Sequence[Row]) -> Found | None:
    """Of memory; a damaged picture is answered with 400."""
    memory = _with(rows, part="memory")
    failed = sum(not {"200"} <= row["statuses"].keys() <= {"200", "400"} for row in memory)
    grown = [row["resident_mb"][-1] / row["resident_mb"][0] for row in memory]
    return Found(grown, failed) if memory else None


def _swapping(rows: Sequence[Row], graph: str) -> Found | None:
    """p99 through swaps over that of the same load without, in each round."""
    usual, swapped = (
        by_round(rows, "swap", "p99_ms", graph=graph, swapping=swapping)
        for swapping in (False, True)
    )
    asked = _with(rows, part="swap", graph=graph)
    failed = sum(bool(row["errors"]) or not row["answered"] for row in asked)
    found = [value / usual[number] for number, value in swapped.items() if number in usual]
    return Found(found, failed) if found or failed else None


def _engine_goal(rows: Sequence[Row], ours: str, graph: str, said: str) -> Goal:
    return Goal(
        f"{said}: images/s over the bare engine's, {MOST} clients",
        _throughput(rows, ours, ["engine"], graph),
        at_least=0.95,
    )


def _alone_goal(rows: Sequence[Row], ours: str, graph: str) -> Goal:
    alone: Row = {"loop": "closed", "clients": 1, "render": "none", "graph": graph}
    return Goal(
        f"{graph}: one client's p50 beyond the engine's",
        compared(rows, "p50_ms", ours, ["engine"], operator.sub, **alone),
        at_most=3.0,
        unit=" ms",
    )


def _throughput(
    rows: Sequence[Row], server: str, others: Sequence[str], graph: str
) -> Found | None:
    most: Row = {"loop": "closed", "clients": MOST, "render": "none", "graph": graph}
    return compared(rows, "images_per_s", server, others, **most)


def markdown(rows: Sequence[Row]) -> str:
    tables = (
        _goals_table(rows),
        _load_table(rows),
        _scaling_table(rows),
        _trace_table(rows),
        _swap_table(rows),
        _anomalib_table(rows),
    )
    return "\n".join(table for table in tables if table)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    if not body:
        return ""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _goals_table(rows: Sequence[Row]) -> str:
    """All goals, as soon as there is anything to judge them by."""
    body = [
        [
            goal.name,
            goal.wanted,
            *(
                [goal.found.text(goal.unit), "yes" if goal.met else "**no**"]
                if goal.found
                else ["not measured", ""]
            ),
        ]
        for goal in (goals(rows) if rows else [])
    ]
    return _table(["goal", "wanted", "found", "met"], body)


def _load_table(rows: Sequence[Row]) -> str:
    """Medians over rounds; open loops come after the closed ones that set their rate."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["part"] == "load":
            key = (row["graph"], row["render"], row["loop"], row["clients"], row["server"])
            cells.setdefault(key, []).append(row)
    body = [
        [
            f"{graph}, {render}",
            f"{clients} clients" if loop == "closed" else "70 %, Poisson",
            server,
            *(_figure(found, key) for key in LATENCIES),
            _figure(found, "late_ms") if loop == "open" else "",
            *(_figure(found, key) for key in COSTS),
            str(sum(sum(row["errors"].values()) for row in found)),
            f"`{found[0]['command']}`",
        ]
        for (graph, render, loop, clients, server), found in sorted(
            cells.items(), key=lambda cell: cell[0][:4]
        )
    ]
    head = ["graph, render", "load", "server", "images/s", "p50 ms", "p95 ms", "p99 ms"]
    head += ["sent late, ms", "generator, cores", "server, cores", "server, MB", "errors", "again"]
    return _table(head, body)


def _figure(rows: Sequence[Row], key: str) -> str:
    """The median: of a p99 where all have one, of anything else of those that do."""
    there = [row for row in rows if row.get(key) is not None]
    median = _of_all(rows if key == "p99_ms" else there, key)
    return "" if median is None else f"{median:.3g}"


def _of_all(rows: Sequence[Row], key: str) -> float | None:
    """The median, where all have one: those that lack a p99 had fewer answers, not by chance."""
    values = [row[key] for row in rows]
    return statistics.median(values) if values and None not in values else None


def _scaling_table(rows: Sequence[Row]) -> str:
    body = [
        [
            f"{part} {row[parameter]}",
            *(_figure([row], key) for key in ("images_per_s", "p50_ms", "p99_ms", "server_mb")),
            f"`{row['command']}`",
        ]
        for part, parameter in SCALED.items()
        for row in rows
        if row["part"] == part
    ]
    return _table(["ours", "images/s", "p50 ms", "p99 ms", "server, MB", "again"], body)


def _trace_table(rows: Sequence[Row]) -> str:
    """Medians over rounds."""
    measured = [row for row in rows if row["part"] == "trace"]
    body = [
        [
            graph,
            server,
            *(
                _figure(found, key)
                for key in ("images_per_s", "p50_ms", "p99_ms", "core_ms", *COSTS)
            ),
            f"`{found[0]['command']}`",
        ]
        for graph, there in _grouped(measured, "graph").items()
        for server, found in _grouped(there, "server").items()
    ]
    head = ["graph", "server", "images/s", "p50 ms", "p99 ms", "server, ms of a core an image"]
    head += ["generator, cores", "server, cores", "server, MB", "again"]
    return _table(head, body)


def _swap_table(rows: Sequence[Row]) -> str:
    body = [
        [
            f"{row['graph']}, round {row['round']}",
            str(row["swaps"]),
            *(_figure([row], key) for key in (*LATENCIES, "server_mb")),
            str(sum(row["errors"].values())),
            f"`{row['command']}`",
        ]
        for row in rows
        if row["part"] == "swap"
    ]
    head = ["versions swapped", "swaps", "images/s", "p50 ms", "p95 ms", "p99 ms", "server, MB"]
    return _table([*head, "errors", "again"], body)


def _anomalib_table(rows: Sequence[Row]) -> str:
    body = [
        [
            row["server"],
            str(row["clients"]),
            *(_figure([row], key) for key in ("images_per_s", "p50_ms")),
        ]
        for row in rows
        if row["part"] == "anomalib"
    ]
    return _table(["reverse distillation, resnet18", "at once", "images/s", "p50 ms"], body)


def plots(rows: Sequence[Row]) -> dict[str, str]:
    """SVG by file name, of every part and graph that was measured."""
    drawn = {}
    closed = [r for r in rows if r["part"] == "load" and (r["loop"], r["render"]) == CLOSED_PLAIN]
    for graph, found in _grouped(closed, "graph").items():
        title = f"{graph}, 512 x 512 JPEG in, JSON without heatmap out"
        drawn[f"clients-{graph}.svg"] = _drawn(title, "clients", "clients", found)
    for part, found in _grouped(rows, "part").items():
        if part in PLOTTED:
            title, label = PLOTTED[part]
            drawn[f"{part}.svg"] = _drawn(title, label, SCALED[part], found)
    return drawn


def _drawn(title: str, label: str, parameter: str, rows: Sequence[Row]) -> str:
    """With their p99, or the p95 where no point has one."""
    for latency in ("p99", "p95"):
        series = {
            name: _points(mine, parameter, f"{latency}_ms")
            for name, mine in _grouped(rows, "server").items()
        }
        if any(point[2] is not None for points in series.values() for point in points):
            break
    return charts.lines(title, label, series, latency)


def _grouped(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _points(rows: Sequence[Row], parameter: str, latency: str) -> list[charts.Point]:
    """Medians over rounds, where something was answered; the latency where all have one."""
    return [
        (
            place,
            statistics.median(row["images_per_s"] for row in there),
            _of_all(there, latency),
        )
        for place, there in _grouped(rows, parameter).items()
        if all(row["answered"] for row in there)
    ]


def write(folder: Path, rows: Sequence[Row]) -> None:
    about = {"hardware": hardware(), "date": str(date.today())}
    record = {**about, "rows": rows}
    files.write_json(folder / "rows.json", record, "--out")
    text = f"{hardware()}; {date.today()}. Medians over rounds.\n\n{markdown(rows)}"
    files.write_text(folder / "table.md", text, "--out")
    for name, drawn in plots(rows).items():
        files.write_text(folder / name, drawn, "--out")


def hardware() -> str:
    return f"{cores.available()} cores of {processor()}"
