"""A bundle, through the serving code, on labelled images."""

import logging
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from service.bundle import Bundle
from service.calibration import decide
from service.detector import Detector, Prediction
from service.devices import Device, Precision
from training import data, datasets
from training.datasets import TestImage
from training.metrics import ImageMetrics, PixelMetrics, image_metrics, pixel_metrics
from training.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rate:
    """How many of how many, with the exact (Clopper-Pearson) 95 % interval."""

    count: int
    total: int

    @property
    def rate(self) -> float:
        return self.count / self.total

    def interval(self) -> tuple[float, float]:
        found = binomtest(self.count, self.total).proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "rate": self.rate, "interval_95": self.interval()}

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.count}/{self.total} = {self.rate:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Decisions:
    """What a threshold makes of labelled images."""

    threshold: float
    target_fpr: float
    false_positives: Rate
    kinds: dict[str, Rate]  # detected, by kind of defect

    @property
    def detected(self) -> Rate:
        """Of all kinds together."""
        rates = self.kinds.values()
        return Rate(sum(rate.count for rate in rates), sum(rate.total for rate in rates))

    def as_dict(self) -> dict[str, object]:
        return {
            "threshold": self.threshold,
            "target_fpr": self.target_fpr,
            "false_positives": self.false_positives.as_dict(),
            "kinds": {kind: rate.as_dict() for kind, rate in self.kinds.items()},
        }


@dataclass(frozen=True)
class MaskReport:
    """What became of the masks of anomalous images; only `used` ones count in pixel metrics."""

    used: int
    missing: list[str]  # no mask file
    empty: list[str]  # no defect pixel in the file
    vanished: list[str]  # none left at the map's size


@dataclass(frozen=True)
class Report:
    bundle: str
    digest: str
    images: int
    image: ImageMetrics
    kind_auroc: dict[str, float]  # image AUROC of one kind of defect against all normal images
    decisions: Decisions | None  # None without a threshold: imported without normal images
    pixel: PixelMetrics | None
    masks: MaskReport
    failed: dict[str, str]
    scores: dict[str, float]  # by path below the data folder

    def as_dict(self) -> dict[str, object]:
        decisions = self.decisions.as_dict() if self.decisions else None
        return asdict(self) | {"decisions": decisions}


@dataclass(frozen=True)
class Scored:
    """The test images that could be read, in one order, and what the bundle makes of each."""

    bundle: Bundle
    device: str
    root: Path
    tests: list[TestImage]
    digests: list[str]  # SHA-256 of each file
    known: int  # how many of them were trained on or held out
    predictions: list[Prediction]
    masks: list[np.ndarray | None]  # (h, w) at the map's size; None: left out of pixel metrics
    mask_report: MaskReport
    failed: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Each image's path below the data folder."""
        return [str(test.path.relative_to(self.root)) for test in self.tests]

    @property
    def scores(self) -> np.ndarray:
        return np.array([prediction.score for prediction in self.predictions])


def evaluate(
    folder: Path,
    root: Path,
    *,
    layout: str | None = None,
    category: str | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    strict: bool = False,
) -> Report:
    """Metrics of the bundle in `folder` on the test images of `root`, found by `labelled_images`.

    Raises TrainingError for a folder without labelled images, and BundleError.
    """
    scored = score_images(
        folder,
        root,
        layout=layout,
        category=category,
        device=device,
        precision=precision,
        strict=strict,
    )
    return report_on(scored)


def score_images(
    folder: Path,
    root: Path,
    *,
    layout: str | None = None,
    category: str | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    strict: bool = False,
) -> Scored:
    """Scores and maps of the test images, their pixels not kept; raises as `evaluate` does."""
    bundle = Bundle(folder)
    tests = labelled_images(bundle, root, layout, category)
    size = bundle.manifest.image_size
    loaded = data.load([t.path for t in tests], size, strict=strict, what="test images")
    by_path = {t.path: t for t in tests}
    tests = [by_path[path] for path in loaded.paths]
    detector = Detector(bundle.read_graph(), size, device, precision=precision)
    predictions = _predict(detector, loaded.pixels)
    masks, mask_report = _read_masks(tests, root, size)
    return Scored(
        bundle=bundle,
        device=f"{detector.device} in {detector.precision}",
        root=root,
        tests=tests,
        digests=loaded.digests,
        known=_count_known(bundle, loaded),
        predictions=predictions,
        masks=masks,
        mask_report=mask_report,
        failed={str(p.relative_to(root)): reason for p, reason in loaded.failed.items()},
    )


def report_on(scored: Scored) -> Report:
    """All metrics of scored images, and the decisions at the bundle's own threshold."""
    bundle, tests, scores = scored.bundle, scored.tests, scored.scores
    calibration = bundle.default_calibration()
    kept = [i for i, mask in enumerate(scored.masks) if mask is not None]
    pixel = None
    if scored.mask_report.used:
        maps = np.stack([scored.predictions[i].anomaly_map for i in kept])
        pixel = pixel_metrics(maps, np.stack([m for m in scored.masks if m is not None]))
    return Report(
        bundle=f"{bundle.name}/{bundle.version}",
        digest=bundle.digest,
        images=len(tests),
        image=image_metrics(scores, are_anomalous(tests)),
        kind_auroc=kind_aurocs(tests, scores),
        decisions=decisions_at(tests, scores, calibration.threshold, calibration.target_fpr)
        if calibration
        else None,
        pixel=pixel,
        masks=scored.mask_report,
        failed=scored.failed,
        scores={name: float(s) for name, s in zip(scored.names, scores, strict=True)},
    )


def labelled_images(
    bundle: Bundle, root: Path, layout: str | None, category: str | None
) -> list[TestImage]:
    """The labelled images of `root`.

    Where neither layout nor category is given, they are those that the bundle was trained with if
    `root` has them: otherwise a split that the reader draws could bring trained images here. A
    plain folder has no labels, so after it they are found anew.
    """
    if layout is None and category is None:
        trained = bundle.manifest.training
        layout, category = str(trained.get("layout", "auto")), str(trained.get("category", ""))
        if layout == "folder" or category not in datasets.categories(root, layout):
            layout, category = "auto", ""
    return datasets.read(root, layout or "auto", category or "").to_test_on()


def _count_known(bundle: Bundle, loaded: data.Images) -> int:
    record = bundle.manifest.data
    known = {*record.trained, *(image.sha256 for image in record.held_out)}
    count = sum(digest in known for digest in loaded.digests)
    if count:
        log.warning("%d test images were trained on or held out: the figures flatter", count)
    return count


def are_anomalous(tests: list[TestImage]) -> np.ndarray:
    return np.array([test.anomalous for test in tests])


def kind_aurocs(tests: list[TestImage], scores: np.ndarray) -> dict[str, float]:
    """Image AUROC of each kind of defect against all normal images."""
    kinds = np.array([test.kind for test in tests])
    positive = are_anomalous(tests)
    found = {}
    for kind in sorted(set(kinds[positive])):
        chosen = (kinds == kind) | ~positive
        found[str(kind)] = image_metrics(scores[chosen], positive[chosen]).auroc
    return found


def decisions_at(
    tests: list[TestImage], scores: np.ndarray, threshold: float, target_fpr: float
) -> Decisions:
    """What a threshold makes of labelled images' scores, wherever these were computed."""
    called = np.array([decide(score, threshold) == "anomalous" for score in scores])
    kinds = np.array([test.kind for test in tests])
    positive = are_anomalous(tests)

    def rate(chosen: np.ndarray) -> Rate:
        return Rate(int(called[chosen].sum()), int(chosen.sum()))

    return Decisions(
        threshold=threshold,
        target_fpr=target_fpr,
        false_positives=rate(~positive),
        kinds={str(kind): rate(kinds == kind) for kind in sorted(set(kinds[positive]))},
    )


def table(report: Report) -> str:
    """The report as text for a terminal."""
    pixel, masks = report.pixel, report.masks
    lines = [
        f"{report.bundle} ({report.digest[:12]}) on {report.images} images",
        f"  image AUROC {report.image.auroc:.4f}   AP {report.image.average_precision:.4f}   "
        f"F1-max {report.image.f1_max:.4f} at {report.image.f1_max_threshold:.4f} "
        f"(false-positive rate {report.image.f1_max_fpr:.3g})",
        *_pixel_lines(pixel),
        f"  masks: {masks.used} used, {len(masks.missing)} missing, {len(masks.empty)} empty, "
        f"{len(masks.vanished)} vanished at the map's size (left out of pixel metrics)",
        *_decision_lines(report),
    ]
    lines += [f"  unreadable: {name}: {reason}" for name, reason in report.failed.items()]
    return "\n".join(lines)


def _decision_lines(report: Report) -> list[str]:
    aurocs, made = report.kind_auroc, report.decisions
    width = max(len(kind) for kind in aurocs)
    told = {kind: f"    {kind:{width}}  AUROC {auroc:.4f}" for kind, auroc in aurocs.items()}
    if made is None:
        head = "  no threshold, so no decisions: imported without --normals"
        return [head, *told.values()]
    return [
        f"  at threshold {made.threshold:.4f} (target false-positive rate {made.target_fpr:.3g}):",
        f"    false positives {made.false_positives}",
        *(f"{start}   detected {made.kinds[kind]}" for kind, start in told.items()),
    ]


def _pixel_lines(pixel: PixelMetrics | None) -> list[str]:
    if pixel is None:
        return ["  no masks: no pixel metrics"]
    per_image = "undefined" if pixel.pro_per_image is None else f"{pixel.pro_per_image:.4f}"
    return [
        f"  pixel AUROC {pixel.auroc:.4f}   AP {pixel.average_precision:.4f}   "
        f"AUPRO@0.3 {pixel.aupro:.4f}   AUPRO@0.05 {pixel.aupro_005:.4f} over "
        f"{pixel.regions} regions",
        f"  per-image PRO {per_image}, {pixel.pro_left_out} images left out "
        "(RD4AD's protocol, for comparison only)",
    ]


def _predict(detector: Detector, pixels: np.ndarray) -> list[Prediction]:
    predictions: list[Prediction] = []
    with progress(total=len(pixels), description="scoring") as bar:
        for start in range(0, len(pixels), 8):
            batch = detector.run(pixels[start : start + 8])
            predictions += batch
            bar.update(len(batch))
    return predictions


def _read_masks(
    tests: list[TestImage], root: Path, size: tuple[int, int]
) -> tuple[list[np.ndarray | None], MaskReport]:
    """The mask (h, w) of each image at the map's size; None for those that pixel metrics skip."""
    masks: list[np.ndarray | None] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    used = 0
    for test in tests:
        if not test.anomalous:
            masks.append(np.zeros(size, bool))
            continue
        mask, fate = _read_mask(test, size)
        masks.append(mask if fate == "used" else None)
        if fate == "used":
            used += 1
        else:
            left_out[fate].append(str(test.path.relative_to(root)))
    return masks, MaskReport(used, left_out["missing"], left_out["empty"], left_out["vanished"])


def _read_mask(test: TestImage, size: tuple[int, int]) -> tuple[np.ndarray | None, str]:
    if test.mask is None:
        return None, "missing"
    full, mask = data.read_mask(test.mask, size)
    if mask.any():
        return mask, "used"
    return None, "vanished" if full.any() else "empty"
