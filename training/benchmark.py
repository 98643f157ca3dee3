"""Many runs, one evaluator, no test leakage: data × settings × seeds -> rows -> tables.

A plan is a list of grids, each a value list per setting; every combination is trained to its last
epoch, exported and evaluated. A row is appended as its run ends, and a row that is there is not
run again, so a benchmark that was killed goes on where it stopped. The same command started twice
shares the runs out.
"""

import contextlib
import csv
import fcntl
import io
import itertools
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.bundle import Bundle
from service.detector import Detector
from service.image import digest
from training import data
from training.checkpoint import Checkpoint
from training.datasets import categories
from training.evaluate import Report, evaluate
from training.export import export
from training.settings import ARCHITECTURES, Settings
from training.train import train
from training.validation import Validation, validate

log = logging.getLogger(__name__)

Grid = dict[str, list[Any]]  # a setting's name -> its values
Row = dict[str, Any]

# Settings that say nothing about a run's result.
IDLE = ("name", "models", "save_every", "strict", "feature_cache", "feature_memory_gb")
# Settings that make a method; one that differs from its architecture's is part of its name.
METHOD = (
    *("skips", "bottleneck", "loss", "consistency_rate", "pseudo_anomalies", "refinement"),
    *("batch_size", "lr", "weight_decay"),
)

METRICS = {  # column -> heading
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "f1_max": "F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO@0.3",
    "aupro_005": "AUPRO@0.05",
    "pro_per_image": "PRO per image",
    "false_positive_rate": "false positives",
    "detection_rate": "detected",
    "drawn_auroc": "drawn defects, image AUROC",
    "drawn_aupro": "drawn defects, AUPRO@0.3",
    "images_per_s": "trained images/s",
    "seconds": "training s",
}


def benchmark(grids: list[Grid], out: Path, *, keep: bool = False) -> str:
    """Run what of the plan has no row in `out` yet; write and return the Markdown table.

    `keep` leaves checkpoints and bundles in `out/models`. Raises TrainingError for bad data.
    """
    out.mkdir(parents=True, exist_ok=True)
    planned = list(runs(grids, out / "models"))
    for number, settings in enumerate(planned, 1):
        with _claimed(out, settings) as free:
            if not free or settings.name in {row["id"] for row in read_rows(out)}:
                continue
            log.info(
                "run %d of %d: %s on %s", number, len(planned), method(settings), place(settings)
            )
            row = _run(settings)
            if row is None:  # interrupted
                raise KeyboardInterrupt
            _append(out, row)
            if not keep:
                shutil.rmtree(Path(settings.models) / settings.name)
        _write_tables(out)
    return _write_tables(out)


def runs(grids: list[Grid], models: Path) -> Iterator[Settings]:
    """Every combination once; its name is a digest of all that can change its result."""
    defaults = asdict(Settings(data="", name=""))
    seen = set()
    for chosen in _combinations(grids):
        preset = ARCHITECTURES[chosen.get("architecture", Settings.architecture)]
        settings = preset | chosen
        # Without defaults, so that rows stay valid when a later version adds a setting.
        telling = {
            key: value
            for key, value in settings.items()
            if key not in IDLE and value != defaults[key]
        }
        text = json.dumps(telling, sort_keys=True)
        name = f"run-{digest(text.encode())[:12]}"
        if name not in seen:
            seen.add(name)
            yield Settings(**settings | {"name": name, "models": str(models)})


def _combinations(grids: list[Grid]) -> Iterator[dict[str, Any]]:
    for grid in grids:
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            if chosen.get("category") != "all":
                yield chosen
                continue
            for category in categories(Path(chosen["data"]), chosen.get("layout", "auto")):
                yield chosen | {"category": category}


