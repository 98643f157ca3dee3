"""The way of an image: decode -> batch -> decide -> render; and of many normal ones: calibrate.

Decoding and rendering run on worker threads, the graph on the device thread, the rest on the
event loop.
"""

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

from service import heatmap, image, regions
from service.batcher import Answer
from service.calibration import Calibration, decide, finest_fpr, min_samples
from service.errors import ServiceError, TooFewSamples
from service.heatmap import Render
from service.metrics import Metrics
from service.registry import Model, Registry
from service.schemas import (
    CalibrationReference,
    Failure,
    ImageReference,
    Inspection,
    ModelReference,
    NewCalibration,
    Outlier,
    RegionOut,
    Timing,
)
from service.store import Sample, Store, new_id

T = TypeVar("T")
MAX_OUTLIERS = 10


@dataclass(frozen=True)
class Inspected:
    """An answer and its picture, which goes into the JSON or stands alone."""

    inspection: Inspection
    picture: bytes | None


@dataclass(frozen=True)
class _Decoded:
    pixels: np.ndarray | None  # (H, W, 3), kept only where the picture needs it
    resized: np.ndarray  # (h, w, 3) at the model's size
    size: tuple[int, int]  # height, width of the original
    sha256: str


class Inspector:
    """Inspects and calibrates with the registry's models."""

    def __init__(
        self, registry: Registry, store: Store, metrics: Metrics, max_image_pixels: int
    ) -> None:
        self._registry, self._store, self._metrics = registry, store, metrics
        self._max_image_pixels = max_image_pixels
        self._workers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pixels")

    async def inspect(
        self,
        model: Model,
        data: bytes,
        *,
        render: Render,
        threshold: float | None,
        request_id: str,
        started: float,
        encode: bool,
    ) -> Inspected:
        """Score one encoded image and decide; `encode` puts the picture into the JSON as base64.

        Raises the errors of `image.decode` and `Batcher.submit`.
        """
        keep = render in ("overlay", "mask")
        decoded, decode_s = await self._timed(lambda: self._decode(data, model, keep))
        answer = await model.batcher.submit(decoded.resized)
        calibration = model.calibration  # read once: it may be replaced at any time
        limit = calibration.threshold if threshold is None else float(np.float32(threshold))
        (picture, found), render_s = await self._timed(
            lambda: _depict(answer, render, limit, decoded)
        )
        score = answer.prediction.score
        inspection = Inspection(
            request_id=request_id,
            model=ModelReference.of(model),
            image=ImageReference(
                width=decoded.size[1], height=decoded.size[0], sha256=decoded.sha256
            ),
            score=score,
            threshold=limit,
            threshold_source="calibration" if threshold is None else "request",
            decision=decide(score, limit),
            p_value=calibration.p_value(score),
            calibration=CalibrationReference.of(calibration),
            regions=[RegionOut(**asdict(region)) for region in found],
            heatmap=base64.b64encode(picture).decode() if picture and encode else None,
            timing_ms=Timing(
                decode=_ms(decode_s),
                queue=_ms(answer.queue_s),
                infer=_ms(answer.infer_s),
                render=_ms(render_s),
                total=_ms(time.perf_counter() - started),
            ),
        )
        self._observe(inspection)
        return Inspected(inspection, picture)

    async def calibrate(
        self,
        model: Model,
        images: AsyncIterator[tuple[str, bytes]],
        *,
        target_fpr: float,
        activate: bool,
    ) -> NewCalibration:
        """A threshold from (name, encoded bytes) of normal images, kept and, if asked, activated.

        Samples go through the same decoding and batches as inspections. Unreadable files are
        reported and left out. Raises TooFewSamples where the rest can't promise the rate.
        """
        needed = min_samples(target_fpr)
        samples, duplicates, failed = await self._score_all(model, images)
        if len(samples) < needed:
            raise TooFewSamples(
                f"target_fpr {target_fpr:g} needs at least {needed} normal samples, got "
                f"{len(samples)} ({len(failed)} unreadable, {len(duplicates)} sent twice); "
                + (
                    f"the finest rate for {len(samples)} is {finest_fpr(len(samples)):.4g}"
                    if samples
                    else "send them as multipart fields `images`"
                ),
                samples=len(samples),
                needed=needed,
            )
        calibration = Calibration(
            new_id(), target_fpr, np.array([sample.score for sample in samples])
        )
        stored = await asyncio.to_thread(
            self._store.add,
            model.name,
            model.bundle.version,
            model.bundle.digest,
            calibration,
            samples,
            activate=activate,
        )
        if activate:
            self._registry.activate(model, calibration)
        highest = sorted(samples, key=lambda sample: -sample.score)[:MAX_OUTLIERS]
        return NewCalibration.of(
            stored,
            outliers=[Outlier(**vars(sample)) for sample in highest],
            duplicates=duplicates,
            failed=failed,
        )

    def close(self) -> None:
        self._workers.shutdown()

    async def _score_all(
        self, model: Model, images: AsyncIterator[tuple[str, bytes]]
    ) -> tuple[list[Sample], list[str], list[Failure]]:
        """Scores of all readable, distinct images; a few at a time, to leave room for inspections.

        Anything that is not the sample's own fault (a failed run, say) is raised, not reported.
        """
        samples: list[Sample] = []
        duplicates: list[str] = []
        failed: list[Failure] = []
        seen: set[str] = set()
        room = asyncio.Semaphore(2 * (os.cpu_count() or 1))

        async def score_one(name: str, data: bytes) -> None:
            try:
                decoded, _ = await self._timed(lambda: self._decode(data, model, keep=False))
            except ServiceError as error:
                failed.append(Failure(name=name, reason=str(error)))
                return
            finally:
                room.release()
            answer = await model.batcher.submit(decoded.resized)
            samples.append(Sample(name, decoded.sha256, answer.prediction.score))

        async with asyncio.TaskGroup() as tasks:
            async for name, data in images:
                sha256 = image.digest(data)
                if sha256 in seen:
                    duplicates.append(name)
                    continue
                seen.add(sha256)
                await room.acquire()
                tasks.create_task(score_one(name, data))
        return samples, duplicates, failed

    def _decode(self, data: bytes, model: Model, keep: bool) -> _Decoded:
        pixels = image.decode(data, self._max_image_pixels)
        return _Decoded(
            pixels if keep else None,
            image.resize(pixels, model.image_size),
            (pixels.shape[0], pixels.shape[1]),
            image.digest(data),
        )

    async def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """Run on a worker thread; seconds include the wait for one."""
        started = time.perf_counter()
        result = await asyncio.get_running_loop().run_in_executor(self._workers, work)
        return result, time.perf_counter() - started

    def _observe(self, inspection: Inspection) -> None:
        for stage, value in inspection.timing_ms:
            self._metrics.stage_duration.labels(stage).observe(value / 1e3)
        name = inspection.model.name
        self._metrics.image_score.labels(name).observe(inspection.score)
        self._metrics.decisions.labels(name, inspection.decision).inc()


def _depict(
    answer: Answer, render: Render, threshold: float, decoded: _Decoded
) -> tuple[bytes | None, list[regions.Region]]:
    anomaly_map = answer.prediction.anomaly_map
    picture = heatmap.render(render, anomaly_map, threshold, decoded.pixels)
    return picture, regions.find(anomaly_map, threshold, decoded.size)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
