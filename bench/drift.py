"""Drift: how rare false alarms are, and how soon changed pictures are noticed.

    python -m bench.drift --bundle models/my-part/1 --data my-part [--out bench/results/drift]

Normal pictures that the bundle was not trained on are scored as they are, and changed at their own
size: by a brighter or darker lamp, a blur, a new lamp. All go through the service's decoding and
graph. Streams are then drawn from these scores, and so are calibrations, all with replacement: what
is simulated is a line whose pictures are those of the folder in any order, again and again.
Calibrating on one half of the folder and drawing from the other would be no line without a change:
two halves of few pictures differ, and a long stream finds that out.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from service import image
from service.bundle import Bundle
from service.calibration import Calibration, default_target_fpr
from service.cores import available
from service.detector import Detector
from service.drift import RUN_LENGTH, DriftTest, ShiryaevRoberts
from training import datasets, files
from training.benchmark import hardware
from training.errors import TrainingError
from training.progress import progress

SAMPLES = (50, 200, 1000)  # of a calibration
BEFORE = (0, 1000)  # images until the change
AFTER = 2000  # images in which it may be noticed
SHORT = 1000  # a run length that is short enough to wait for its end
LONGEST = 20  # run lengths that are waited for
BATCH = 8

Change = Callable[[np.ndarray], np.ndarray]  # of RGB uint8 (H, W, 3)


def lamp(gains: Sequence[float], pixels: np.ndarray) -> np.ndarray:
    """Light of another strength or colour: gains of red, green and blue."""
    return _levels(pixels * np.array(gains))


def blur(sigma: float, pixels: np.ndarray) -> np.ndarray:
    """Out of focus: Gaussian, in pixels of the picture as it is stored."""
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)


def from_the_side(change: float, pixels: np.ndarray) -> np.ndarray:
    """A lamp that moved: darker on the left by `change`, brighter on the right by as much."""
    gains = np.linspace(1 - change, 1 + change, pixels.shape[1])
    return _levels(pixels * gains[:, None])


def _levels(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(np.rint(pixels).clip(0, 255), np.uint8)


CHANGES: dict[str, Change] = {
    "3 % brighter": partial(lamp, (1.03, 1.03, 1.03)),
    "8 % brighter": partial(lamp, (1.08, 1.08, 1.08)),
    "8 % darker": partial(lamp, (0.92, 0.92, 0.92)),
    "25 % darker": partial(lamp, (0.75, 0.75, 0.75)),
    "blur, sigma 1 pixel": partial(blur, 1.0),
    "blur, sigma 2 pixels": partial(blur, 2.0),
    "new lamp, warmer (red + 5 %, blue - 5 %)": partial(lamp, (1.05, 1.0, 0.95)),
    "new lamp, from the side (- 8 % to + 8 %)": partial(from_the_side, 0.08),
}


@dataclass(frozen=True)
class Scores:
    """Of the same pictures, as they are and changed: (N,) each."""

    unchanged: np.ndarray
    changed: dict[str, np.ndarray]
    fresh: np.ndarray  # those of `unchanged` that the bundle's own calibration does not hold


@dataclass(frozen=True)
class FalseAlarms:
    """Streams without a change."""

    samples: int
    streams: int
    images: int  # of a stream
    alarms: int  # streams with one
    alarms_by_calibration_alone: int  # were scores ranked among the calibration's only
    mean_run_length: float  # until an alarm at a run length of SHORT
    standard_error: float


@dataclass(frozen=True)
class Delays:
    """Streams with a change, of those without an alarm before it."""

    change: str
    samples: int
    before: int
    streams: int
    shift: float  # of the mean score, in standard deviations
    normal: float  # share that is still decided normal
    median: float | None  # images inspected after the change; None: later than AFTER
    most: float | None  # in which nine of ten streams notice it
    unnoticed: float  # share of streams, within AFTER images


@dataclass(frozen=True)
class Comparison:
    """Two statistics on the same p-values: median images that enter, with the least and most.

    None: later than AFTER.
    """

    change: str
    mixture: tuple[float | None, ...]
    jumper: tuple[float | None, ...]


class SimpleJumper:
    """Shiryaev and Roberts' statistic of the Simple Jumper, to compare with.

    The martingale of Vovk et al., Retrain or not retrain, COPA 2021: bets 1 + e (p - 1/2) for e of
    -1, 0 and 1, a hundredth of the capital jumping at each step.
    """

    _bets, _jumping = np.array([-1.0, 0.0, 1.0]), 0.01

    def __init__(self) -> None:
        self.statistic = 0.0
        self._capital = np.full(3, 1 / 3)  # of a sum of 1: only its growth matters

    def update(self, p_value: float) -> None:
        moved = (1 - self._jumping) * self._capital + self._jumping / 3
        grown = moved * (1 + self._bets * (p_value - 0.5))
        growth = float(grown.sum())
        self._capital = grown / growth
        self.statistic = (self.statistic + 1) * growth


def pictures(bundle: Bundle, folders: Sequence[Path]) -> dict[Path, bool]:
    """Normal pictures that the bundle was not trained on: whether it calibrates with them.

    Raises TrainingError where a folder holds none.
    """
    trained = set(bundle.manifest.data.trained)
    held_out = {held.sha256 for held in bundle.manifest.data.held_out}
    found: dict[Path, bool] = {}
    for folder in folders:
        read = datasets.read(folder)
        paths = [*read.normal, *(test.path for test in read.tests if not test.anomalous)]
        digests = {path: image.digest(path.read_bytes()) for path in paths}
        new = {
            path: digest in held_out for path, digest in digests.items() if digest not in trained
        }
        if not new:
            raise TrainingError(f"{folder}: holds no normal picture that is new to the bundle")
        found |= new
    return found


def measure(bundle: Bundle, folders: Sequence[Path], most: int | None, threads: int) -> Scores:
    """The score of every picture, or of `most`, as it is and with each of CHANGES."""
    size = bundle.manifest.image_size
    detector = Detector(bundle.read_graph(), size, "cpu", threads)
    held_out = pictures(bundle, folders)
    paths = list(held_out)[:most]
    unchanged = score(detector, paths, lambda pixels: pixels, "as they are")
    return Scores(
        unchanged,
        {name: score(detector, paths, change, name) for name, change in CHANGES.items()},
        unchanged[[not held_out[path] for path in paths]],
    )


def score(detector: Detector, paths: Sequence[Path], change: Change, what: str) -> np.ndarray:
    """Scores (N,) of changed pictures, encoded anew without loss and taken in by the service."""
    starts = range(0, len(paths), BATCH)
    found: list[float] = []
    for start in progress(starts, total=len(starts), description=f"scoring {what}", unit="batch"):
        batch = []
        for path in paths[start : start + BATCH]:
            pixels = np.ascontiguousarray(change(image.read(path))[..., ::-1])
            data = cv2.imencode(".png", pixels)[1].tobytes()
            batch.append(image.decode_to(data, detector.image_size)[0])
        found += [prediction.score for prediction in detector.run(np.stack(batch))]
    return np.array(found)


def false_alarms(
    scores: np.ndarray, samples: int, streams: int, images: int, seed: int
) -> FalseAlarms:
    rng = np.random.default_rng([seed, samples])
    alarms = alone = 0
    lengths = []
    for stream in range(streams):
        calibration = drawn_calibration(rng, scores, samples)
        shown = rng.choice(scores, images)
        alarms += inspect(DriftTest(calibration, str(stream)), calibration, shown) is not None
        alone += by_calibration_alone(calibration, shown, rng)
        lengths.append(run_length(rng, scores, samples, str(stream)))
    error = float(np.std(lengths, ddof=1) / np.sqrt(streams))
    return FalseAlarms(samples, streams, images, alarms, alone, float(np.mean(lengths)), error)


def run_length(rng: np.random.Generator, scores: np.ndarray, samples: int, id: str) -> int:
    """Images that enter until a false alarm at SHORT, of a new calibration."""
    calibration = drawn_calibration(rng, scores, samples)
    test = DriftTest(calibration, id, SHORT)
    for _ in range(LONGEST):
        if inspect(test, calibration, rng.choice(scores, SHORT)) is not None:
            break
    return test.images


def by_calibration_alone(
    calibration: Calibration, scores: np.ndarray, rng: np.random.Generator
) -> bool:
    """Whether an alarm follows where scores are ranked among the calibration's alone."""
    limit = DriftTest(calibration, "").limit
    known = calibration.scores[calibration.scores < limit]
    shown = scores[scores < limit]
    above = len(known) - np.searchsorted(known, shown, side="right")
    equal = len(known) - above - np.searchsorted(known, shown, side="left") + 1
    evidence = ShiryaevRoberts(RUN_LENGTH)
    for p_value in (above + (1 - rng.random(len(shown))) * equal) / (len(known) + 1):
        evidence.update(float(p_value))
        if evidence.statistic >= RUN_LENGTH:
            return True
    return False


