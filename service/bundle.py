"""A bundle: the immutable folder `models/<name>/<version>/` with `model.onnx`, `manifest.json` and,
for a self-check, `golden.png`.

Written once by `python -m training` (`export`, `import`), read by everything that scores images.
What changes later (calibrations, which one is active) is state and lives in `service.store`.
"""

import json
import re
import secrets
import shutil
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.calibration import Calibration, default_target_fpr
from service.errors import BundleError, ServiceError
from service.image import decode, digest

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
GRAPH_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
GOLDEN_FILE: Final = "golden.png"
# Of the golden picture's score, relative: bfloat16 moves scores by up to 1 %, float16 by up to 2 %.
GOLDEN_TOLERANCE = 0.03
OWN_CALIBRATION = "bundle"  # its id, in place of a stored one's

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Graph(Record):
    """The ONNX file and how well it agrees with the network that it was exported from."""

    sha256: Sha256
    opset: int
    weights: Literal["float32", "float16"]  # as stored
    # What the network computes in; normalisation, cosine distances and map always in float32.
    precision: Literal["float32", "float16"] = "float32"
    # Largest relative difference of score and map from the PyTorch network, all in float32.
    parity: float
    # Largest relative change of a score by float16, of the weights or of all that is computed.
    weight_rounding: float


class Network(Record):
    architecture: str
    backbone: str
    skips: str
    bottleneck: str = "mff"
    refinement: bool = False
    border: str = "half-sample"  # how the blur reflects the map: scipy's way, or anomalib's
    consistency_rate: float | None  # None: an imported network's is not known
    embedding_planes: int


class Teacher(Record):
    origin: str
    sha256: Sha256
    licence: str


class HeldOutImage(Record):
    """A normal image that was never trained on, by its path below the data folder."""

    file: str
    sha256: Sha256
    score: float


class TrainingData(Record):
    fingerprint: Sha256  # over the sorted digests of all normal images used
    trained: list[Sha256]  # digests of the files, so that none of them calibrates later
    held_out: list[HeldOutImage]  # none: the bundle has no threshold until it is calibrated


class Golden(Record):
    """A normal picture at the model's size with the score that the graph gave it at export: what
    gives it another one is no longer the model that was approved."""

    file: Literal["golden.png"] = GOLDEN_FILE
    sha256: Sha256
    score: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tolerance: Annotated[float, Field(gt=0, le=1)] = GOLDEN_TOLERANCE  # relative


class Manifest(Record):
    """What `manifest.json` holds: everything an auditor needs to trace a decision to its data."""

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[int, Field(ge=1)]
    created: datetime
    image_size: tuple[Side, Side]  # height, width
    graph: Graph
    network: Network
    teacher: Teacher
    data: TrainingData
    training: dict[str, str | int | float | bool | None]
    metrics: dict[str, float]
    golden: Golden | None = None  # None: an older bundle, or one without normal pictures


class Bundle:
    """A bundle on disk; raises BundleError that names the file at fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if found := versions(folder.parent, folder.name):
            raise BundleError(
                f"{folder}: is a model of versions {', '.join(map(str, found))}; give one of them, "
                f"as {folder / str(found[-1])}"
            )
        self.manifest = _read_manifest(folder / MANIFEST_FILE)

    def read_graph(self) -> bytes:
        """The ONNX file, its digest checked; not kept, since the runtime makes its own copy."""
        return _read(self.folder / GRAPH_FILE, self.manifest.graph.sha256)

    def read_golden(self) -> bytes | None:
        """PNG of the golden picture, its digest checked; None: there is none."""
        golden = self.manifest.golden
        return _read(self.folder / golden.file, golden.sha256) if golden else None

    def golden_pixels(self) -> np.ndarray | None:
        """RGB uint8 (h, w, 3) of the golden picture at the model's size; None: there is none."""
        if (data := self.read_golden()) is None:
            return None
        try:
            pixels = decode(data)
        except ServiceError as error:  # no picture that is read
            raise BundleError(f"{self.folder / GOLDEN_FILE}: {error}") from error
        if pixels.shape[:2] != self.manifest.image_size:
            raise BundleError(
                f"{self.folder / GOLDEN_FILE}: (height, width) is {pixels.shape[:2]}, the model's "
                f"is {self.manifest.image_size}"
            )
        return pixels

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def digest(self) -> str:
        return self.manifest.graph.sha256

    def default_calibration(self) -> Calibration | None:
        """The threshold from the held-out normal images, at 1 % or the finest rate they allow.

        None for an imported network that came without any.
        """
        scores = np.array([image.score for image in self.manifest.data.held_out])
        if not len(scores):
            return None
        rate = default_target_fpr(len(scores))
        return Calibration(OWN_CALIBRATION, rate, scores, made=self.manifest.created)


def _read_manifest(path: Path) -> Manifest:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    return parse_manifest(path, data)


def parse_manifest(file: Path | str, data: bytes) -> Manifest:
    """Raises BundleError that names the first field at fault."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(f"{file}: {where}: {first['msg']}") from error


def _read(path: Path, expected: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    check_digest(path, data, expected)
    return data


def check_digest(file: Path | str, data: bytes, expected: str) -> None:
    """Raises BundleError with both digests where `data` is not what the manifest says."""
    actual = digest(data)
    if actual != expected:
        raise BundleError(f"{file}: SHA-256 is {actual}, the manifest says {expected}")


def write(folder: Path, manifest: Manifest, graph: bytes, golden: bytes | None = None) -> None:
    """Write a bundle under a temporary name and move it into place whole.

    Raises BundleError where the folder exists: bundles never change.
    """
    publish(stage(folder, manifest, graph, golden), folder)


def stage(folder: Path, manifest: Manifest, graph: bytes, golden: bytes | None = None) -> Path:
    """Write what is to be the bundle `folder` beside it, under a name that no version has.

    Raises BundleError where `folder` exists.
    """
    _check_new(folder)
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    staging.mkdir(parents=True)
    try:
        (staging / GRAPH_FILE).write_bytes(graph)
        if golden is not None:
            (staging / GOLDEN_FILE).write_bytes(golden)
        text = json.dumps(manifest.model_dump(mode="json"), indent=2)
        (staging / MANIFEST_FILE).write_text(text + "\n")
        _read_manifest(staging / MANIFEST_FILE)  # what can't be read back would stop the service
    except BaseException:
        shutil.rmtree(staging)
        raise
    return staging


def publish(staging: Path, folder: Path) -> None:
    """Move what `stage` wrote into place; raises BundleError where the folder exists by now."""
    _check_new(folder)
    staging.rename(folder)  # which fails where somebody was there in between


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise BundleError(f"{folder}: exists, and a bundle is never overwritten")


def versions(models: Path, name: str) -> list[int]:
    """The versions of a model on disk, ascending: its folders that are named as integers."""
    folder = models / name
    if not folder.is_dir():
        return []
    found = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(version) for version in found if re.fullmatch(r"[1-9]\d*", version))


def names(models: Path) -> list[str]:
    """The models below a folder that have at least one version, by name.

    Raises BundleError where the folder can't be read, or is a model's and not all models' folder.
    """
    try:
        folders = sorted(path.name for path in models.iterdir() if path.is_dir())
    except OSError as error:
        raise BundleError(f"{models}: {error.strerror}") from error
    if any((models / folder / MANIFEST_FILE).is_file() for folder in folders):
        raise BundleError(f"{models}: is the folder of one model; give the one above it")
    return [name for name in folders if versions(models, name)]
