"""The life of a calibration: opened, filled with normal images, looked at, finished, in force.

Samples go through the same decoding and batches as inspections. What is scored is stored at once,
so that nothing is scored twice: not after a restart, and not in a calibration made from another.
"""

import asyncio
import heapq
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import numpy as np

from service import contamination, cores, heatmap, image
from service.calibration import Calibration, check_samples
from service.completion import on_thread_to_end, to_end
from service.contamination import Tail
from service.errors import (
    InvalidImage,
    InvalidParameter,
    Overloaded,
    TooLarge,
    TrainedOn,
    Uncalibrated,
    UnknownSample,
    UnsupportedFormat,
)
from service.model import Model
from service.registry import Registry
from service.settings import Settings
from service.store import (
    MAPS_KEPT,
    Counts,
    Graph,
    Made,
    Sample,
    Store,
    StoredCalibration,
    check_open,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
Images = AsyncGenerator[tuple[str, bytes]]
Activate = Literal["true", "false", "unless_suspect"]
HIGHEST = 10  # samples that are shown with a calibration
MAX_NAME = 255  # characters of a sample's name, from its end
_STORED_TOGETHER = 64  # samples; a crash loses no more of those that were scored


@dataclass(frozen=True)
class Promise:
    """What is asked of a calibration, and whether it is to be in force then."""

    target_fpr: float
    confidence: float | None = None
    activate: Activate = "unless_suspect"


@dataclass
class Scored:
    """What became of images that were sent as samples."""

    samples: list[Sample] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)  # names of those that were there already
    failed: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)

    def add(self, other: "Scored") -> None:
        self.samples += other.samples
        self.duplicates += other.duplicates
        self.failed += other.failed

    def mark_duplicates(self, taken: Sequence[Sample]) -> None:
        """These samples were there already."""
        self.duplicates += [sample.name for sample in taken]
        there = {id(sample) for sample in taken}
        self.samples = [sample for sample in self.samples if id(sample) not in there]


@dataclass(frozen=True)
class Examined:
    """A calibration with what can be seen of its samples."""

    stored: StoredCalibration
    counts: Counts
    engines: list[str]
    tail: Tail
    highest: list[Sample]

    @property
    def note(self) -> str | None:
        """What somebody should look at: samples that stand apart as defects do."""
        if not self.tail.suspects:
            return None
        seen = (
            f"{self.tail.suspects} of the samples stand apart as defects do (p-value "
            f"{self.tail.p_value:.2g}): look at the outliers"
        )
        if self.stored.finish is None:
            return f"{seen}, and exclude those that are no good parts before it is finished"
        state = "in force" if self.stored.active else "not in force"
        return (
            f"{state}: {seen}; activate it if they are good parts, else open another with "
            f"source={self.stored.id}, exclude them and finish that"
        )


@dataclass(frozen=True)
class _Prepared:
    resized: np.ndarray  # (h, w, 3) at the model's size
    sha256: str
    pixels_sha256: str


class _Known(Exception):
    """A file that the calibration has already."""


class Calibrator:
    """Makes calibrations of the registry's models and puts them in force; decodes on `workers`."""

    def __init__(
        self, registry: Registry, store: Store, workers: Executor, settings: Settings
    ) -> None:
        self._registry, self._store, self._workers = registry, store, workers
        self._settings = settings
        self._scoring = False

    async def calibrate(
        self, model: Model, images: Images, promise: Promise, *, profile: str, by: str
    ) -> tuple[Examined, Scored]:
        """A calibration from (name, encoded bytes) of normal images, at once.

        Unreadable files, and those that the model was trained on, are reported and left out. Raises
        TooFewSamples where the rest can't keep the promise, and Overloaded while samples of another
        calibration are scored.
        """
        scored = Scored()

        async def collect(part: Scored) -> None:
            scored.add(part)

        await self._score(model, images, set(), _Highest([]), collect)

        def keep() -> tuple[StoredCalibration, list[Sample]]:
            make = partial(_make, profile, promise, scored)
            return self._store.add(model.graph, scored.samples, make, profile=profile, by=by)

        stored, taken = await self._change(model, keep)
        scored.mark_duplicates(taken)
        return await self._finished(stored.id), scored

    async def open(self, model: Model, *, profile: str, source: str | None, by: str) -> Examined:
        """A calibration to be filled, with the samples of `source` if it names one."""

        def open() -> Examined:
            opened = self._store.open(model.graph, profile, by=by, source=source)
            return self._examine(opened.id)

        return await asyncio.to_thread(open)

    async def add_samples(self, id: str, images: Images) -> tuple[Counts, Scored]:
        """Scores images into an open calibration, and counts its samples then; those that it has
        are not scored again.

        Raises as `calibrate`, CalibrationFinished, DigestMismatch where another graph now lies
        under its model and version, and InvalidParameter where it would have too many samples.
        """
        stored = await asyncio.to_thread(self._store.get, id)
        check_open(stored)
        model = await self._model(stored.graph)
        known = await asyncio.to_thread(self._store.digests, id)
        highest = await asyncio.to_thread(self._store.samples, id, MAPS_KEPT, excluded=False)
        scored, limit = Scored(), self._settings.max_calibration_samples

        async def keep(part: Scored) -> None:
            if len(known) + len(part.samples) > limit:
                raise InvalidParameter(
                    f"calibration {id} has {len(known)} samples, and {limit} is the limit"
                )
            taken = await on_thread_to_end(self._store.add_samples, id, part.samples)
            known.update(sample.sha256 for sample in part.samples)
            part.mark_duplicates(taken)
            scored.add(part)

        maps = _Highest([sample.score for sample in highest])
        await self._score(model, images, known, maps, keep)
        return await asyncio.to_thread(self._store.counts, id), scored

    async def finish(self, id: str, promise: Promise, *, by: str) -> Examined:
        """Raises as `Store.finish`, TooFewSamples, and DigestMismatch as `add_samples`."""
        stored = await asyncio.to_thread(self._store.get, id)
        model = await self._model(stored.graph)
        make = partial(_make, stored.profile, promise, Scored())
        await self._change(model, partial(self._store.finish, id, make, by=by))
        return await self._finished(id)

    async def examine(self, id: str) -> Examined:
        """Raises UnknownCalibration."""
        return await asyncio.to_thread(self._examine, id)

    async def heatmap(self, id: str, sha256: str) -> bytes:
        """PNG of a sample's map, coloured by the calibration's threshold once it is finished, else
        by the one in force.

        Raises UnknownSample where there is no such sample or its map is not kept.
        """
        stored = await asyncio.to_thread(self._store.get, id)
        sample = await asyncio.to_thread(self._store.sample, id, sha256)
        if sample.map is None:
            raise UnknownSample(
                f"of sample {sha256} no map is kept: calibration {id} keeps those of its "
                f"{MAPS_KEPT} highest scores"
            )
        threshold = await self._threshold(stored)
        return await asyncio.get_running_loop().run_in_executor(
            self._workers, lambda: heatmap.heatmap(heatmap.unpacked(sample.map or b""), threshold)
        )

    async def activate(self, id: str, *, by: str) -> StoredCalibration:
        """Puts a finished calibration in force for its graph and profile.

        Raises as `Store.activate`, UnknownModel, or DigestMismatch where another graph now lies
        under its model and version.
        """
        stored = await asyncio.to_thread(self._store.get, id)
        model = await self._model(stored.graph)
        await self._change(model, partial(self._store.activate, id, by=by))
        return await asyncio.to_thread(self._store.get, id)

    async def deactivate(self, model: Model, profile: str, *, by: str) -> Calibration:
        """Leaves a profile to the model's calibration, or a model to its bundle's; returns what is
        in force then. Raises Uncalibrated where that would be nothing."""
        if not profile and model.own is None:
            raise Uncalibrated(
                f"the bundle of {model.name}/{model.bundle.version} brought no threshold to go "
                "back to: activate another calibration instead"
            )
        await self._change(model, partial(self._store.deactivate, model.graph, profile, by=by))
        return _in_force(model, profile)

    async def roll_back(self, model: Model, profile: str, *, by: str) -> Calibration:
        """Puts in force what was before the last activation, and returns it.

        Raises NothingToRollBack; again and again it goes back one step each.
        """
        await self._change(model, partial(self._store.roll_back, model.graph, profile, by=by))
        return _in_force(model, profile)

    async def _finished(self, id: str) -> Examined:
        examined = await self.examine(id)
        if examined.note:
            log.warning("calibration %s is %s", id, examined.note)
        return examined

    async def _model(self, graph: Graph) -> Model:
        return await self._registry.get(graph.model, graph.version, graph.digest)

    async def _change(self, model: Model, write: Callable[[], T]) -> T:
        """Run `write` and take up what is in force then, even where the caller leaves."""

        async def change() -> T:
            result = await asyncio.to_thread(write)
            await self._registry.take_up(model)
            return result

        return await to_end(change())

    def _examine(self, id: str) -> Examined:
        stored = self._store.get(id)
        kept = stored.finish.tail if stored.finish else None
        return Examined(
            stored=stored,
            counts=self._store.counts(id),
            engines=self._store.engines(id),
            tail=kept or contamination.examine(self._store.scores(id)),
            highest=self._store.samples(id, HIGHEST, excluded=False),
        )

    async def _threshold(self, stored: StoredCalibration) -> float:
        if stored.finish:
            return stored.finish.threshold
        calibration = (await self._model(stored.graph)).calibration_for(stored.profile)
        if calibration:
            return calibration.threshold
        return float((await asyncio.to_thread(self._store.scores, stored.id)).max(initial=1e-6))

    async def _score(
        self,
        model: Model,
        images: Images,
        known: set[str],
        maps: "_Highest",
        keep: Callable[[Scored], Awaitable[None]],
    ) -> None:
        """Scores all images but those whose digests are `known`, and hands them to `keep` some at
        a time, in about the order sent.

        A few are under way at a time, so that an inspection never waits behind thousands. What is
        not the sample's own fault (a failed run, say) is raised, not reported.
        """
        if self._scoring:
            raise Overloaded(
                "samples are being scored already, of this calibration or another one, perhaps of "
                "a request whose sender left; one at a time"
            )
        self._scoring = True
        done: dict[int, Scored] = {}
        room = asyncio.Semaphore(max(2 * cores.available(), model.detector.batch_sizes[-1]))

        async def score_one(number: int, name: str, data: bytes) -> None:
            try:
                prepare = partial(self._prepare, data, model, known)
                scoring = self._score_one(model, name, prepare, maps)
                del data, prepare  # up to MAX_IMAGE_BYTES; not to be kept while its image waits
                done[number] = Scored(samples=[await scoring])
            except _Known:
                done[number] = Scored(duplicates=[name])
            except (InvalidImage, TooLarge, UnsupportedFormat, TrainedOn) as error:
                done[number] = Scored(failed=[(name, str(error))])
            finally:
                room.release()

        async def hand_over() -> None:
            part = Scored()
            for number in sorted(done):
                part.add(done.pop(number))
            await keep(part)

        try:
            async with aclosing(images), asyncio.TaskGroup() as tasks:
                number = 0
                async for name, data in images:
                    await room.acquire()
                    tasks.create_task(score_one(number, _label(name), data))
                    number += 1
                    if len(done) >= _STORED_TOGETHER:
                        await hand_over()
            await hand_over()
        except ExceptionGroup as group:  # of the tasks that scored; the first tells enough
            raise group.exceptions[0] from None
        finally:
            self._scoring = False

    async def _score_one(
        self, model: Model, name: str, prepare: Callable[[], _Prepared], maps: "_Highest"
    ) -> Sample:
        prepared, answer = await model.batcher.submit(prepare, self._workers)
        score, kept = answer.prediction.score, None
        if maps.admit(score):
            loop = asyncio.get_running_loop()
            anomaly_map = answer.prediction.anomaly_map
            kept = await loop.run_in_executor(self._workers, heatmap.packed, anomaly_map)
        return Sample(
            name=name,
            sha256=prepared.sha256,
            pixels_sha256=prepared.pixels_sha256,
            score=score,
            engine=model.engine,
            map=kept,
        )

    def _prepare(self, data: bytes, model: Model, known: set[str]) -> _Prepared:
        limit = self._settings.max_image_bytes
        if len(data) > limit:
            raise TooLarge(f"the file is too large: the limit is {limit} bytes")
        sha256 = image.digest(data)
        if sha256 in known:
            raise _Known
        if sha256 in model.trained:
            raise TrainedOn("the model was trained on this file: it would score too low")
        resized, _ = image.decode_to(data, model.image_size, self._settings.max_image_pixels)
        return _Prepared(resized, sha256, image.digest(resized.tobytes()))


