"""Rows of `bench.serving` -> goals beside what was found, tables and plots.

A ratio is formed within a round, from rows that differ in nothing but the server; told are the
median over rounds, the least and the most.
"""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from bench import charts
from bench.servers import PEERS
from training import files

Row = dict[str, Any]
MOST = 32  # clients
EVERY = (1, 4, 8, MOST)


@dataclass(frozen=True)
class Found:
    """A figure in each round."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, unit: str = "") -> str:
        spread = f" ({min(self.values):.3g} to {max(self.values):.3g})"
        return f"{self.median:.3g}{unit}" + (spread if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Goal:
    name: str
    limit: float
    at_least: bool  # or at most
    found: Found | None  # None: not measured
    unit: str = ""

    @property
    def met(self) -> bool:
        assert self.found
        return (self.found.median >= self.limit) == self.at_least or (
            self.found.median == self.limit
        )


def brief(row: Row) -> str:
    """A row as one line for who waits."""
    cell = [str(row[key]) for key in ("part", "server", "graph", "render", "loop") if key in row]
    for key in ("round", "clients", "side", "batch", "models"):
        cell += [f"{key} {row[key]}"] if key in row else []
    said = []
    if "images_per_s" in row:
        said.append(f"{row['images_per_s']:.1f} images/s")
    if row.get("p50_ms") is not None:
        said.append(f"p50 {row['p50_ms']:.1f}, p99 {row['p99_ms']:.1f} ms")
    if row.get("errors"):
        said.append(f"errors {row['errors']}")
    if "ready_s" in row:
        said.append(f"ready after {row['ready_s']:.1f} s")
    if "resident_mb" in row:
        said.append(" ".join(f"{mb:.0f}" for mb in row["resident_mb"]) + f" MB; {row['statuses']}")
    return f"{' '.join(cell)}: {', '.join(said)}"


def by_round(rows: Sequence[Row], part: str, value: str, **cell: Any) -> dict[int, float]:
    """A value of the rows with this cell, by round; none where nothing was answered."""
    wanted = {"part": part, **cell}.items()
    return {
        row["round"]: row[value] for row in rows if wanted <= row.items() and row[value] is not None
    }


def compared(
    rows: Sequence[Row],
    value: str,
    server: str,
    others: Sequence[str],
    of: Callable[[float, float], float] = lambda ours, theirs: ours / theirs,
    best: Callable[..., float] = max,
    **cell: Any,
) -> Found | None:
    """Ours against the best of the others, in every round that has both."""
    mine = by_round(rows, "load", value, server=server, **cell)
    theirs = [by_round(rows, "load", value, server=other, **cell) for other in others]
    found = []
    for number, ours in mine.items():
        there = [each[number] for each in theirs if number in each]
        if there:
            found.append(of(ours, best(there)))
    return Found(found) if found else None


def worst_p99(rows: Sequence[Row], server: str, graph: str) -> Found | None:
    """Our p99 over the lowest of the peers', at the load where that is highest."""
    loads: list[Row] = [{"loop": "closed", "clients": n} for n in EVERY] + [{"loop": "open"}]
    found = [
        compared(rows, "p99_ms", server, PEERS, best=min, graph=graph, render=render, **each)
        for each in loads
        for render in ("none", "heatmap")
    ]
    measured = [each for each in found if each]
    return max(measured, key=lambda each: each.median) if measured else None


def goals(rows: Sequence[Row]) -> list[Goal]:
    """All of them; what the rows don't hold has no figure."""
    most: Row = {"loop": "closed", "clients": MOST, "render": "none"}
    alone: Row = {"loop": "closed", "clients": 1, "render": "none"}
    same = "ours-cpu" if any(row["server"] == "ours-cpu" for row in rows) else "ours"

    def throughput(server: str, others: Sequence[str], graph: str) -> Found | None:
        return compared(rows, "images_per_s", server, others, graph=graph, **most)

    listed = []
    for graph in ("light", "resnet18"):
        listed += [
            Goal(
                f"{graph}: images/s over the bare engine's, {MOST} clients",
                *(0.95, True),
                throughput("ours", ["engine"], graph),
            ),
            Goal(
                f"{graph}: one client's p50 beyond the engine's",
                *(3.0, False),
                compared(
                    rows,
                    "p50_ms",
                    "ours",
                    ["engine"],
                    lambda ours, engine: ours - engine,
                    graph=graph,
                    **alone,
                ),
                " ms",
            ),
        ]
    listed += [
        Goal(
            f"light: images/s over the best peer's, {MOST} clients",
            *(1.5, True),
            throughput("ours", PEERS, "light"),
        ),
        Goal(
            f"resnet18: the same, our device the peers' provider, {MOST} clients",
            *(1.0, True),
            throughput(same, PEERS, "resnet18"),
        ),
        Goal(
            f"resnet18: the same, our device as it chooses, {MOST} clients",
            *(2.0, True),
            throughput("ours", PEERS, "resnet18"),
        ),
        Goal(
            "light: p99 over the best peer's, worst load",
            *(1.0, False),
            worst_p99(rows, "ours", "light"),
        ),
        Goal(
            "resnet18: p99 over the best peer's, worst load",
            *(1.0, False),
            worst_p99(rows, same, "resnet18"),
        ),
    ]
    starts = by_round(rows, "start", "ready_s", server="ours", graph="resnet18")
    listed.append(
        Goal(
            "start to first answer, demo bundle",
            *(5.0, False),
            Found([*starts.values()]) if starts else None,
            " s",
        )
    )
    memory = [row["resident_mb"] for row in rows if row["part"] == "memory"]
    listed.append(
        Goal(
            "resident memory after 10,000 over that after 1,000 mixed requests",
            *(1.05, False),
            Found([resident[-1] / resident[0] for resident in memory]) if memory else None,
        )
    )
    return listed