def delays(scores: Scores, samples: int, before: int, streams: int, seed: int) -> list[Delays]:
    """Of every change, in the same streams up to it."""
    rng = np.random.default_rng([seed, samples, before])
    noticed: dict[str, list[float]] = {name: [] for name in scores.changed}
    normal: dict[str, list[float]] = {name: [] for name in scores.changed}
    for stream in range(streams):
        calibration = drawn_calibration(rng, scores.unchanged, samples)
        so_far = DriftTest(calibration, str(stream))
        if inspect(so_far, calibration, rng.choice(scores.unchanged, before)) is not None:
            continue
        for name, changed in scores.changed.items():
            test = copy.deepcopy(so_far)
            found = inspect(test, calibration, rng.choice(changed, AFTER))
            noticed[name].append(np.inf if found is None else found)
            normal[name].append(float(np.mean(changed < calibration.threshold)))
    return [
        Delays(
            name,
            samples,
            before,
            len(noticed[name]),
            shift(scores.unchanged, changed),
            float(np.mean(normal[name])),
            _finite(np.quantile(noticed[name], 0.5, method="higher")),
            _finite(np.quantile(noticed[name], 0.9, method="higher")),
            float(np.mean(np.isinf(noticed[name]))),
        )
        for name, changed in scores.changed.items()
    ]


