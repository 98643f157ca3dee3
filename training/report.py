"""One HTML file on a bundle, for those who decide whether it goes to the line, and for auditors.

`evaluate`'s figures, the pictures that the model gets wrong, and what it takes to repeat them. The
file holds everything it shows, runs no script and asks no server.
"""

import base64
import io
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import onnxruntime as ort
import PIL
import sklearn
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

import service
from service import heatmap, image, regions
from service.bundle import Bundle, Network
from service.calibration import Calibration, decide
from service.devices import Device, Precision
from service.errors import ServiceError
from training import checkpoint as checkpoints
from training import data, files
from training.charts import Axis, Chart, axis_over, histogram
from training.errors import TrainingError
from training.evaluate import (
    Decisions,
    Rate,
    Report,
    Scored,
    are_anomalous,
    report_on,
    score_images,
)
from training.metrics import ImageMetrics, PixelMetrics

TEMPLATE = "report.html.jinja"
THUMBNAIL = 320  # pixels of a picture's longer side
JPEG_QUALITY = 82
CLOSE_CALLS = 4  # shown where nothing was decided wrongly
MAX_NAMES = 20  # of files in a list

# (heading, one line on what it means) of every figure, by its field.
IMAGE_METRICS = {
    "auroc": (
        "image AUROC",
        "chance that an anomalous image scores above a normal one; 0.5 is guessing, 1 is perfect",
    ),
    "average_precision": (
        "image AP",
        "area under the precision-recall curve; rises with the share of anomalous images",
    ),
    "f1_max": (
        "F1-max",
        "best F1 of any threshold; chosen on these very images, so better than any line will see",
    ),
    "f1_max_threshold": ("F1-max's threshold", "where that is; the service does not use it"),
    "f1_max_fpr": ("F1-max's false-positive rate", "share of normal images at or above it"),
}
PIXEL_METRICS = {
    "auroc": (
        "pixel AUROC",
        "as for images, over all pixels pooled; flattered by the many pixels far from any defect",
    ),
    "average_precision": ("pixel AP", "area under the pixels' precision-recall curve"),
    "aupro": (
        "AUPRO@0.3",
        "share of each defect region that is marked, averaged over regions, for false-positive "
        "rates of pixels up to 0.3",
    ),
    "aupro_005": ("AUPRO@0.05", "the same up to 0.05, nearer to what a line can bear"),
    "regions": ("defect regions", "8-connected areas in all masks that count"),
    "pro_per_image": (
        "per-image PRO",
        "the RD4AD papers' protocol, which pools nothing; for comparison with their tables only",
    ),
    "pro_left_out": ("left out of it", "images for which that protocol gives no figure"),
}


@dataclass(frozen=True)
class Case:
    """One test image as the report shows it; outlines are SVG paths in the map's pixels."""

    name: str
    kind: str
    score: float
    relative: float  # score / threshold
    p_value: float
    picture: str  # data URI, at most THUMBNAIL wide and high
    heatmap: str  # data URI, on the service's scale
    size: tuple[int, int]  # height, width of `picture`
    map_size: tuple[int, int]
    peak: tuple[int, int]  # x, y of the map's maximum
    defect: str  # outline of the mask
    found: str  # outline of what the service reports
    mask_note: str


@dataclass(frozen=True)
class Gallery:
    wrong: int  # images on the wrong side of the threshold
    cases: list[Case]  # the worst of them; where there are none, the closest calls


@dataclass(frozen=True)
class Verdict:
    """Whether the false-positive rate is what was promised, in a word and in plain ones."""

    word: str
    sentence: str


