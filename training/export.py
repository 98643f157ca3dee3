"""A network -> one fused, checked ONNX graph in a bundle.

image uint8 (N, H, W, 3) ─► normalise ─► teacher ─► bottleneck ─► decoder
    ─► cosine distances ─► upsample, sum, blur ─► anomaly_map (N, H, W), image_score (N,)
"""

import re
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from service import bundle as bundles
from service import image
from service.bundle import (
    NAME_PATTERN,
    Bundle,
    Golden,
    Graph,
    HeldOutImage,
    Manifest,
    Network,
    Teacher,
    TrainingData,
)
from service.detector import Detector
from service.errors import InferenceFailed
from training import checkpoint as checkpoints
from training import data
from training.checkpoint import Checkpoint
from training.errors import TrainingError
from training.model import AnomalyMap, ReverseDistillation, TeacherWeights, from_settings
from training.precision import (
    FloatType,
    compute_in_float16,
    halve_weights,
    keep_pixels_whole,
    round_activations,
)

OPSET = 20
PARITY_LIMIT = 1e-4  # relative, of score and map
ROUNDING_LIMIT = 2e-2  # what float16 may change, relative
# Settings that say nothing about the model: places on the machine that trained it.
LOCAL_SETTINGS = (
    *("data", "models", "name", "image_size", "device", "save_every", "strict"),
    *("feature_cache", "feature_memory_gb"),
)


class Scorer(nn.Module):
    """The whole graph: from uint8 pixels to anomaly map and image score."""

    def __init__(self, model: ReverseDistillation, anomaly_map: AnomalyMap) -> None:
        super().__init__()
        self.model, self.anomaly_map = model, anomaly_map

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        teacher_features, decoder_features = self.model(image)
        scored: tuple[Tensor, Tensor] = self.anomaly_map(teacher_features, decoder_features)
        return scored


@dataclass(frozen=True)
class Origin:
    """What a manifest tells beside the graph: the network, its teacher and its data."""

    network: Network
    teacher: TeacherWeights
    trained: list[str]  # SHA-256 of each file
    fingerprint: str
    training: dict[str, str | int | float | bool | None]
    metrics: dict[str, float]


def export(
    models: Path,
    name: str,
    *,
    version: int | None = None,
    weights: FloatType = "float32",
    precision: FloatType = "float32",
    data_folder: Path | None = None,
    unfinished: bool = False,
) -> Bundle:
    """Write `models/name/version` from the run's checkpoint.

    `weights` says how they are stored, `precision` what the network computes in; in float16 its
    weights are float16, too. Raises TrainingError for a run that has not ended, unless
    `unfinished`, and as `write_bundle`.
    """
    folder = models / name / "checkpoint"
    run = checkpoints.read(folder)
    target = new_version(models, name, version)
    if not run.finished and not unfinished:
        raise TrainingError(
            f"the run stopped at epoch {run.epoch} of {run.settings.epochs}: go on with `train "
            "--resume`, or export it as it is with --unfinished"
        )
    scorer = load_scorer(run, folder)
    held_out = _held_out_images(run, data_folder or Path(run.settings.data))
    origin = Origin(
        network=Network(
            architecture=run.settings.architecture,
            backbone=run.settings.backbone,
            skips=run.settings.skips,
            bottleneck=run.settings.bottleneck,
            refinement=run.settings.refinement,
            consistency_rate=run.settings.consistency_rate,
            embedding_planes=scorer.model.embedding_planes,
        ),
        teacher=run.teacher,
        trained=list(dict.fromkeys([*run.trained.values(), *run.copies.values()])),
        fingerprint=run.data_fingerprint,
        training=_portable_settings(run),
        metrics={"epochs": run.epoch, **({"loss": run.losses[-1]} if run.losses else {})},
    )
    size = run.settings.image_size
    return write_bundle(
        target, scorer, size, origin, run.held_out, held_out.pixels, weights, precision
    )


