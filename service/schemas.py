"""The JSON of requests and answers, as the OpenAPI shows it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from service.bundle import OWN_CALIBRATION
from service.calibration import Calibration, Decision, min_samples
from service.calibrator import Examined, Scored
from service.contamination import TEST, Tail
from service.feedback import Summary
from service.heatmap import MediaType
from service.inspections import Feedback, Found
from service.model import Model
from service.registry import Listed, RolledOut
from service.rollouts import Candidate, ModelActivation, Tally
from service.shadow import COMPARED, OUTCOMES
from service.store import Activation, Sample, StoredCalibration
from service.watch import Report

ThresholdSource = Literal["calibration", "bundle", "request"]
NOTE_LENGTH = 1000

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
    profile: Annotated[str | None, Field(description="that it was made for; null: whole model")]
    target_fpr: float
    confidence: float | None
    samples: int

    @classmethod
    def of(cls, calibration: Calibration) -> "CalibrationReference":
        return cls(
            id=calibration.id,
            profile=calibration.profile or None,
            target_fpr=calibration.target_fpr,
            confidence=calibration.confidence,
            samples=calibration.samples,
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
                    "id": "ins_019ac02f6b1d9c4e7a2b5d8f0136",
                    "request_id": "0c7a3c0e5c4f4b0f9f5c1a2b3c4d5e6f",
                    "model": _MODEL,
                    "profile": None,
                    "image": {"width": 512, "height": 512, "sha256": "9b74" * 16},
                    "score": 1.184,
                    "threshold": 0.731,
                    "threshold_source": "bundle",
                    "decision": "anomalous",
                    "p_value": 0.0081,
                    "calibration": {
                        "id": "bundle",
                        "profile": None,
                        "target_fpr": 0.01,
                        "confidence": None,
                        "samples": 123,
                    },
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

    id: Annotated[str, Field(description="of this inspection; in the order of time")]
    request_id: str
    model: ModelReference
    profile: Annotated[str | None, Field(description="that the request named")]
    image: ImageReference
    score: Annotated[float, Field(description="maximum of the anomaly map; no probability")]
    threshold: float
    threshold_source: Annotated[
        ThresholdSource,
        Field(
            description="`bundle`: from the held-out images of training, as nobody calibrated this "
            "version; `request`: overridden by the caller"
        ),
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


class SampleOut(BaseModel):
    """A normal image of a calibration."""

    name: str
    sha256: Annotated[str, Field(description="of the file that was sent")]
    score: float
    excluded: bool
    engine: Annotated[str | None, Field(description="what it was scored by")]
    heatmap: Annotated[str, Field(description="path of its heatmap, kept for the highest scores")]

    @classmethod
    def of(cls, calibration: str, sample: Sample) -> "SampleOut":
        return cls(
            name=sample.name,
            sha256=sample.sha256,
            score=sample.score,
            excluded=sample.excluded,
            engine=sample.engine,
            heatmap=f"/v1/calibrations/{calibration}/samples/{sample.sha256}/heatmap",
        )


class Failure(BaseModel):
    name: str
    reason: str


class SamplesAdded(BaseModel):
    """What became of pictures that were sent to an open calibration."""

    id: str
    added: int
    samples: Annotated[int, Field(description="that count now")]
    excluded: int
    duplicates: Annotated[list[str], Field(description="that it had already")]
    failed: list[Failure]


class TailOut(BaseModel):
    """Whether the highest samples stand apart from the others, as defects among them would."""

    test: str
    p_value: Annotated[
        float | None,
        Field(description="of clean samples; null where there are too few to tell, or unknown"),
    ]
    suspects: Annotated[int, Field(description="how many of the highest samples stand apart")]

    @classmethod
    def of(cls, tail: Tail) -> "TailOut":
        return cls(test=TEST, p_value=tail.p_value, suspects=tail.suspects)


class CalibrationOut(BaseModel):
    """A calibration made from normal images; what it promises is null while it is open."""

    id: str
    created: datetime
    created_by: Annotated[str, Field(description="name of the key; empty where none was asked for")]
    model: ModelReference
    profile: Annotated[str | None, Field(description="null: for the whole model")]
    source: Annotated[str | None, Field(description="the calibration whose samples it began with")]
    state: Literal["open", "finished", "deleted"]
    active: bool
    finished: datetime | None
    deleted: datetime | None
    deleted_by: str | None
    threshold: float | None
    target_fpr: float | None
    confidence: float | None
    achievable_fpr: Annotated[
        float | None,
        Field(
            description="the rate promised: a multiple of 1 / (samples + 1), or what is kept with "
            "the confidence"
        ),
    ]
    samples: Annotated[int | None, Field(description="that count; null while it is open")]
    min_samples_needed: Annotated[int | None, Field(description="for this promise")]
    quantiles: Annotated[dict[str, float] | None, Field(description="of the samples' scores")]

    @classmethod
    def of(cls, stored: StoredCalibration, **more: object) -> Self:
        finish, graph = stored.finish, stored.graph
        promise: dict[str, Any] = dict.fromkeys(_PROMISE)
        if finish:
            promise = {name: getattr(finish, name) for name in _PROMISE}
            needed = min_samples(finish.target_fpr, finish.confidence)
            promise |= {"finished": finish.at, "min_samples_needed": needed}
        return cls.model_validate(
            {
                "id": stored.id,
                "created": stored.created,
                "created_by": stored.created_by,
                "model": ModelReference(
                    name=graph.model, version=graph.version, digest=graph.digest
                ),
                "profile": stored.profile or None,
                "source": stored.source,
                "state": "deleted" if stored.deleted else "finished" if finish else "open",
                "active": stored.active,
                "finished": None,
                "min_samples_needed": None,
                "deleted": stored.deleted,
                "deleted_by": stored.deleted_by,
            }
            | promise
            | more
        )


_PROMISE = (
    "threshold",
    "target_fpr",
    "confidence",
    "achievable_fpr",
    "samples",
    "quantiles",
)


class CalibrationDetail(CalibrationOut):
    """A calibration, and what can be seen of its samples."""

    note: Annotated[str | None, Field(description="what somebody should look at")]
    excluded: int
    engines: Annotated[list[str], Field(description="what the samples were scored by")]
    tail: TailOut
    outliers: Annotated[
        list[SampleOut], Field(description="the samples that scored highest: look at them")
    ]

    @classmethod
    def of_examined(cls, examined: Examined, **more: object) -> Self:
        id = examined.stored.id
        return cls.of(
            examined.stored,
            **{
                "note": examined.note,
                "samples": examined.counts.counted,
                "excluded": examined.counts.excluded,
                "engines": examined.engines,
                "tail": TailOut.of(examined.tail),
                "outliers": [SampleOut.of(id, sample) for sample in examined.highest],
            }
            | more,
        )


class NewCalibration(CalibrationDetail):
    """The answer to `POST /v1/calibrate`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "cal_3f9d0c1b2a4e5f60",
                    "created": "2026-11-22T10:15:00Z",
                    "created_by": "line-3",
                    "model": _MODEL,
                    "profile": None,
                    "source": None,
                    "state": "finished",
                    "active": True,
                    "finished": "2026-11-22T10:15:00Z",
                    "deleted": None,
                    "deleted_by": None,
                    "threshold": 0.742,
                    "target_fpr": 0.01,
                    "confidence": None,
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
                    "note": None,
                    "excluded": 0,
                    "engines": ["CPUExecutionProvider in float32"],
                    "tail": {"test": TEST, "p_value": 0.41, "suspects": 0},
                    "outliers": [
                        {
                            "name": "part-117.png",
                            "sha256": "c3ab" * 16,
                            "score": 0.73,
                            "excluded": False,
                            "engine": "CPUExecutionProvider in float32",
                            "heatmap": "/v1/calibrations/cal_3f9d0c1b2a4e5f60/samples/"
                            + "c3ab" * 16
                            + "/heatmap",
                        }
                    ],
                    "duplicates": [],
                    "failed": [{"name": "notes.txt", "reason": "the 312 bytes are no image"}],
                }
            ]
        }
    )

    duplicates: Annotated[
        list[str], Field(description="pictures sent more than once, counted once")
    ]
    failed: list[Failure]

    @classmethod
    def of_samples(cls, examined: Examined, scored: Scored) -> "NewCalibration":
        failed = [Failure(name=name, reason=reason) for name, reason in scored.failed]
        return cls.of_examined(examined, duplicates=scored.duplicates, failed=failed)


