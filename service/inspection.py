"""The way of an image: decode -> batch -> decide -> render, and a note for the trace.

Decoding and rendering run on worker threads, the graph on the device thread, the rest on the
event loop.
"""

import asyncio
import base64
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass

import numpy as np

from service import heatmap, image, regions
from service.bundle import OWN_CALIBRATION
from service.calibration import Calibration, decide
from service.errors import Uncalibrated
from service.heatmap import MEDIA_TYPES, MediaType, Render
from service.inspections import new_id
from service.metrics import Metrics
from service.model import Model
from service.schemas import (
    CalibrationReference,
    ImageReference,
    Inspection,
    ModelReference,
    RegionOut,
    ThresholdSource,
    Timing,
)
from service.shadow import Seen, Shadow
from service.trace import Trace


@dataclass(frozen=True)
class Inspected:
    """An answer, its picture, and the JSON that holds both."""

    inspection: Inspection
    picture: bytes | None
    json: bytes


@dataclass(frozen=True)
class _Decoded:
    resized: np.ndarray  # (h, w, 3) at the model's size
    size: tuple[int, int]  # height, width of the original
    sha256: str
    seconds: float  # since it was asked for, as there may have been no free worker


class Inspector:
    """Inspects with any model; decodes and renders on `workers`."""

    def __init__(
        self,
        workers: Executor,
        metrics: Metrics,
        max_pixels: int,
        trace: Trace | None = None,  # None: inspections are not recorded
        shadow_of: Callable[[Model], Shadow | None] = lambda model: None,
    ) -> None:
        self._workers, self._metrics, self._max_pixels = workers, metrics, max_pixels
        self._trace, self._shadow_of = trace, shadow_of
        self._stages = {
            stage: metrics.stage_duration.labels(stage) for stage in Timing.model_fields
        }

    async def inspect(
        self,
        model: Model,
        data: bytes,
        *,
        render: Render,
        profile: str = "",
        threshold: float | None,
        request_id: str,
        started: float,
        picture_type: MediaType | None,
        by: str,
    ) -> Inspected:
        """Score one encoded image and decide; the picture goes into the JSON where no type is
        asked for it alone.

        Raises the errors of `image.decode_to` and `Batcher.submit`, and Uncalibrated where there is
        no threshold to decide by.
        """
        _limit(model, profile, threshold)  # refused before the work, not after it
        asked = time.perf_counter()
        decoded, answer = await model.batcher.submit(
            lambda: self._decode(data, model, asked), self._workers
        )
        calibration, limit = _limit(
            model, profile, threshold
        )  # once: it may be replaced at any time
        decision = decide(answer.prediction.score, limit)
        anomalous = decision == "anomalous"
        rendering = time.perf_counter()

        def depict() -> Inspected:
            anomaly_map, score = answer.prediction.anomaly_map, answer.prediction.score
            picture = self._render(render, picture_type, anomaly_map, limit, decoded.size, data)
            found = regions.find(anomaly_map, limit, decoded.size) if anomalous else []
            shown = picture if picture_type is None else None
            inspection = Inspection(
                id=new_id(),
                request_id=request_id,
                model=ModelReference.of(model),
                profile=profile or None,
                image=ImageReference(
                    width=decoded.size[1], height=decoded.size[0], sha256=decoded.sha256
                ),
                score=score,
                threshold=limit,
                threshold_source=_source(calibration, threshold),
                decision=decision,
                p_value=calibration.p_value(score) if calibration else None,
                calibration=CalibrationReference.of(calibration) if calibration else None,
                regions=[RegionOut(**asdict(region)) for region in found],
                heatmap=base64.b64encode(shown).decode() if shown else None,
                heatmap_type=MEDIA_TYPES[render][0] if shown else None,
                timing_ms=Timing(
                    decode=_ms(decoded.seconds),
                    queue=_ms(answer.queue_s),
                    infer=_ms(answer.infer_s),
                    render=_ms(time.perf_counter() - rendering),
                    total=_ms(time.perf_counter() - started),
                ),
            )
            return Inspected(inspection, picture, inspection.model_dump_json().encode())

        # A good part without a picture is done sooner than a worker would be called.
        if render != "none" or anomalous:
            loop = asyncio.get_running_loop()
            inspected = await loop.run_in_executor(self._workers, depict)
        else:
            inspected = depict()
        self._observe(inspected.inspection)
        if self._trace:
            self._trace.record(inspected.inspection, data, by)
        if calibration is not None and (shadow := self._shadow_of(model)) is not None:
            id, score = inspected.inspection.id, answer.prediction.score
            seen = Seen(id, data, decoded.resized, profile, score, calibration)
            shadow.offer(seen, self._workers)
        return inspected

    def _decode(self, data: bytes, model: Model, asked: float) -> _Decoded:
        resized, size = image.decode_to(data, model.image_size, self._max_pixels)
        return _Decoded(resized, size, image.digest(data), time.perf_counter() - asked)

    def _render(
        self,
        kind: Render,
        media_type: MediaType | None,
        anomaly_map: np.ndarray,
        threshold: float,
        size: tuple[int, int],
        data: bytes,
    ) -> bytes | None:
        if kind == "heatmap":
            return heatmap.heatmap(anomaly_map, threshold)
        if kind == "mask":
            return heatmap.mask(anomaly_map, threshold, size)
        if kind == "overlay":
            # Decoded anew: full-size pixels of everybody who waits would fill the memory.
            pixels = image.decode(data, self._max_pixels)
            return heatmap.overlay(anomaly_map, threshold, pixels, media_type or "image/jpeg")
        return None

    def _observe(self, inspection: Inspection) -> None:
        for stage, value in inspection.timing_ms:
            self._stages[stage].observe(value / 1e3)
        name = inspection.model.name
        self._metrics.image_score.labels(name).observe(inspection.score)
        self._metrics.decisions.labels(name, inspection.decision).inc()


def _limit(model: Model, profile: str, threshold: float | None) -> tuple[Calibration | None, float]:
    """The calibration in force, and the threshold to decide by: the request's, if it has one."""
    calibration = model.calibration_for(profile)
    if threshold is not None:
        return calibration, float(np.float32(threshold))
    if calibration is None:
        raise Uncalibrated(
            f"model {model.name}/{model.bundle.version} has no threshold: calibrate it with "
            "POST /v1/calibrate, or give threshold=..."
        )
    return calibration, calibration.threshold


def _source(calibration: Calibration | None, threshold: float | None) -> ThresholdSource:
    if threshold is not None or calibration is None:
        return "request"
    return "bundle" if calibration.id == OWN_CALIBRATION else "calibration"


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