def new_version(models: Path, name: str, version: int | None) -> Path:
    """The folder that a bundle is to be written to: by default one more than the newest.

    Raises TrainingError where it exists, and for a name that the service could not be asked for.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrainingError(f"--name {name}: must match {NAME_PATTERN}")
    version = version or max(bundles.versions(models, name), default=0) + 1
    target = models / name / str(version)
    if target.exists():
        raise TrainingError(f"{target}: exists, and a bundle is never overwritten")
    return target


def write_bundle(
    target: Path,
    scorer: Scorer,
    image_size: tuple[int, int],
    origin: Origin,
    held_out: dict[str, str],
    pixels: np.ndarray,
    weights: FloatType,
    precision: FloatType,
) -> Bundle:
    """Make the graph, check it, score the held-out images and write the bundle.

    `held_out` maps names to SHA-256, `pixels` are the same images, uint8 (N, H, W, 3), N from 0 on;
    the one with the median score becomes the golden picture, by which a service checks itself.
    Raises TrainingError where the graph's answers differ from the network's by more than
    PARITY_LIMIT, or float16 changes scores by more than ROUNDING_LIMIT or can't hold the numbers.
    """
    exact = keep_pixels_whole(to_onnx(scorer, image_size))
    parity = check_parity(exact, scorer, pixels[:5])
    graph = as_computed = exact
    if precision == "float16":
        graph, weights = compute_in_float16(exact), "float16"
        as_computed = round_activations(graph)  # by a GPU; the CPU would leave roundings out
    elif weights == "float16":
        graph = as_computed = halve_weights(exact)

    probes = pixels if len(pixels) else _noise(image_size)
    scores, rounding = score(Detector(exact, image_size, "cpu"), probes), 0.0
    if graph is not exact:
        scores, rounding = _rounded(as_computed, scores, probes)
    golden, picture = _golden(scores[: len(pixels)], pixels)
    manifest = Manifest(
        name=target.parent.name,
        version=int(target.name),
        created=datetime.now(UTC).replace(microsecond=0),
        image_size=image_size,
        graph=Graph(
            sha256=image.digest(graph),
            opset=OPSET,
            weights=weights,
            precision=precision,
            parity=parity,
            weight_rounding=rounding,
        ),
        network=origin.network,
        teacher=Teacher(**asdict(origin.teacher)),
        data=TrainingData(
            fingerprint=origin.fingerprint,
            trained=origin.trained,
            held_out=[
                HeldOutImage(file=file, sha256=digest, score=float(value))
                for (file, digest), value in zip(
                    held_out.items(), scores[: len(pixels)], strict=True
                )
            ],
        ),
        training=origin.training,
        metrics=origin.metrics,
        golden=golden,
    )
    bundles.write(target, manifest, graph, picture)
    return Bundle(target)


def _golden(scores: np.ndarray, pixels: np.ndarray) -> tuple[Golden | None, bytes | None]:
    """The picture (of (N, H, W, 3)) with the median of `scores` (N,), as PNG; none of none."""
    if not len(scores):
        return None, None
    typical = int(np.argsort(scores)[len(scores) // 2])
    picture = image.encode(pixels[typical])
    return Golden(sha256=image.digest(picture), score=float(scores[typical])), picture


def load_scorer(run: Checkpoint, folder: Path) -> Scorer:
    model = from_settings(run.settings)
    checkpoints.load_weights(run, folder, model)
    anomaly_map = AnomalyMap(run.settings.image_size, refinement=run.settings.refinement)
    return Scorer(model, anomaly_map).eval()


def to_onnx(scorer: Scorer, image_size: tuple[int, int]) -> bytes:
    """The scorer as one checked ONNX file with its weights inside and a free batch size."""
    example = torch.zeros(2, *image_size, 3, dtype=torch.uint8)  # of 1, the size would be fixed
    with warnings.catch_warnings(action="ignore"):  # the exporter's own deprecations
        program = torch.onnx.export(
            scorer,
            (example,),
            dynamo=True,
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=4096)}},
            input_names=["image"],
            output_names=["anomaly_map", "image_score"],
            opset_version=OPSET,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    _strip_traces(graph)
    onnx.checker.check_model(graph, full_check=True)
    opset = next(entry.version for entry in graph.opset_import if entry.domain == "")
    if opset != OPSET:
        raise TrainingError(f"the exporter wrote opset {opset} instead of {OPSET}")
    return bytes(graph.SerializeToString())


def _strip_traces(graph: onnx.ModelProto) -> None:
    """Leave out the exporter's stack traces: they name files of the machine that exported."""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]


def check_parity(graph: bytes, scorer: Scorer, real: np.ndarray) -> float:
    """Largest relative difference of the graph's scores and maps from torch's.

    On real (where there are any) and on random images (N, H, W, 3), in batches of 1, 2 and 5.
    Raises TrainingError beyond PARITY_LIMIT.
    """
    height, width = real.shape[1:3]
    detector = Detector(graph, (height, width), "cpu")
    noise = _noise((height, width))
    differences = []
    for images in (np.resize(real, noise.shape), noise) if len(real) else (noise,):
        for count in (1, 2, 5):
            with torch.inference_mode():
                expected_maps, expected_scores = scorer(torch.from_numpy(images[:count]))
            predictions = detector.run(images[:count])
            maps = np.stack([p.anomaly_map for p in predictions])
            scores = np.array([p.score for p in predictions])
            differences += [
                relative_difference(maps, expected_maps.numpy()),
                relative_difference(scores, expected_scores.numpy()),
            ]
    worst = float(np.max(differences))  # NaN if one is; Python's max would lose it
    if not worst <= PARITY_LIMIT:
        raise TrainingError(
            f"the exported graph differs from the network by {worst:.2e} relative; the limit is "
            f"{PARITY_LIMIT:g}: nothing was written"
        )
    return worst


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest expected value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _noise(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, *size, 3), np.uint8)


def _rounded(graph: bytes, exact: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores of the images by a graph in float16, and their largest relative change from `exact`.

    Raises TrainingError beyond ROUNDING_LIMIT.
    """
    height, width = images.shape[1:3]
    try:
        scores = score(Detector(graph, (height, width), "cpu"), images)
    except InferenceFailed as error:
        raise TrainingError(
            "the network has numbers beyond float16's range (65504): export it in float32"
        ) from error
    rounding = float((np.abs(scores - exact) / exact).max())
    if not rounding <= ROUNDING_LIMIT:
        raise TrainingError(
            f"float16 changes scores by {rounding:.2e} relative; the limit is {ROUNDING_LIMIT:g}: "
            "export it in float32"
        )
    return scores, rounding


def score(detector: Detector, images: np.ndarray) -> np.ndarray:
    """Image scores (N,) of uint8 images (N, H, W, 3), in small batches."""
    batches = (images[i : i + 8] for i in range(0, len(images), 8))
    return np.array([p.score for batch in batches for p in detector.run(batch)])


def _held_out_images(run: Checkpoint, root: Path) -> data.Images:
    paths = [root / name for name in run.held_out]
    loaded = data.load(paths, run.settings.image_size, strict=True, what="held-out images")
    for name, digest in zip(run.held_out, loaded.digests, strict=True):
        if run.held_out[name] != digest:
            raise TrainingError(f"{root / name}: changed since it was held out")
    return loaded


def _portable_settings(run: Checkpoint) -> dict[str, str | int | float | bool | None]:
    settings = {k: v for k, v in asdict(run.settings).items() if k not in LOCAL_SETTINGS}
    settings["teacher_weights"] = run.teacher.origin
    return settings