class ActivationOut(BaseModel):
    """A change of what is in force."""

    at: datetime
    by: str
    model: ModelReference
    profile: str | None
    calibration: Annotated[
        str | None,
        Field(description="`bundle`: its own threshold; null: a profile goes by its model's"),
    ]
    threshold: Annotated[
        float | None, Field(description="of the calibration; null: of the bundle, or the model's")
    ]
    rolled_back: Annotated[bool, Field(description="went back to what was before")]

    @classmethod
    def of(cls, activation: Activation) -> "ActivationOut":
        graph = activation.graph
        return cls(
            at=activation.at,
            by=activation.by,
            model=ModelReference(name=graph.model, version=graph.version, digest=graph.digest),
            profile=activation.profile or None,
            calibration=activation.calibration or (None if activation.profile else OWN_CALIBRATION),
            threshold=activation.threshold,
            rolled_back=activation.rolls_back,
        )


class ModelOut(BaseModel):
    """A version of a model on disk; what it runs on and decides by is null unless it is loaded."""

    name: str
    version: int
    versions: Annotated[list[int], Field(description="of the model, on disk")]
    active: Annotated[bool, Field(description="answers where a request names no version")]
    shadow: Annotated[bool, Field(description="tried beside the active one")]
    loaded: bool
    error: Annotated[str | None, Field(description="why its bundle can't be read")]
    digest: str | None
    created: datetime | None
    image_size: Annotated[
        tuple[int, int] | None, Field(description="height, width of the graph's input")
    ]
    architecture: str | None
    backbone: str | None
    teacher: dict[str, str] | None
    golden: Annotated[bool, Field(description="checked by a golden picture whenever it is loaded")]
    provider: Annotated[str | None, Field(description="what the graph runs on")]
    precision: Annotated[str | None, Field(description="what its convolutions are computed in")]
    batch_sizes: Annotated[list[int] | None, Field(description="images in one run")]
    threshold: Annotated[
        float | None, Field(description="null until an imported model is calibrated")
    ]
    calibration: CalibrationReference | None
    profiles: Annotated[
        dict[str, CalibrationReference], Field(description="with a calibration of their own")
    ]

    @classmethod
    def of(cls, listed: Listed) -> "ModelOut":
        manifest, model = listed.manifest, listed.model
        detector, calibration = (model.detector, model.calibration) if model else (None, None)
        return cls(
            name=listed.name,
            version=listed.version,
            versions=listed.versions,
            active=listed.active,
            shadow=listed.shadow,
            loaded=model is not None,
            error=listed.error,
            digest=manifest.graph.sha256 if manifest else None,
            created=manifest.created if manifest else None,
            image_size=manifest.image_size if manifest else None,
            architecture=manifest.network.architecture if manifest else None,
            backbone=manifest.network.backbone if manifest else None,
            teacher=manifest.teacher.model_dump() if manifest else None,
            golden=manifest is not None and manifest.golden is not None,
            provider=detector.provider if detector else None,
            precision=detector.precision if detector else None,
            batch_sizes=list(detector.batch_sizes) if detector else None,
            threshold=calibration.threshold if calibration else None,
            calibration=CalibrationReference.of(calibration) if calibration else None,
            profiles={
                profile: CalibrationReference.of(own)
                for profile, own in sorted(model.calibrations.items() if model else ())
                if profile
            },
        )


