"""A candidate beside the active version: it scores what that one has answered, and nobody but the
counters sees its answers.

Both decide by their own thresholds, since scores of different networks have different scales.
"""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from service import image
from service.batcher import Batcher
from service.calibration import Calibration, decide
from service.errors import DatabaseAway, Overloaded
from service.metrics import Metrics
from service.model import Key, Model
from service.rollouts import Candidate, Rollouts, Tally

log = logging.getLogger(__name__)

QUEUE = 32  # images that wait; of more, the candidate can't keep up
COMPARED = ("same", "normal_to_anomalous", "anomalous_to_normal")
OUTCOMES = (*COMPARED, "failed", "dropped")


@dataclass(frozen=True)
class Seen:
    """An image that the active version has answered."""

    id: str  # of its inspection
    data: bytes  # encoded, as it was sent
    resized: np.ndarray  # uint8 (h, w, 3) at the active version's size
    profile: str
    score: float
    calibration: Calibration  # in force for it


@dataclass(frozen=True)
class _Prepared:
    resized: np.ndarray


class Shadow:
    """Compares a candidate with the active version on whatever is offered.

    Images go to the device one by one, so that an inspection waits for no more than one of them.
    """

    def __init__(
        self,
        candidate: Candidate,
        model: Model,
        device_thread: Executor,
        metrics: Metrics,
        max_pixels: int,
    ) -> None:
        self.candidate, self.model = candidate, model
        self._metrics, self._max_pixels = metrics, max_pixels
        self._batcher = Batcher(
            model.detector.run, device_thread, batch_size=lambda waiting: 1, max_queue=QUEUE
        )
        self._tallies: dict[str, Tally] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    def offer(self, seen: Seen, workers: Executor) -> None:
        """Compare on an image once there is time for it; its answer doesn't wait."""
        task = asyncio.create_task(self._compare(seen, workers))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def taken(self) -> dict[str, Tally]:
        """What was counted since this was last asked, by outcome."""
        tallies, self._tallies = self._tallies, {}
        return tallies

    def add(self, tallies: Mapping[str, Tally]) -> None:
        for outcome, tally in tallies.items():
            self._tallies[outcome] = self._tallies.get(outcome, Tally()) + tally

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _compare(self, seen: Seen, workers: Executor) -> None:
        try:
            with self._batcher.place():
                _, answer = await self._batcher.submit(lambda: self._prepare(seen), workers)
            self._count_pair(seen, answer.prediction.score)
        except Overloaded:
            self._count("dropped")
        except Exception as error:  # whatever it is, inspections go on
            log.warning("%s version %d as a shadow: %s", *self.model.key, repr(error))
            self._count("failed")

    def _prepare(self, seen: Seen) -> _Prepared:
        size = self.model.image_size
        if seen.resized.shape[:2] == size:
            return _Prepared(seen.resized)
        return _Prepared(image.decode_to(seen.data, size, self._max_pixels)[0])

    def _count_pair(self, seen: Seen, score: float) -> None:
        ours, theirs = seen.calibration, self.model.calibration_for(seen.profile)
        assert theirs is not None  # a version without a threshold can't become a shadow
        before, after = decide(seen.score, ours.threshold), decide(score, theirs.threshold)
        outcome = "same" if before == after else f"{before}_to_{after}"
        if before != after:
            log.info("%s is %s by its shadow, %s version %d", seen.id, after, *self.model.key)
        scores = abs(score / theirs.threshold - seen.score / ours.threshold)
        p_values = abs(theirs.p_value(score) - ours.p_value(seen.score))
        self._metrics.shadow_score_difference.labels(self.model.name).observe(scores)
        self._metrics.shadow_p_value_difference.labels(self.model.name).observe(p_values)
        self._count(outcome, scores, p_values)

    def _count(self, outcome: str, scores: float = 0.0, p_values: float = 0.0) -> None:
        self._metrics.shadow_inspections.labels(self.model.name, outcome).inc()
        self.add({outcome: Tally(1, scores, p_values)})


class Shadows:
    """The shadow of each model that has one, and what was counted of them, on its way into the
    database."""

    def __init__(
        self, rollouts: Rollouts, device_thread: Executor, metrics: Metrics, max_pixels: int
    ) -> None:
        self._rollouts, self._device_thread = rollouts, device_thread
        self._metrics, self._max_pixels = metrics, max_pixels
        self._shadows: dict[str, Shadow] = {}

    def of(self, name: str) -> Shadow | None:
        return self._shadows.get(name)

    def tried(self) -> set[Key]:
        return {shadow.model.key for shadow in self._shadows.values()}

    async def begin(self, candidate: Candidate, model: Model) -> None:
        await self.end(model.name)
        self._shadows[model.name] = Shadow(
            candidate, model, self._device_thread, self._metrics, self._max_pixels
        )
        log.info("%s version %d is tried beside the active one", *model.key)

    async def end(self, name: str) -> None:
        if shadow := self._shadows.pop(name, None):
            await shadow.close()
            with suppress(DatabaseAway):  # what was counted since the last time is lost
                await self._store(shadow)
            log.info("%s version %d is no longer tried", *shadow.model.key)

    async def store_counts(self) -> None:
        """Raises DatabaseAway; then they are kept for the next time."""
        for shadow in list(self._shadows.values()):
            await self._store(shadow)

    async def close(self) -> None:
        for name in list(self._shadows):
            await self.end(name)

    async def _store(self, shadow: Shadow) -> None:
        if tallies := shadow.taken():
            try:
                await asyncio.to_thread(self._rollouts.count, shadow.candidate.id, tallies)
            except DatabaseAway:
                shadow.add(tallies)
                raise
