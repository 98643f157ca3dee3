"""A bundle: the immutable folder `models/<name>/<version>/` with `model.onnx` and `manifest.json`.

Written once by `python -m training` (`export`, `import`), read by everything that scores images.
What changes later (calibrations, which one is active) is state and lives in `service.store`.
"""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.calibration import Calibration, default_target_fpr
from service.errors import BundleError
from service.image import digest

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
GRAPH_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
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
        return _read_graph(self.folder / GRAPH_FILE, self.manifest.graph.sha256)

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
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(f"{path}: {where}: {first['msg']}") from error


def _read_graph(path: Path, expected: str) -> bytes:
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    actual = digest(graph)
    if actual != expected:
        raise BundleError(f"{path}: SHA-256 is {actual}, the manifest says {expected}")
    return graph


def write(folder: Path, manifest: Manifest, graph: bytes) -> None:
    """Write a bundle under a temporary name and move it into place whole.

    Raises BundleError where the folder exists: bundles never change.
    """
    if folder.exists():
        raise BundleError(f"{folder}: exists, and a bundle is never overwritten")
    staging = folder.with_name(f".{folder.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    (staging / GRAPH_FILE).write_bytes(graph)
    text = json.dumps(manifest.model_dump(mode="json"), indent=2)
    (staging / MANIFEST_FILE).write_text(text + "\n")
    _read_manifest(staging / MANIFEST_FILE)  # what can't be read back would stop the service
    staging.rename(folder)


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