class RecordedImage(ImageReference):
    bytes: Annotated[int, Field(description="that were sent")]
    archived: Annotated[
        bool, Field(description="handed to the archive, which may have removed it since")
    ]


class RecordedInspection(BaseModel):
    """An inspection, as it was answered."""

    id: str
    at: datetime
    request_id: Annotated[str, Field(description="the caller's own may come more than once")]
    by: Annotated[str, Field(description="name of the key that asked")]
    model: ModelReference
    profile: str | None
    image: RecordedImage
    score: float
    threshold: float
    threshold_source: ThresholdSource
    decision: Decision
    p_value: float | None
    calibration: Annotated[str | None, Field(description="id; `bundle`: the bundle's own")]
    timing_ms: Timing
    label: Annotated[Decision | None, Field(description="what feedback said last")]

    @classmethod
    def of(cls, found: Found, **more: object) -> Self:
        record = found.record
        row = record._asdict()
        timing = {stage: row[f"{stage}_ms"] for stage in Timing.model_fields}
        values = {
            "model": {"name": record.model, "version": record.version, "digest": record.digest},
            "profile": record.profile or None,
            "image": {name: row[name] for name in RecordedImage.model_fields},
            "timing_ms": timing,
            "label": found.label,
        }
        return cls.model_validate(row | values | more)