@contextlib.contextmanager
def _claimed(out: Path, settings: Settings) -> Iterator[bool]:
    """False where another process is at this run; a kill gives it free."""
    (out / "locks").mkdir(exist_ok=True)
    with (out / "locks" / settings.name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _run(settings: Settings) -> Row | None:
    """Train, or go on with it; export, evaluate; None where training was interrupted."""
    started = (settings.folder / "checkpoint.json").exists()
    run = train(settings, resume=started)
    if not run.finished:
        return None
    models, root = Path(settings.models), Path(settings.data)
    shutil.rmtree(models / settings.name / "1", ignore_errors=True)  # of an interrupted export
    bundle = export(models, settings.name, version=1)
    report = evaluate(bundle.folder, root, device="cpu")
    return _row(run, report, _validate(bundle, root))


def _validate(bundle: Bundle, root: Path) -> Validation:
    """What a recipe may be chosen by: defects drawn on the held-out normal images."""
    size = bundle.manifest.image_size
    paths = [root / image.file for image in bundle.manifest.data.held_out]
    normals = data.load(paths, size, strict=True, what="held-out images").pixels
    return validate(Detector(bundle.read_graph(), size, "cpu"), normals)


def _row(run: Checkpoint, report: Report, validation: Validation) -> Row:
    settings = {k: v for k, v in asdict(run.settings).items() if k not in IDLE}
    detected = [kind.detected for kind in report.kinds.values()]
    pixel = report.pixel
    return {
        "id": run.settings.name,
        "data": place(run.settings),
        "method": method(run.settings),
        "image_auroc": report.image.auroc,
        "image_ap": report.image.average_precision,
        "f1_max": report.image.f1_max,
        "pixel_auroc": pixel.auroc if pixel else None,
        "pixel_ap": pixel.average_precision if pixel else None,
        "aupro": pixel.aupro if pixel else None,
        "aupro_005": pixel.aupro_005 if pixel else None,
        "pro_per_image": pixel.pro_per_image if pixel else None,
        "false_positive_rate": report.false_positives.rate,
        "detection_rate": sum(d.count for d in detected) / sum(d.total for d in detected),
        "drawn_auroc": validation.auroc,
        "drawn_aupro": validation.aupro,
        "promised_rate": report.target_fpr,
        "trained": len(run.trained),
        "held_out": len(run.held_out),
        "loss": run.losses[-1],
        "seconds": run.seconds,
        "images_per_s": run.step * len(run.trained) / run.steps_per_epoch / run.seconds,
        "settings": settings,
        "teacher": run.teacher.sha256,
        "data_fingerprint": run.data_fingerprint,
        "scores": report.scores,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "software": software(),
    }


def place(settings: Settings) -> str:
    """How tables call the data of a run."""
    return settings.category or Path(settings.data).name


def method(settings: Settings) -> str:
    """Its architecture, and in what a run departs from it."""
    preset = {f.name: f.default for f in fields(Settings)} | ARCHITECTURES[settings.architecture]
    departures = [
        f"{name.replace('_', ' ')} {_plain(getattr(settings, name))}"
        for name in METHOD
        if getattr(settings, name) != preset[name]
    ]
    return ", ".join([settings.architecture, *departures])


def setup(settings: dict[str, Any]) -> str:
    """The rest of a run's settings that tables tell apart."""
    height, width = settings["image_size"]
    return (
        f"{settings['backbone']}, {height}×{width}, {settings['epochs']} epochs, "
        f"{settings['precision']}, embedding of {settings['embedding_planes']} planes"
    )


def _plain(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"


def hardware() -> str:
    """The processor or GPU that trains, and how many cores this process may use."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                return f"{name}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def software() -> str:
    """Version, and commit where there is one, of this project; torch's."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        return f"{commit}, torch {torch.__version__}"
    return f"skrd4ad {metadata.version('skrd4ad')}, torch {torch.__version__}"


def read_rows(out: Path) -> list[Row]:
    """The rows so far, in the order in which they ended."""
    try:
        lines = (out / "rows.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last one, torn by a kill
            rows.append(json.loads(line))
    return rows


def _append(out: Path, row: Row) -> None:
    with (out / "rows.jsonl").open("a") as file:
        # On a line of its own, whatever a kill left of the one before.
        file.write(("\n" if file.tell() else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_tables(out: Path) -> str:
    """Write table.csv and table.md from all rows; the Markdown."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in read_rows(out):
        key = row["data"], setup(row["settings"]), row["method"]
        groups.setdefault(key, []).append(row)
    (out / "table.csv").write_text(_csv(groups))
    markdown = _markdown(groups)
    (out / "table.md").write_text(markdown)
    return markdown


def _csv(groups: dict[tuple[str, str, str], list[Row]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors = [f"{name}_standard_error" for name in METRICS]
    writer.writerow(["data", "setup", "method", "seeds", *METRICS, *errors])
    for (where, told, name), rows in sorted(groups.items()):
        found = [_mean(rows, column) for column in METRICS]
        means, deviations = zip(*found, strict=True)
        writer.writerow([where, told, name, len(rows), *means, *deviations])
    return text.getvalue()


def _markdown(groups: dict[tuple[str, str, str], list[Row]]) -> str:
    lines = []
    tables: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for (where, told, name), rows in groups.items():
        tables.setdefault((where, told), {})[name] = rows
    for (where, told), methods in sorted(tables.items()):
        first = next(iter(methods.values()))[0]
        lines += [
            f"### {where}",
            "",
            f"{told}; {first['trained']} normal images trained on, {first['held_out']} held out, "
            f"{first['promised_rate']:.3g} false positives promised.",
            "",
            *_table({name: [rows] for name, rows in methods.items()}),
        ]
    if len(tables) > 1:
        shared = set.intersection(*(set(methods) for methods in tables.values()))
        names = [name for name in next(iter(tables.values())) if name in shared]
        means = {name: [methods[name] for methods in tables.values()] for name in names}
        lines += [f"### Mean of the {len(tables)} tables", "", *_table(means)] if means else []
    rows = [row for group in groups.values() for row in group]
    lines += _published({row["data"] for row in rows})
    lines += [
        "Mean over seeds ± its standard error; the last epoch of every run, nothing selected.",
        *(
            f"{what.capitalize()}: {'; '.join(sorted({row[what] for row in rows}))}."
            for what in ("hardware", "software")
        ),
        "",
    ]
    return "\n".join(lines)


def _table(methods: dict[str, list[list[Row]]]) -> list[str]:
    """A line a method: over its rows, or the mean over several tables' rows."""
    lines = ["| method | seeds | " + " | ".join(METRICS.values()) + " |"]
    lines.append("|---|---|" + "---|" * len(METRICS))
    for name, tables in methods.items():
        cells = []
        for column in METRICS:
            means, errors = zip(*(_mean(rows, column) for rows in tables), strict=True)
            if None in means:
                cells.append("")
                continue
            error = None if None in errors else float(np.linalg.norm(errors)) / len(tables)
            cells.append(_cell(float(np.mean(means)), error))
        seeds = "/".join(str(n) for n in sorted({len(rows) for rows in tables}))
        lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _published(places: set[str]) -> list[str]:
    """What others report of the same categories, and of their data sets' means."""
    with (Path(__file__).parent / "published.csv").open() as file:
        figures = list(csv.DictReader(file))
    known = {f["data_set"] for f in figures if f["category"] in places or f["data_set"] in places}
    chosen = [f for f in figures if f["data_set"] in known and f["category"] in places | {"mean"}]
    if not chosen:
        return []
    return [
        "### Published",
        "",
        "Under other protocols, so beside the tables above, not in them.",
        "",
        "| data | method | image AUROC | pixel AUROC | AUPRO | protocol | source |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {f['data_set']} {f['category']} | {f['method']} | {f['image_auroc']} | "
            f"{f['pixel_auroc']} | {f['aupro']} | {f['protocol']} | {f['source']} |"
            for f in chosen
        ),
        "",
    ]


def _mean(rows: list[Row], column: str) -> tuple[float | None, float | None]:
    """Mean over rows and its standard error, each None where it is not known."""
    values = [row[column] for row in rows if row.get(column) is not None]
    if not values:
        return None, None
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error


def _cell(mean: float, error: float | None) -> str:
    digits = 3 if abs(mean) < 2 else 1
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
