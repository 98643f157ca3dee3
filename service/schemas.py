"""The JSON of requests and answers, as the OpenAPI shows it."""

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from service.calibration import Calibration, Decision, min_samples
from service.heatmap import MediaType
from service.registry import Model
from service.store import StoredCalibration

_REGION: JsonDict = {
    "x": 212,
    "y": 148,
    "width": 58,
    "height": 44,
    "area": 1630,
    "peak_score": 1.184,
    "peak_x": 239,
    "peak_y": 171,
    "contour": [[214, 160], [239, 150], [268, 171], [240, 190]],
}
_MODEL: JsonDict = {"name": "demo", "version": 1, "digest": "5f0c" * 16}


class ModelReference(BaseModel):
    """Which graph answered."""

    name: str
    version: int
    digest: Annotated[str, Field(description="SHA-256 of model.onnx")]

    @classmethod
    def of(cls, model: Model) -> "ModelReference":
        return cls(name=model.name, version=model.bundle.version, digest=model.bundle.digest)


class ImageReference(BaseModel):
    """Which picture was inspected."""

    width: Annotated[int, Field(description="pixels, after EXIF orientation")]
    height: int
    sha256: Annotated[str, Field(description="of the bytes that were sent")]


class CalibrationReference(BaseModel):
    """Which calibration stands behind the p-value, and behind the threshold unless overridden."""

    id: Annotated[str, Field(description="`bundle` is the bundle's own held-out normal images")]
    target_fpr: float
    samples: int

    @classmethod
    def of(cls, calibration: Calibration) -> "CalibrationReference":
        return cls(
            id=calibration.id, target_fpr=calibration.target_fpr, samples=calibration.samples
        )


class RegionOut(BaseModel):
    """A connected anomalous area, in the original image's pixels."""

    x: int
    y: int
    width: int
    height: int
    area: Annotated[int, Field(description="pixels")]
    peak_score: float
    peak_x: int
    peak_y: int
    contour: Annotated[list[tuple[int, int]], Field(description="(x, y) corners of the outline")]


class Timing(BaseModel):
    """Milliseconds of each stage, waits for its thread included; `total` is from the request's
    start to this answer."""

    decode: float
    queue: float
    infer: float
    render: float
    total: float