class Inspections(BaseModel):
    """A page of recorded inspections."""

    inspections: Annotated[list[RecordedInspection], Field(description="newest first")]
    next: Annotated[str | None, Field(description="`after` of the next page; null on the last")]


class FeedbackIn(BaseModel):
    """What an inspected part really was."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"label": "normal", "note": "a reflection"}]},
    )

    label: Decision
    note: Annotated[
        str, Field(max_length=NOTE_LENGTH, pattern="^[^\\x00]*$", description="without NUL")
    ] = ""


class FeedbackOut(BaseModel):
    """What somebody said of an inspection."""

    inspection: str
    label: Decision
    note: str
    by: str
    at: datetime


class InspectionDetail(RecordedInspection):
    """An inspection, and all that was said of it."""

    feedback: Annotated[list[FeedbackOut], Field(description="the last first, which counts")]

    @classmethod
    def of_feedback(cls, found: Found, said: Sequence[Feedback]) -> Self:
        return cls.of(found, feedback=[vars(one) for one in said])


class RateOut(BaseModel):
    rate: Annotated[float | None, Field(description="null where nothing of the kind is labelled")]
    low: Annotated[float, Field(description="of the exact 95 % interval (Clopper-Pearson)")]
    high: float


class AdviceOut(BaseModel):
    """Thresholds with the fewest errors on labelled parts. Nothing applies them."""

    above: Annotated[float | None, Field(description="not itself; null: as low as one likes")]
    up_to: Annotated[float | None, Field(description="itself; null: as high as one likes")]
    false_positives: int
    false_negatives: int


class ModelFeedback(BaseModel):
    """Decisions of one graph beside what people said of the parts; of labelled ones alone, which
    are rarely a fair sample."""

    model: ModelReference
    normal: Annotated[int, Field(description="inspections whose last label it is")]
    anomalous: int
    true_positives: Annotated[int, Field(description="anomalous, and decided so")]
    false_positives: int
    true_negatives: int
    false_negatives: int
    false_positive_rate: Annotated[RateOut, Field(description="of normal parts")]
    detection_rate: Annotated[RateOut, Field(description="of anomalous parts")]
    threshold_advice: AdviceOut

    @classmethod
    def of(cls, model: str, summary: Summary) -> "ModelFeedback":
        counts = summary.confusion
        return cls(
            model=ModelReference(name=model, version=summary.version, digest=summary.digest),
            normal=counts.false_positives + counts.true_negatives,
            anomalous=counts.true_positives + counts.false_negatives,
            **vars(counts),
            false_positive_rate=RateOut(**vars(counts.false_positive_rate)),
            detection_rate=RateOut(**vars(counts.detection_rate)),
            threshold_advice=AdviceOut(**vars(summary.advice)),
        )


class DriftAlarm(BaseModel):
    at: datetime
    images: Annotated[int, Field(description="that had been tested then")]


class DriftOut(BaseModel):
    """Whether images that were decided normal still score as the calibration's did."""

    model: ModelReference
    profile: str | None
    calibration: CalibrationReference
    since: Annotated[
        datetime | None, Field(description="of the last reset; null: since it is in force")
    ]
    images: Annotated[int, Field(description="tested so far")]
    statistic: Annotated[float, Field(description="evidence of a change: an alarm at run_length")]
    run_length: Annotated[
        float, Field(description="images until a false alarm, on average, at least")
    ]
    alarm: Annotated[DriftAlarm | None, Field(description="stays until a reset or a calibration")]
    distance: Annotated[
        float | None,
        Field(description="Kolmogorov and Smirnov's, of the last 200 scores to the calibration's"),
    ]
    histogram: Annotated[
        list[int],
        Field(description="of the last 200 p-values in ten equal parts of (0, 1]: flat, if all is"),
    ]

    @classmethod
    def of(cls, model: Model, profile: str, report: Report) -> "DriftOut":
        alarm = report.alarm
        return cls(
            model=ModelReference.of(model),
            profile=profile or None,
            calibration=CalibrationReference.of(report.calibration),
            since=report.since,
            images=report.images,
            statistic=report.statistic,
            run_length=report.run_length,
            alarm=DriftAlarm(at=alarm.at, images=alarm.images) if alarm else None,
            distance=report.distance,
            histogram=report.histogram,
        )


