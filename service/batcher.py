"""Images of many clients -> batches on the device, without a timer.

Whatever waits when the device becomes free is its next batch: a lone image goes at once, and under
load batches grow by themselves. Waiting images whose caller left or timed out never reach the
device; a batch that fails answers every caller in it, and the next one still runs.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from service.detector import Prediction
from service.errors import InferenceFailed, Overloaded, ServiceError


@dataclass(frozen=True)
class Answer:
    prediction: Prediction
    batch_size: int
    queue_s: float
    infer_s: float


@dataclass(eq=False)
class _Waiter:
    image: np.ndarray
    answer: "asyncio.Future[Answer]"
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """A bounded queue in front of one detector; lives on one event loop.

    `run` is called on `device_thread`, one batch at a time.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], list[Prediction]],
        device_thread: Executor,
        *,
        max_batch_size: int,
        max_queue: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._device_thread, self._on_batch = run, device_thread, on_batch
        self._max_batch_size, self._max_queue = max_batch_size, max_queue
        self._waiting: deque[_Waiter] = deque()
        self.places = 0  # taken
        self._draining: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue from the door to the answer, so that decoding is bounded as well.

        Raises Overloaded where all are taken.
        """
        if self.places >= self._max_queue:
            raise Overloaded(
                f"{self.places} inspections are accepted and unanswered; the limit is "
                f"{self._max_queue}"
            )
        self.places += 1
        try:
            yield
        finally:
            self.places -= 1

    async def submit(self, image: np.ndarray) -> Answer:
        """The prediction of one uint8 (h, w, 3) image at the model's size.

        Raises InferenceFailed where its batch failed. Cancelling the call takes the image out.
        """
        waiter = _Waiter(image, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        try:
            return await waiter.answer
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    async def _drain(self) -> None:
        while self._waiting:
            count = min(len(self._waiting), self._max_batch_size)
            await self._answer([self._waiting.popleft() for _ in range(count)])

    async def _answer(self, batch: list[_Waiter]) -> None:
        self._on_batch(len(batch))
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._device_thread, self._run_batch, batch)
        except Exception as error:  # every waiter must be answered, whatever went wrong
            for waiter in batch:
                if not waiter.answer.done():
                    waiter.answer.set_exception(_as_service_error(error))
            return
        for waiter, answer in zip(batch, answers, strict=True):
            if not waiter.answer.done():
                waiter.answer.set_result(answer)

    def _run_batch(self, batch: list[_Waiter]) -> list[Answer]:
        started = time.perf_counter()
        predictions = self._run(np.stack([waiter.image for waiter in batch]))
        infer_s = time.perf_counter() - started
        return [
            Answer(prediction, len(batch), started - waiter.since, infer_s)
            for waiter, prediction in zip(batch, predictions, strict=True)
        ]


def _as_service_error(error: Exception) -> ServiceError:
    """A new exception for each waiter: one shared by many would gather all their tracebacks."""
    if isinstance(error, ServiceError):
        return type(error)(*error.args)
    return InferenceFailed(f"{type(error).__name__}: {error}")
