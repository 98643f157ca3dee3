"""Many runs, one evaluator, no test leakage: data × settings × seeds -> rows -> tables.

A plan is a list of grids, each a value list per setting; every combination is trained to its last
epoch, exported and evaluated. A row is appended as its run ends, and a row that is there is not
run again, so a benchmark that was killed goes on where it stopped. The same command started twice
shares the runs out.
"""

import contextlib
import csv
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
from service.errors import ServiceError
from service.image import digest
from training import data, datasets, files
from training.checkpoint import Checkpoint
from training.errors import TrainingError
from training.evaluate import Report, evaluate
from training.export import export
from training.settings import ARCHITECTURES, Settings
from training.train import choose_device, stop_on_signal, train
from training.validation import Validation, validate

log = logging.getLogger(__name__)

Grid = dict[str, list[Any]]  # a setting's name -> its values
Row = dict[str, Any]

# Settings that say nothing about a run's result.
IDLE = ("name", "models", "save_every", "strict", "feature_cache", "feature_memory_gb")
# Settings that make a method; one that differs from its architecture's is part of its name.
METHOD = (
    *("skips", "bottleneck", "loss", "consistency_rate", "pseudo_anomalies", "refinement"),
    *("batch_size", "lr", "schedule", "weight_decay"),
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

    `keep` leaves checkpoints and bundles in `out/models`. Raises TrainingError for data that can't
    be trained or evaluated on and for weights that aren't there, before anything is run; and at the
    end, naming them, for runs that failed.
    """
    planned = list(runs(grids, out / "models"))
    for where in {(s.data, s.layout, s.category) for s in planned}:
        pictures = datasets.read(Path(where[0]), *where[1:])
        pictures.to_train_on(), pictures.to_test_on()
    for weights in {s.teacher_weights for s in planned} - {"hub"}:
        if not Path(weights).is_file():
            raise TrainingError(f"teacher weights {weights}: no such file")
    locks = out / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    code, failed = software(), {}
    for number, settings in enumerate(planned, 1):
        (locks / settings.name).touch()
        with files.claimed(locks / settings.name) as free:
            if not free or settings.name in {row["id"] for row in read_rows(out)}:
                continue
            told = f"{method(settings)} on {place(settings)}, seed {settings.seed}"
            log.info("run %d of %d: %s", number, len(planned), told)
            try:
                row = _run(settings)
            except (TrainingError, ServiceError, torch.OutOfMemoryError) as error:
                log.error("%s (%s) failed: %s", told, settings.name, error)
                failed[told] = str(error)
                continue
            _append(out, row | {"software": code})
            if not keep:
                shutil.rmtree(Path(settings.models) / settings.name)
        _write_tables(out)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(planned)} runs failed: "
            + "; ".join(f"{told}: {error}" for told, error in failed.items())
        )
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
            chosen["data"] = os.path.normpath(chosen["data"])  # one folder, one name
            if chosen.get("category") != "all":
                yield chosen
                continue
            for category in datasets.categories(Path(chosen["data"]), chosen.get("layout", "auto")):
                yield chosen | {"category": category}


def _run(settings: Settings) -> Row:
    """Train, or go on with it; export, evaluate. KeyboardInterrupt where it was interrupted."""
    started = (settings.folder / "checkpoint.json").exists()
    with stop_on_signal() as stop:
        run = train(settings, resume=started, stop=stop)
    if stop.is_set():
        raise KeyboardInterrupt  # saved, and perhaps finished: there is more to do either way
    models, root = Path(settings.models), Path(settings.data)
    shutil.rmtree(models / settings.name / "1", ignore_errors=True)  # of an interrupted export
    bundle = export(models, settings.name, version=1)
    report = evaluate(bundle.folder, root, device="cpu")
    return _row(run, settings, report, _validate(bundle, root))


def _validate(bundle: Bundle, root: Path) -> Validation:
    """What a recipe may be chosen by: defects drawn on the held-out normal images."""
    size = bundle.manifest.image_size
    paths = [root / image.file for image in bundle.manifest.data.held_out]
    normals = data.load(paths, size, strict=True, what="held-out images").pixels
    return validate(Detector(bundle.read_graph(), size, "cpu"), normals)


def _row(run: Checkpoint, planned: Settings, report: Report, validation: Validation) -> Row:
    settings = {k: v for k, v in asdict(run.settings).items() if k not in IDLE}
    pixel, decisions = report.pixel, report.decisions
    assert decisions  # an exported bundle has its own threshold
    return {
        "id": run.settings.name,
        "data": place(planned),
        "method": method(run.settings),
        "image_auroc": report.image.auroc,
        "image_ap": report.image.average_precision,
        "f1_max": report.image.f1_max,
        "pixel_auroc": pixel.auroc if pixel else None,
        "pixel_ap": pixel.average_precision if pixel else None,
        "aupro": pixel.aupro if pixel else None,
        "aupro_005": pixel.aupro_005 if pixel else None,
        "pro_per_image": pixel.pro_per_image if pixel else None,
        "false_positive_rate": decisions.false_positives.rate,
        "detection_rate": decisions.detected.rate,
        "drawn_auroc": validation.auroc,
        "drawn_aupro": validation.aupro,
        "drawn_kinds": validation.kinds,
        "promised_rate": decisions.target_fpr,
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
        "hardware": hardware(choose_device(run.settings.device)),
    }


def place(settings: Settings) -> str:
    """How tables call the data of a run."""
    name = settings.category or Path(settings.data).name
    return name if settings.layout == "auto" else f"{name} ({settings.layout})"


def method(settings: Settings) -> str:
    """Its architecture, and in what a run departs from it."""
    preset = {f.name: f.default for f in fields(Settings)} | ARCHITECTURES[settings.architecture]
    departures = [
        f"{name.replace('_', ' ')} {_plain(getattr(settings, name))}"
        for name in METHOD
        if getattr(settings, name) != preset[name]
    ]
    return ", ".join([settings.architecture, *departures])


def setup(row: Row) -> str:
    """The rest of what tells a run's results apart, its seed aside."""
    settings = row["settings"]
    height, width = settings["image_size"]
    told = [
        f"{settings['backbone']} (weights {row['teacher'][:8]})",
        f"{height}×{width}",
        f"{settings['epochs']} epochs",
        settings["precision"],
        f"embedding of {settings['embedding_planes']} planes",
        f"data {row['data_fingerprint'][:8]}",
    ]
    if settings.get("group"):
        told.append(f"grouped by {settings['group']}")
    if settings["device"] != "auto":
        told.append(f"on {settings['device']}")
    return ", ".join(told)


def _plain(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"


def hardware(device: torch.device) -> str:
    """The GPU or processor that trains, and how many threads it does."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's own name where Linux tells it, else its architecture's."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    return name


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
    with (out / "rows.jsonl").open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"  # by a kill: the row begins on a line of its own
        file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write_tables(out: Path) -> str:
    """Write table.csv and table.md from all rows; the Markdown."""
    seeds: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in read_rows(out):
        # A seed counts once, the latest: a path that is spelled in two ways makes two runs of it.
        key = row["data"], setup(row), row["method"]
        seeds.setdefault(key, {})[row["settings"]["seed"]] = row
    groups = {key: list(rows.values()) for key, rows in seeds.items()}
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
        rows = [row for some in methods.values() for row in some]
        lines += [f"### {where}", "", f"{told}; {_split(rows)}.", ""]
        lines += _table({name: [rows] for name, rows in methods.items()})
    # A mean over data is of one table each.
    if 1 < len(tables) == len({where for where, _ in tables}):
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


def _split(rows: list[Row]) -> str:
    """How many pictures runs had; where pictures are grouped, seeds differ a little."""
    trained, held_out, promised = (
        f"{min(values):.3g}" + (f" to {max(values):.3g}" if max(values) > min(values) else "")
        for values in ([row[k] for row in rows] for k in ("trained", "held_out", "promised_rate"))
    )
    return (
        f"{trained} normal images trained on, {held_out} held out, {promised} false positives "
        "promised"
    )


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