class Inspection(BaseModel):
    """The answer to one image."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": "0c7a3c0e5c4f4b0f9f5c1a2b3c4d5e6f",
                    "model": _MODEL,
                    "image": {"width": 512, "height": 512, "sha256": "9b74" * 16},
                    "score": 1.184,
                    "threshold": 0.731,
                    "threshold_source": "calibration",
                    "decision": "anomalous",
                    "p_value": 0.0081,
                    "calibration": {"id": "bundle", "target_fpr": 0.01, "samples": 123},
                    "regions": [_REGION],
                    "heatmap": "iVBORw0KGgo...",
                    "heatmap_type": "image/png",
                    "timing_ms": {
                        "decode": 6.1,
                        "queue": 0.2,
                        "infer": 47.5,
                        "render": 2.4,
                        "total": 57.0,
                    },
                }
            ]
        }
    )

    request_id: str
    model: ModelReference
    image: ImageReference
    score: Annotated[float, Field(description="maximum of the anomaly map; no probability")]
    threshold: float
    threshold_source: Annotated[
        Literal["calibration", "request"], Field(description="`request`: overridden by the caller")
    ]
    decision: Annotated[Decision, Field(description="`anomalous` where score >= threshold")]
    p_value: Annotated[
        float | None,
        Field(
            description="share of normal images expected to score this high or higher; null where "
            "the model is not calibrated"
        ),
    ]
    calibration: Annotated[
        CalibrationReference | None, Field(description="null where the model is not calibrated")
    ]
    regions: Annotated[
        list[RegionOut], Field(description="highest peak first; empty where decision is normal")
    ]
    heatmap: Annotated[str | None, Field(description="base64 picture of what `render` asked for")]
    heatmap_type: Annotated[
        MediaType | None, Field(description="image/png; an overlay is image/jpeg")
    ]
    timing_ms: Timing


class Outlier(BaseModel):
    name: str
    sha256: str
    score: float


class Failure(BaseModel):
    name: str
    reason: str


class CalibrationOut(BaseModel):
    """A calibration made from normal images."""

    id: str
    created: datetime
    model: ModelReference
    active: bool
    threshold: float
    target_fpr: float
    achievable_fpr: Annotated[
        float, Field(description="the rate promised: a multiple of 1 / (samples + 1)")
    ]
    samples: int
    min_samples_needed: Annotated[int, Field(description="for this target_fpr")]
    quantiles: Annotated[dict[str, float], Field(description="of the samples' scores")]

    @classmethod
    def of(cls, stored: StoredCalibration, **more: object) -> Self:
        return cls(
            id=stored.id,
            created=stored.created,
            model=ModelReference(
                name=stored.graph.model, version=stored.graph.version, digest=stored.graph.digest
            ),
            active=stored.active,
            threshold=stored.threshold,
            target_fpr=stored.target_fpr,
            achievable_fpr=stored.achievable_fpr,
            samples=stored.sample_count,
            min_samples_needed=min_samples(stored.target_fpr),
            quantiles=stored.quantiles,
            **more,
        )


class NewCalibration(CalibrationOut):
    """The answer to `POST /v1/calibrate`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "cal_3f9d0c1b2a4e5f60",
                    "created": "2026-11-22T10:15:00Z",
                    "model": _MODEL,
                    "active": True,
                    "threshold": 0.742,
                    "target_fpr": 0.01,
                    "achievable_fpr": 0.0099,
                    "samples": 150,
                    "min_samples_needed": 99,
                    "quantiles": {
                        "min": 0.31,
                        "q05": 0.35,
                        "q50": 0.44,
                        "q95": 0.61,
                        "max": 0.73,
                    },
                    "outliers": [{"name": "part-117.png", "score": 0.73, "sha256": "c3ab" * 16}],
                    "duplicates": [],
                    "failed": [{"name": "notes.txt", "reason": "the 312 bytes are no image"}],
                }
            ]
        }
    )

    outliers: Annotated[
        list[Outlier], Field(description="the samples that scored highest: look at them")
    ]
    duplicates: Annotated[
        list[str], Field(description="pictures sent more than once, counted once")
    ]
    failed: list[Failure]


class ModelOut(BaseModel):
    """A loaded model."""

    name: str
    version: int
    versions: Annotated[list[int], Field(description="on disk")]
    digest: str
    created: datetime
    image_size: Annotated[tuple[int, int], Field(description="height, width of the graph's input")]
    architecture: str
    backbone: str
    teacher: dict[str, str]
    provider: Annotated[str, Field(description="what the graph runs on")]
    precision: Annotated[str, Field(description="what its convolutions are computed in")]
    batch_sizes: Annotated[list[int], Field(description="images in one run")]
    threshold: Annotated[
        float | None, Field(description="null until an imported model is calibrated")
    ]
    calibration: CalibrationReference | None

    @classmethod
    def of(cls, model: Model, versions: list[int]) -> "ModelOut":
        manifest, calibration = model.bundle.manifest, model.calibration
        return cls(
            name=model.name,
            version=model.bundle.version,
            versions=versions,
            digest=model.bundle.digest,
            created=manifest.created,
            image_size=manifest.image_size,
            architecture=manifest.network.architecture,
            backbone=manifest.network.backbone,
            teacher=manifest.teacher.model_dump(),
            provider=model.detector.provider,
            precision=model.detector.precision,
            batch_sizes=list(model.detector.batch_sizes),
            threshold=calibration.threshold if calibration else None,
            calibration=CalibrationReference.of(calibration) if calibration else None,
        )


class Problem(BaseModel):
    """Every error: RFC 9457, as application/problem+json."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:skrd4ad:problem:too-few-samples",
                    "title": "Too few samples",
                    "status": 422,
                    "detail": "target_fpr 0.01 needs at least 99 normal samples, got 20",
                    "request_id": "0c7a3c0e5c4f4b0f9f5c1a2b3c4d5e6f",
                }
            ]
        },
    )

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class State(BaseModel):
    status: str
    detail: str | None = None
