"""The way of an image: decode -> batch -> decide -> render; and of many normal ones: calibrate.

Decoding and rendering run on worker threads, the graph on the device thread, the rest on the
event loop.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from service import cores, heatmap, image, regions
from service.calibration import Calibration, decide, finest_fpr, min_samples
from service.errors import (
    InvalidImage,
    Overloaded,
    TooFewSamples,
    TooLarge,
    TrainedOn,
    Uncalibrated,
    UnknownCalibration,
    UnsupportedFormat,
)
from service.heatmap import MEDIA_TYPES, MediaType, Render
from service.metrics import Metrics
from service.registry import Model, Registry
from service.schemas import (
    CalibrationOut,
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
from service.settings import Settings
from service.store import Graph, Sample, Store, StoredCalibration, new_id

T = TypeVar("T")
MAX_OUTLIERS = 10


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


@dataclass(frozen=True)
class _DecodedSample(_Decoded):
    pixels_sha256: str  # of what the graph sees


@dataclass(frozen=True)
class _Scored:
    """A sample of a calibration, with the digest of the pixels that the graph saw."""

    sample: Sample
    pixels_sha256: str


class Inspector:
    """Inspects and calibrates with the registry's models."""

    def __init__(
        self, registry: Registry, store: Store, metrics: Metrics, settings: Settings
    ) -> None:
        self._registry, self._store, self._metrics = registry, store, metrics
        self._settings = settings
        self._workers = ThreadPoolExecutor(cores.available(), thread_name_prefix="pixels")
        self._activation = asyncio.Lock()
        self._calibrating = False

    async def inspect(
        self,
        model: Model,
        data: bytes,
        *,
        render: Render,
        threshold: float | None,
        request_id: str,
        started: float,
        picture_type: MediaType | None,
    ) -> Inspected:
        """Score one encoded image and decide; the picture goes into the JSON where no type is
        asked for it alone.

        Raises the errors of `image.decode_to` and `Batcher.submit`, and Uncalibrated where there is
        no threshold to decide by.
        """
        _limit(model, threshold)  # refused before the work, not after it
        asked = time.perf_counter()
        decoded, answer = await model.batcher.submit(
            lambda: self._decode(data, model, asked), self._workers
        )
        calibration, limit = _limit(model, threshold)  # once: it may be replaced at any time
        rendering = time.perf_counter()

        def depict() -> Inspected:
            anomaly_map, score = answer.prediction.anomaly_map, answer.prediction.score
            picture = self._render(render, picture_type, anomaly_map, limit, decoded.size, data)
            found = regions.find(anomaly_map, limit, decoded.size)
            shown = picture if picture_type is None else None
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
        drawn = render != "none" or answer.prediction.score >= limit
        if drawn:
            loop = asyncio.get_running_loop()
            inspected = await loop.run_in_executor(self._workers, depict)
        else:
            inspected = depict()
        self._observe(inspected.inspection)
        return inspected

    async def calibrate(
        self,
        model: Model,
        images: AsyncIterator[tuple[str, bytes]],
        *,
        target_fpr: float,
        activate: bool,
    ) -> NewCalibration:
        """A threshold from (name, encoded bytes) of normal images, kept and, if asked, activated.

        Samples go through the same decoding and batches as inspections. Unreadable files, and
        those that the model was trained on, are reported and left out. Raises TooFewSamples where
        the rest can't promise the rate, and Overloaded while another calibration is under way.
        """
        if self._calibrating:
            raise Overloaded("another calibration is under way; the limit is one at a time")
        self._calibrating = True
        try:
            scored, failed = await self._score_all(model, images)
        finally:
            self._calibrating = False
        samples, duplicates = _distinct(scored)
        calibration = self._calibration(target_fpr, samples, duplicates, failed)

        def keep() -> tuple[StoredCalibration, Calibration | None]:
            stored = self._store.add(model.graph, calibration, samples, activate=activate)
            return stored, calibration if activate else None

        stored = await self._store_then_use(model.graph, keep)
        highest = sorted(samples, key=lambda sample: -sample.score)[:MAX_OUTLIERS]
        return NewCalibration.of(
            stored,
            outliers=[Outlier(**vars(sample)) for sample in highest],
            duplicates=duplicates,
            failed=failed,
        )

    async def activate(self, id: str) -> CalibrationOut:
        """Make a calibration that was kept the active one of its graph.

        Raises UnknownCalibration, UnknownModel, or DigestMismatch where another graph now lies
        under its model and version.
        """
        stored = await asyncio.to_thread(self._store.get, id)
        if stored is None:
            raise UnknownCalibration(f"there is no calibration {id!r}")
        graph = stored.graph
        await self._registry.get(graph.model, graph.version, graph.digest)

        def take_up() -> tuple[None, Calibration | None]:
            self._store.activate(stored)
            return None, self._store.active(graph)

        await self._store_then_use(graph, take_up)
        return CalibrationOut.of(replace(stored, active=True))

    async def deactivate(self, model: Model) -> CalibrationReference:
        """Go back to the threshold of the model's own bundle; Uncalibrated where it has none."""
        calibration = model.bundle.default_calibration()
        if calibration is None:
            raise Uncalibrated(
                f"the bundle of {model.name}/{model.bundle.version} brought no threshold to go "
                "back to: activate another calibration instead"
            )

        def drop() -> tuple[Calibration, Calibration]:
            self._store.deactivate(model.graph)
            return calibration, calibration

        return CalibrationReference.of(await self._store_then_use(model.graph, drop))

    def close(self) -> None:
        self._workers.shutdown()

    async def _store_then_use(
        self, graph: Graph, write: Callable[[], tuple[T, Calibration | None]]
    ) -> T:
        """Run `write`, which gives its result and the calibration that is active from now on.

        One at a time, so that database and memory follow the same order; and to the end, even
        where the caller leaves or times out, so that they never part.
        """

        async def change() -> T:
            async with self._activation:
                result, calibration = await asyncio.to_thread(write)
                if calibration is not None:
                    self._registry.activate(graph, calibration)
                return result

        return await asyncio.shield(change())

    def _calibration(
        self,
        target_fpr: float,
        samples: list[Sample],
        duplicates: list[str],
        failed: list[Failure],
    ) -> Calibration:
        needed = min_samples(target_fpr)
        if len(samples) < needed:
            hint = (
                f"the finest rate for {len(samples)} is {finest_fpr(len(samples)):.4g}"
                if samples
                else "send them as multipart fields `images`"
            )
            raise TooFewSamples(
                f"target_fpr {target_fpr:g} needs at least {needed} normal samples, got "
                f"{len(samples)} ({len(failed)} refused, {len(duplicates)} sent twice); {hint}",
                samples=len(samples),
                needed=needed,
            )
        scores = np.array([sample.score for sample in samples])
        return Calibration(new_id(), target_fpr, scores)

    async def _score_all(
        self, model: Model, images: AsyncIterator[tuple[str, bytes]]
    ) -> tuple[list[_Scored], list[Failure]]:
        """Scores of all readable images in the order sent, and what became of the others.

        A few are under way at a time, so that an inspection never waits behind thousands. What is
        not the sample's own fault (a failed run, say) is raised, not reported.
        """
        scored: dict[int, _Scored] = {}
        failed: dict[int, Failure] = {}
        room = asyncio.Semaphore(max(2 * cores.available(), model.detector.batch_sizes[-1]))

        async def score_one(number: int, name: str, data: bytes) -> None:
            try:
                decode = partial(self._decode_sample, data, model)
                scoring = model.batcher.submit(decode, self._workers)
                del data, decode  # up to MAX_IMAGE_BYTES; not to be kept while its image waits
                decoded, answer = await scoring
                sample = Sample(name, decoded.sha256, answer.prediction.score)
                scored[number] = _Scored(sample, decoded.pixels_sha256)
            except (InvalidImage, TooLarge, UnsupportedFormat, TrainedOn) as error:
                failed[number] = Failure(name=name, reason=str(error))
            finally:
                room.release()

        number = 0
        async with asyncio.TaskGroup() as tasks:
            async for name, data in images:
                await room.acquire()
                tasks.create_task(score_one(number, name, data))
                number += 1
        return [scored[i] for i in sorted(scored)], [failed[i] for i in sorted(failed)]

    def _decode(self, data: bytes, model: Model, asked: float) -> _Decoded:
        limit = self._settings.max_image_pixels
        resized, size = image.decode_to(data, model.image_size, limit)
        return _Decoded(resized, size, image.digest(data), time.perf_counter() - asked)

    def _decode_sample(self, data: bytes, model: Model) -> _DecodedSample:
        limit = self._settings.max_image_bytes
        if len(data) > limit:
            raise TooLarge(f"the file is too large: the limit is {limit} bytes")
        decoded = self._decode(data, model, time.perf_counter())
        if decoded.sha256 in model.trained:
            raise TrainedOn("the model was trained on this file: it would score too low")
        pixels_sha256 = image.digest(decoded.resized.tobytes())
        return _DecodedSample(**vars(decoded), pixels_sha256=pixels_sha256)

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
            pixels = image.decode(data, self._settings.max_image_pixels)
            return heatmap.overlay(anomaly_map, threshold, pixels, media_type or "image/jpeg")
        return None

    def _observe(self, inspection: Inspection) -> None:
        for stage, value in inspection.timing_ms:
            self._metrics.stage_duration.labels(stage).observe(value / 1e3)
        name = inspection.model.name
        self._metrics.image_score.labels(name).observe(inspection.score)
        self._metrics.decisions.labels(name, inspection.decision).inc()


def _limit(model: Model, threshold: float | None) -> tuple[Calibration | None, float]:
    """The calibration in force, and the threshold to decide by: the request's, if it has one."""
    calibration = model.calibration
    if threshold is not None:
        return calibration, float(np.float32(threshold))
    if calibration is None:
        raise Uncalibrated(
            f"model {model.name}/{model.bundle.version} has no threshold: calibrate it with "
            "POST /v1/calibrate, or give threshold=..."
        )
    return calibration, calibration.threshold


def _distinct(scored: list[_Scored]) -> tuple[list[Sample], list[str]]:
    """Samples whose pixels differ, and the names of the others: a copy is no second sample."""
    seen: set[str] = set()
    samples, duplicates = [], []
    for one in scored:
        if one.pixels_sha256 in seen:
            duplicates.append(one.sample.name)
        else:
            samples.append(one.sample)
        seen.add(one.pixels_sha256)
    return samples, duplicates


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