class _Highest:
    """Which scores are among the highest so far, whose maps are worth packing."""

    def __init__(self, scores: list[float]) -> None:
        self._scores = scores
        heapq.heapify(self._scores)

    def admit(self, score: float) -> bool:
        if len(self._scores) < MAPS_KEPT:
            heapq.heappush(self._scores, score)
            return True
        return heapq.heappushpop(self._scores, score) != score


def _label(name: str) -> str:
    """A file's name as any database and any JSON takes it."""
    return name.encode(errors="replace").decode().replace("\0", "?")[-MAX_NAME:]


def _make(profile: str, promise: Promise, scored: Scored, scores: np.ndarray) -> Made:
    """A calibration of `scores`; raises TooFewSamples, which tells what became of others."""
    lost = ""
    if len(scored.failed) or len(scores) < len(scored.samples):
        twice = len(scored.duplicates) + len(scored.samples) - len(scores)
        refused = f"{len(scored.failed)} refused"
        if scored.failed:
            name, reason = scored.failed[0]
            refused += f", as {name}: {reason}"
        lost = f" ({refused}; {twice} sent twice)"
    check_samples(len(scores), promise.target_fpr, promise.confidence, lost)
    calibration = Calibration(
        "", promise.target_fpr, scores, confidence=promise.confidence, profile=profile
    )
    tail = contamination.examine(scores)
    unsuspected = promise.activate == "unless_suspect" and not tail.suspects
    return Made(calibration, tail, promise.activate == "true" or unsuspected)


def _in_force(model: Model, profile: str) -> Calibration:
    calibration = model.calibration_for(profile)
    if calibration is None:
        raise Uncalibrated(f"model {model.name}/{model.bundle.version} has no threshold any more")
    return calibration