def write_report(
    folder: Path,
    root: Path,
    out: Path | None = None,
    *,
    layout: str | None = None,
    category: str | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    worst: int = 8,
    strict: bool = False,
) -> tuple[Path, Report]:
    """(the file written, what it says) of the bundle in `folder` on the test images of `root`.

    Shows the `worst` misses and false alarms. `out` defaults to NAME-VERSION.html in the current
    folder. Raises TrainingError where the file can't be written, before any image is scored, and
    as `evaluate` does.
    """
    command = ["python", "-m", "training", "report", "--bundle", str(folder), "--data", str(root)]
    command += ["--category", category] if category else []
    command += ["--layout", layout] if layout else []
    command += ["--out", str(out)] if out else []
    command += ["--device", device] if device != "auto" else []
    command += ["--precision", precision] if precision != "auto" else []
    command += ["--worst", str(worst)] if worst != 8 else []
    command += ["--strict"] if strict else []
    bundle = Bundle(folder)
    own_calibration(bundle)
    out = out or Path(f"{bundle.name}-{bundle.version}.html")
    files.check_writable(out, "--out")
    scored = score_images(
        folder,
        root,
        layout=layout,
        category=category,
        device=device,
        precision=precision,
        strict=strict,
    )
    report = report_on(scored)
    page = render(scored, report, worst=worst, command=shlex.join(command))
    files.write_text(out, page, "--out")
    return out, report


def own_calibration(bundle: Bundle) -> Calibration:
    """The bundle's; raises TrainingError for an imported one without normal images."""
    calibration = bundle.default_calibration()
    if calibration is None:
        raise TrainingError(
            f"{bundle.folder}: has no threshold, and a report is about decisions: import it with "
            "--normals (evaluate tells what needs no threshold)"
        )
    return calibration


def render(scored: Scored, report: Report, *, worst: int, command: str) -> str:
    """The page; everything that comes from files is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number}
    environment.filters |= {"figure": figure, "setting": setting}
    bundle = scored.bundle
    calibration = own_calibration(bundle)
    decisions = report.decisions
    assert decisions  # made with that calibration
    anomalous = are_anomalous(scored.tests)
    scores = scored.scores
    held_out = np.array([one.score for one in bundle.manifest.data.held_out])
    over = histogram(
        {
            "Normal test images": scores[~anomalous],
            "Anomalous test images": scores[anomalous],
            "Held-out normal images, which set the threshold": held_out,
        },
        calibration.threshold,
    )
    page = environment.get_template(TEMPLATE).render(
        bundle=bundle,
        manifest=bundle.manifest,
        report=report,
        calibration=calibration,
        decisions=decisions,
        verdict=_verdict(decisions.false_positives, calibration),
        made=datetime.now(UTC),
        images=(int((~anomalous).sum()), int(anomalous.sum())),
        known=scored.known,
        histogram=over,
        strips=_strips(scored, over.axis),
        charts=[
            _roc(scores, anomalous, report.image, decisions, calibration),
            _precision_recall(scores, anomalous, report.image, decisions),
        ],
        loss=_loss(bundle),
        misses=_gallery(scored, calibration, worst, anomalous=True),
        false_alarms=_gallery(scored, calibration, worst, anomalous=False),
        scale=_scale(),
        metrics=_metric_rows(report),
        max_names=MAX_NAMES,
        test_fingerprint=data.fingerprint(scored.digests),
        other_settings={
            name: value
            for name, value in bundle.manifest.training.items()
            if name not in Network.model_fields
        },
        software={"device": scored.device} | _software(),
        command=command,
    )
    return page.strip() + "\n"


def percent(share: float) -> str:
    text = f"{100 * share:.3g}"
    if text == "100" and share < 1:  # 139 of 140 leave room for a miss
        text = f"{100 * share:.4g}"
    return f"{text}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    return f"{value:.4g}"


def figure(value: float | int | None) -> str:
    """As `evaluate` prints it."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not stated" if value in (None, "") else str(value)


def _verdict(false_positives: Rate, calibration: Calibration) -> Verdict:
    low, high = false_positives.interval()
    promised = calibration.achievable_fpr
    most = f"at most {percent(promised)}"
    if low > promised:
        return Verdict(
            "broken",
            f"That is more than promised ({most}): these normal images differ from the held-out "
            "ones (new parts, light or camera), or too few were held out. Calibrate with new ones "
            "before relying on this threshold.",
        )
    if high <= promised:
        return Verdict(
            "kept", f"The promise of {most} is kept, at the far end of the interval as well."
        )
    return Verdict(
        "open",
        f"That does not disprove the promise of {most}, but {false_positives.total} normal images "
        "are too few to confirm it.",
    )