def compare(scores: Scores, samples: int, before: int, streams: int, seed: int) -> list[Comparison]:
    """The statistic beside the Simple Jumper's, at the same run length and p-values."""
    rng = np.random.default_rng([seed, samples, before, 1])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in scores.changed}
    for stream in range(streams):
        calibration = drawn_calibration(rng, scores.unchanged, samples)
        shown = rng.choice(scores.unchanged, before)
        for name, changed in scores.changed.items():
            whole = np.concatenate([shown, rng.choice(changed, AFTER)])
            start = int(np.count_nonzero(shown < DriftTest(calibration, "").limit))
            p_values = list(ranked(calibration, whole, str(stream)))
            both = ShiryaevRoberts(RUN_LENGTH), SimpleJumper()
            mine, theirs = (first_alarm(evidence, p_values) - start for evidence in both)
            if min(mine, theirs) > 0:
                found[name].append((mine, theirs))
    return [
        Comparison(name, _spread([a for a, _ in pairs]), _spread([b for _, b in pairs]))
        for name, pairs in found.items()
    ]


def ranked(calibration: Calibration, scores: np.ndarray, id: str) -> Iterator[float]:
    """The p-values of what enters, as if no alarm ever came."""
    test = DriftTest(calibration, id, sys.float_info.max / 1e6)
    for score in scores[scores < test.limit]:
        test.update(float(score))
        yield test.p_values[-1]


def first_alarm(evidence: ShiryaevRoberts | SimpleJumper, p_values: Sequence[float]) -> float:
    for number, p_value in enumerate(p_values, 1):
        evidence.update(p_value)
        if evidence.statistic >= RUN_LENGTH:
            return number
    return np.inf


def inspect(test: DriftTest, calibration: Calibration, scores: np.ndarray) -> int | None:
    """Images inspected until the alarm; those that are decided normal enter the test."""
    for number in np.flatnonzero(scores < calibration.threshold):
        test.update(float(scores[number]))
        if test.alarm:
            return int(number) + 1
    return None


def drawn_calibration(rng: np.random.Generator, scores: np.ndarray, samples: int) -> Calibration:
    return Calibration("drawn", default_target_fpr(samples), rng.choice(scores, samples))


def shift(unchanged: np.ndarray, changed: np.ndarray) -> float:
    return float((changed.mean() - unchanged.mean()) / unchanged.std())


def own(bundle: Bundle, scores: Scores, seed: int) -> str:
    """What the bundle's own calibration says of new pictures, each shown once."""
    calibration = bundle.default_calibration()
    if calibration is None or not len(scores.fresh):
        return ""
    test = DriftTest(calibration, f"{bundle.name}/{bundle.version}")
    shown = np.random.default_rng(seed).permutation(scores.fresh)
    highest = 0.0
    for score in shown[shown < calibration.threshold]:
        test.update(float(score))
        highest = max(highest, test.statistic)
    return (
        f"With the bundle's own calibration ({calibration.samples} held-out pictures, "
        f"at most {calibration.achievable_fpr:.2%} false positives) and {len(shown)} other "
        f"pictures, each shown once: {test.images} entered, the statistic reached {highest:.3g} "
        f"of {test.run_length:g} and ended at {test.statistic:.3g}, distance "
        f"{test.distance or 0:.3f}."
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _spread(values: Sequence[float]) -> tuple[float | None, ...]:
    found = np.quantile(values or [np.inf], [0.5, 0.0, 1.0], method="higher")
    return tuple(_finite(value) for value in found)


def _images(value: float | None) -> str:
    return f"> {AFTER}" if value is None else f"{value:.0f}"


def rare_table(rows: Sequence[FalseAlarms]) -> str:
    lines = [
        "| calibration images | streams with a false alarm | promised, at most "
        f"| ranked among the calibration alone | images to a false alarm at {SHORT}: mean "
        "(standard error) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.samples} | {row.alarms} of {row.streams}, of {row.images} images each "
            f"| {min(1.0, row.images / RUN_LENGTH):.0%} "
            f"| {row.alarms_by_calibration_alone} of {row.streams} "
            f"| {row.mean_run_length:.0f} ({row.standard_error:.0f}) |"
        )
    return "\n".join(lines)


def soon_table(rows: Sequence[Delays]) -> str:
    """A row for each change and number of images before it, a column for each calibration."""
    samples = sorted({row.samples for row in rows})
    grouped: dict[tuple[str, int], dict[int, Delays]] = {}
    for row in rows:
        grouped.setdefault((row.change, row.before), {})[row.samples] = row
    lines = [
        "| change | scores move by | still normal | images before | "
        + " | ".join(f"{count} calibration images" for count in samples)
        + " |",
        "|---" * (4 + len(samples)) + "|",
    ]
    for (change, before), found in grouped.items():
        largest = found[samples[-1]]
        cells = [_cell(row) for _, row in sorted(found.items())]
        lines.append(
            f"| {change} | {largest.shift:+.2f} sd | {largest.normal:.0%} | {before} "
            f"| {' | '.join(cells)} |"
        )
    told = (
        f"Images inspected until noticed: median (nine of ten streams), share of streams that did "
        f"not within {AFTER}."
    )
    return "\n".join([*lines, "", told])


def _cell(row: Delays) -> str:
    if not row.normal:
        return "none is decided normal"
    return f"{_images(row.median)} ({_images(row.most)}), {row.unnoticed:.0%}"


def beside_table(rows: Sequence[Comparison]) -> str:
    lines = [
        "| images that enter until noticed: median (least to most) | mixture | Simple Jumper |",
        "|---|---|---|",
    ]
    for row in rows:
        cells = (
            f"{_images(median)} ({_images(least)} to {_images(most)})"
            for median, least, most in (row.mixture, row.jumper)
        )
        lines.append(f"| {row.change} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drift", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="MODELS/NAME/VERSION")
    add("--data", type=Path, required=True, nargs="+", metavar="DIR", help="with normal pictures")
    add("--pictures", type=int, help="of them at most (default: all)")
    add("--samples", type=int, nargs="+", default=SAMPLES, help="of calibrations: 50 200 1000")
    add("--streams", type=int, default=100, help="of each kind (default 100)")
    add("--images", type=int, default=10_000, help="of a stream without a change (default 10,000)")
    add("--threads", type=int, default=available(), help="default: all")
    add("--seed", type=int, default=0, help="of what is drawn (default 0)")
    add("--out", type=Path, metavar="DIR", help="write NAME.md and NAME.json here")
    arguments = parser.parse_args(argv)

    bundle = Bundle(arguments.bundle)
    scores = measure(bundle, arguments.data, arguments.pictures, arguments.threads)
    streams, seed = arguments.streams, arguments.seed
    simulated = progress(
        arguments.samples, total=len(arguments.samples), description="streams", unit="calibration"
    )
    rare, soon = [], []
    for samples in simulated:
        rare.append(false_alarms(scores.unchanged, samples, streams, arguments.images, seed))
        for before in BEFORE:
            soon += delays(scores, samples, before, streams, seed)
    beside = compare(scores, max(arguments.samples), max(BEFORE), min(streams, 25), seed)

    torch.set_num_threads(arguments.threads)  # what `hardware` tells
    told = (
        f"{bundle.name}/{bundle.version}, {len(scores.unchanged)} pictures, {streams} streams of "
        f"each kind; {hardware(torch.device('cpu'))}; {date.today()}."
    )
    parts = [rare_table(rare), soon_table(soon), beside_table(beside)]
    text = "\n\n".join([*parts, own(bundle, scores, seed), told])
    print(text)
    if arguments.out:
        record = {
            "false_alarms": [asdict(row) for row in rare],
            "delays": [asdict(row) for row in soon],
            "comparison": [asdict(row) for row in beside],
            "told": told,
        }
        files.write_json(arguments.out / f"{bundle.name}.json", record, "--out")
        files.write_text(arguments.out / f"{bundle.name}.md", text + "\n", "--out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