def markdown(rows: Sequence[Row]) -> str:
    return "\n".join(
        [_goals_table(rows), _load_table(rows), _scaling_table(rows), _anomalib_table(rows)]
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    if not body:
        return ""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _goals_table(rows: Sequence[Row]) -> str:
    body = [
        [
            goal.name,
            f"{'>=' if goal.at_least else '<='} {goal.limit:g}{goal.unit}",
            goal.found.text(goal.unit),
            "yes" if goal.met else "**no**",
        ]
        for goal in goals(rows)
        if goal.found
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
            *(_figure(found, key) for key in FIGURES),
            str(sum(sum(row["errors"].values()) for row in found)),
            f"`{found[0]['command']}`",
        ]
        for (graph, render, loop, clients, server), found in sorted(
            cells.items(), key=lambda item: (item[0][:4], item[0][4] not in ("ours", "ours-cpu"))
        )
    ]
    head = ["graph, render", "load", "server", "images/s", "p50 ms", "p95 ms", "p99 ms"]
    head += ["generator, cores", "server, cores", "server, MB", "errors", "again"]
    return _table(head, body)


FIGURES = (
    *("images_per_s", "p50_ms", "p95_ms", "p99_ms"),
    *("load_cores", "server_cores", "server_mb"),
)


def _figure(rows: Sequence[Row], key: str) -> str:
    """The median of those that have one."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{statistics.median(values):.3g}" if values else ""


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


SCALED = {"size": "side", "batch": "batch", "models": "models"}


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
    """SVG by file name, of what was measured at more than one place."""
    drawn = {}
    for graph in ("light", "resnet18", "wide-resnet50"):
        series: dict[str, dict[float, list[Row]]] = {}
        for row in rows:
            wanted = row["part"] == "load" and row["loop"] == "closed" and row["render"] == "none"
            if wanted and row["graph"] == graph:
                series.setdefault(row["server"], {}).setdefault(row["clients"], []).append(row)
        if series:
            title = f"{graph}, {SIDE_TEXT}"
            drawn[f"clients-{graph}.svg"] = charts.lines(title, "clients", _points(series))
    for part, (title, label) in PLOTTED.items():
        found: dict[float, list[Row]] = {}
        for row in rows:
            if row["part"] == part:
                found.setdefault(row[SCALED[part]], []).append(row)
        if found:
            drawn[f"{part}.svg"] = charts.lines(title, label, _points({"ours": found}))
    return drawn


SIDE_TEXT = "512 x 512 JPEG in, JSON without heatmap out"
PLOTTED = {
    "size": ("light graph, 8 clients, square JPEGs", "side of the picture, pixels"),
    "batch": ("resnet18, 32 clients", "largest batch"),
    "models": ("resnet18, 8 clients over all models in turn", "models loaded"),
}


def _points(series: dict[str, dict[float, list[Row]]]) -> dict[str, list[charts.Point]]:
    """Medians over rounds, where something was answered."""
    return {
        name: [
            (
                x,
                statistics.median(row["images_per_s"] for row in rows),
                statistics.median(row["p99_ms"] for row in rows),
            )
            for x, rows in of.items()
            if all(row["p99_ms"] is not None for row in rows)
        ]
        for name, of in series.items()
    }


def write(folder: Path, rows: Sequence[Row]) -> None:
    about = {"hardware": hardware(), "date": str(date.today())}
    record = {**about, "rows": rows}
    files.write_text(folder / "rows.json", json.dumps(record, indent=1) + "\n", "--out")
    text = f"{hardware()}; {date.today()}. Medians over rounds.\n\n{markdown(rows)}"
    files.write_text(folder / "table.md", text, "--out")
    for name, drawn in plots(rows).items():
        files.write_text(folder / name, drawn, "--out")


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{len(os.sched_getaffinity(0))} cores of {name}"