def _gallery(scored: Scored, calibration: Calibration, worst: int, *, anomalous: bool) -> Gallery:
    """Of anomalous images those that score lowest, of normal ones those that score highest."""
    scores = scored.scores
    order = [i for i, test in enumerate(scored.tests) if test.anomalous == anomalous]
    order.sort(key=lambda i: scores[i] if anomalous else -scores[i])
    right = "anomalous" if anomalous else "normal"
    wrong = [i for i in order if decide(scores[i], calibration.threshold) != right]
    shown = wrong[:worst] if wrong else order[: min(worst, CLOSE_CALLS)]
    return Gallery(len(wrong), [_case(scored, i, calibration) for i in shown])


def _case(scored: Scored, index: int, calibration: Calibration) -> Case:
    test, prediction = scored.tests[index], scored.predictions[index]
    anomaly_map, mask = prediction.anomaly_map, scored.masks[index]
    threshold, size = calibration.threshold, anomaly_map.shape
    picture = _thumbnail(test.path)
    row, column = np.unravel_index(int(anomaly_map.argmax()), size)
    found = regions.find(anomaly_map, threshold, (size[0], size[1]))
    return Case(
        name=scored.names[index],
        kind=test.kind,
        score=prediction.score,
        relative=prediction.score / threshold,
        p_value=calibration.p_value(prediction.score),
        picture=_data_uri("jpeg", _encode(".jpg", picture)),
        heatmap=_data_uri("png", _smaller(heatmap.heatmap(anomaly_map, threshold))),
        size=(picture.shape[0], picture.shape[1]),
        map_size=(size[0], size[1]),
        peak=(int(column), int(row)),
        defect=_outlines(mask) if mask is not None else "",
        found=_path([np.array(region.contour) for region in found]),
        mask_note=_mask_note(scored, scored.names[index]),
    )


def _thumbnail(path: Path) -> np.ndarray:
    """The picture in its own proportions, RGB (h, w, 3): the model's size may distort it."""
    try:
        pixels = image.read(path)
    except (OSError, ServiceError) as error:
        raise TrainingError(f"{path}: could be read before, and can't be now: {error}") from error
    shrink = min(1, THUMBNAIL / max(pixels.shape[:2]))
    height, width = (max(1, round(side * shrink)) for side in pixels.shape[:2])
    return image.resize(pixels, (height, width))


def _outlines(mask: np.ndarray) -> str:
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return _path([outline.reshape(-1, 2) for outline in found])


def _path(outlines: Sequence[np.ndarray]) -> str:
    return "".join("M" + " ".join(f"{x},{y}" for x, y in one) + "Z" for one in outlines)


def _mask_note(scored: Scored, name: str) -> str:
    masks = scored.mask_report
    if name in masks.missing:
        return "no mask"
    if name in masks.empty:
        return "the mask is empty"
    return "the defect is too small for the map" if name in masks.vanished else ""


def _encode(suffix: str, pixels: np.ndarray) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == ".jpg" else []
    return bytes(cv2.imencode(suffix, pixels[..., ::-1], options)[1])


def _smaller(png: bytes) -> bytes:
    """The same palette PNG, packed for a mail and not for a fast answer."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Scale:
    """The heatmap's colours from 0 up, and where multiples of the threshold lie on it."""

    picture: str
    ticks: list[tuple[float, str]]  # place from 0 to 1, label


def _scale() -> Scale:
    labels = {0.0: "0", 0.5: "½", 1.0: "threshold", 2.0: "2 ×", 4.0: "4 ×", 8.0: "8 ×"}
    places = (heatmap.levels(np.array([list(labels)], np.float32), 1.0)[0] / 255).tolist()
    picture = _data_uri("png", _encode(".png", heatmap.LUT[None]))
    return Scale(picture, list(zip(places, labels.values(), strict=True)))


def _strips(scored: Scored, axis: Axis) -> dict[str, str]:
    """Per kind an SVG path of one upright line for each image, over a box of 1 x 1."""
    strips: dict[str, str] = {}
    places = axis.at(scored.scores)
    for test, place in zip(scored.tests, places, strict=True):
        strips[test.kind] = strips.get(test.kind, "") + f"M{place:.4f} 0v1"
    return strips