class ModelActivationOut(BaseModel):
    """A change of which version serves."""

    at: datetime
    by: str
    version: int
    digest: str
    rolled_back: Annotated[bool, Field(description="went back to what was before")]

    @classmethod
    def of(cls, activation: ModelActivation) -> "ModelActivationOut":
        return cls(
            at=activation.at,
            by=activation.by,
            version=activation.graph.version,
            digest=activation.graph.digest,
            rolled_back=activation.rolls_back,
        )


class ModelDetail(BaseModel):
    """A model: its versions, and who let which one serve when."""

    name: str
    active: Annotated[int | None, Field(description="the version that serves here")]
    shadow: Annotated[int | None, Field(description="the version that is tried beside it here")]
    problems: Annotated[
        list[str], Field(description="why something else serves or is tried than was asked for")
    ]
    versions: Annotated[list[ModelOut], Field(description="newest first")]
    activations: Annotated[list[ModelActivationOut], Field(description="newest first")]

    @classmethod
    def of(
        cls,
        name: str,
        listed: list[Listed],
        problems: list[str],
        activations: list[ModelActivation],
    ) -> "ModelDetail":
        return cls(
            name=name,
            active=next((each.version for each in listed if each.active), None),
            shadow=next((each.version for each in listed if each.shadow), None),
            problems=problems,
            versions=[ModelOut.of(each) for each in listed],
            activations=[ModelActivationOut.of(each) for each in activations],
        )


class Activated(BaseModel):
    """A version that serves from now on, and what it decides by."""

    model: ModelReference
    replaced: Annotated[int | None, Field(description="the version that served before")]
    threshold: Annotated[float | None, Field(description="null: calibrate it first")]
    threshold_source: Annotated[
        ThresholdSource | None, Field(description="`bundle`, or `calibration` of this version")
    ]
    calibration: CalibrationReference | None
    uncalibrated_profiles: Annotated[
        list[str],
        Field(
            description="that had a calibration of their own of the version before, and go by the "
            "threshold above until they are calibrated anew"
        ),
    ]

    @classmethod
    def of(cls, rolled_out: RolledOut) -> "Activated":
        model, replaced = rolled_out.model, rolled_out.replaced
        calibration = model.calibration
        source: ThresholdSource | None = None
        if calibration:
            source = "bundle" if calibration.id == OWN_CALIBRATION else "calibration"
        return cls(
            model=ModelReference.of(model),
            replaced=replaced.version if replaced else None,
            threshold=calibration.threshold if calibration else None,
            threshold_source=source,
            calibration=CalibrationReference.of(calibration) if calibration else None,
            uncalibrated_profiles=rolled_out.left,
        )


class ShadowOut(BaseModel):
    """A version that scores what the active one answers, and what all services counted of it."""

    model: ModelReference
    since: datetime
    until: Annotated[datetime | None, Field(description="null while it is tried")]
    by: str
    same: Annotated[int, Field(description="images on which both decided the same")]
    normal_to_anomalous: Annotated[int, Field(description="that the shadow calls anomalous")]
    anomalous_to_normal: Annotated[int, Field(description="that the shadow calls normal")]
    failed: int
    dropped: Annotated[int, Field(description="because the shadow could not keep up")]
    mean_score_difference: Annotated[
        float | None, Field(description="each score over its own threshold; null before any image")
    ]
    mean_p_value_difference: float | None

    @classmethod
    def of(
        cls, candidate: Candidate, until: datetime | None, tallies: dict[str, Tally]
    ) -> "ShadowOut":
        graph = candidate.graph
        compared = sum((tallies.get(outcome, Tally()) for outcome in COMPARED), Tally())
        images = compared.images
        return cls(
            model=ModelReference(name=graph.model, version=graph.version, digest=graph.digest),
            since=candidate.at,
            until=until,
            by=candidate.by,
            mean_score_difference=compared.score_difference / images if images else None,
            mean_p_value_difference=compared.p_value_difference / images if images else None,
            **{outcome: tallies.get(outcome, Tally()).images for outcome in OUTCOMES},
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