def _roc(
    scores: np.ndarray,
    anomalous: np.ndarray,
    metrics: ImageMetrics,
    decisions: Decisions,
    calibration: Calibration,
) -> Chart:
    false_positives, true_positives, _ = roc_curve(anomalous, scores)
    detected, false_alarms = decisions.detected.rate, decisions.false_positives.rate
    return Chart(
        name="ROC curve",
        description=f"Area {metrics.auroc:.4f}. At the threshold {percent(detected)} of "
        f"the anomalous and {percent(false_alarms)} of the normal images are called anomalous.",
        x_label="normal images called anomalous",
        y_label="anomalous images found",
        x=Axis(0, 1),
        y=Axis(0, 1),
        curve=(false_positives, true_positives),
        mark=(false_alarms, detected),
        limit=calibration.achievable_fpr,
    )


def _precision_recall(
    scores: np.ndarray, anomalous: np.ndarray, metrics: ImageMetrics, decisions: Decisions
) -> Chart:
    precision, recall, _ = precision_recall_curve(anomalous, scores, drop_intermediate=True)
    detected = decisions.detected
    alarms = detected.count + decisions.false_positives.count
    at_threshold = detected.count / alarms if alarms else None
    # In steps, as average precision sums it.
    steps = np.repeat(recall[::-1], 2)[1:-1], np.repeat(precision[-2::-1], 2)
    told = (
        "No image reaches the threshold, so it has no place here."
        if at_threshold is None
        else f"At the threshold {percent(at_threshold)} of the alarms are right."
    )
    return Chart(
        name="Precision and recall",
        description=f"Average precision {metrics.average_precision:.4f}. {told}",
        x_label="anomalous images found",
        y_label="alarms that are right",
        x=Axis(0, 1),
        y=Axis(0, 1),
        curve=steps,
        mark=None if at_threshold is None else (detected.rate, at_threshold),
    )


@dataclass(frozen=True)
class Loss:
    """The loss curve, or why there is none."""

    chart: Chart | None
    sentence: str


def _loss(bundle: Bundle) -> Loss:
    """Of the run in `checkpoint` beside the bundle, if that is the run the bundle came from.

    It is where both have the same data, the same teacher, and, to the last bit, the same loss in
    the epoch that was exported. The run may have gone on since.
    """
    try:
        run = checkpoints.read(bundle.folder.parent / "checkpoint")
    except TrainingError:
        return Loss(None, "There is no training run beside the bundle, so no loss curve.")
    manifest = bundle.manifest
    epochs, loss = int(manifest.metrics.get("epochs", 0)), manifest.metrics.get("loss", np.nan)
    same = (
        run.data_fingerprint == manifest.data.fingerprint
        and run.teacher.sha256 == manifest.teacher.sha256
        and run.losses[epochs - 1 : epochs] == [loss]
    )
    if not same:
        return Loss(
            None,
            "The training run beside the bundle is another one (its data, teacher or losses differ "
            "from the manifest's), so there is no loss curve.",
        )
    values = np.array(run.losses)
    epoch = np.arange(1, len(values) + 1)
    later = f" The run went on to epoch {len(values)} after that." if len(values) > epochs else ""
    chart = Chart(
        name="Training loss",
        description=f"From {number(values[0])} in the first epoch to {number(loss)} in epoch "
        f"{epochs}, which is this model.{later}",
        x_label="epoch",
        y_label="mean loss",
        x=Axis(0, len(values)),
        y=axis_over(values),
        curve=(epoch, values),
        mark=(epochs, loss),
    )
    return Loss(
        chart,
        "From the run beside the bundle, whose data, teacher and loss in the last epoch are the "
        "manifest's.",
    )


def _metric_rows(report: Report) -> list[tuple[str, Any, str]]:
    """(name, value, what it means) of every figure."""
    return _rows(report.image, IMAGE_METRICS) + (
        _rows(report.pixel, PIXEL_METRICS) if report.pixel else []
    )


def _rows(
    metrics: ImageMetrics | PixelMetrics, meanings: dict[str, tuple[str, str]]
) -> list[tuple[str, Any, str]]:
    found = []
    for field in fields(metrics):
        name, meaning = meanings[field.name]
        found.append((name, getattr(metrics, field.name), meaning))
    return found


def _software() -> dict[str, str]:
    return {
        "this project": service.__version__,
        "Python": platform.python_version(),
        "ONNX Runtime": ort.__version__,
        "OpenCV": cv2.__version__,
        "Pillow": PIL.__version__,
        "NumPy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }
