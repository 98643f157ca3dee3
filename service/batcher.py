"""Images of many clients -> batches on the device, without a timer.

Whatever waits when the device becomes free is its next batch: a lone image goes at once, and under
load batches grow by themselves. Workers put images into the queue and the device's thread takes
them out, so that a busy event loop keeps neither waiting. Images whose caller left or timed out are
taken out of the queue; a batch that fails answers every caller in it, and the next one still runs.
Only where an image's score is no number its batch is run again one by one.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from service.detector import Prediction
from service.errors import InferenceFailed, NoNumber, Overloaded, ServiceError


class Prepared(Protocol):
    @property
    def resized(self) -> np.ndarray:
        """uint8 (h, w, 3) at the model's size."""


P = TypeVar("P", bound=Prepared)


@dataclass(frozen=True)
class Answer:
    prediction: Prediction
    batch_size: int
    queue_s: float
    infer_s: float


@dataclass(eq=False)
class _Waiter:
    answer: "asyncio.Future[Answer]"
    prepared: Any = None
    since: float = 0.0


class Batcher:
    """A bounded queue in front of one detector; lives on one event loop.

    `run` is called on `device_thread`, one batch at a time, with `batch_size(n)` of n images that
    wait. Batchers that share the thread take turns.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], list[Prediction]],
        device_thread: Executor,
        *,
        batch_size: Callable[[int], int],
        max_queue: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._device_thread, self._on_batch = run, device_thread, on_batch
        self._batch_size, self._max_queue = batch_size, max_queue
        self._waiting: deque[_Waiter] = deque()
        self._lock = threading.Lock()  # of _waiting and _scheduled
        self._scheduled = False  # the device's thread will look, or is looking, at what waits
        self.places = 0  # taken
        self._unanswered = 0

    @property
    def busy(self) -> bool:
        """Somebody waits for an answer, or has the right to ask for one."""
        return self.places > 0 or self._unanswered > 0

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

    async def submit(self, prepare: Callable[[], P], workers: Executor) -> tuple[P, Answer]:
        """What `prepare` gives on one of the `workers`, and the prediction of it.

        Raises what `prepare` raises, and InferenceFailed where its batch failed. Cancelling the
        call takes the image out.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future())
        entering = workers.submit(self._enter, waiter, prepare, loop)
        del prepare  # the encoded image that it may hold needn't wait
        self._unanswered += 1
        try:
            answer = await waiter.answer
            return waiter.prepared, answer
        finally:
            self._unanswered -= 1
            entering.cancel()
            with self._lock:
                if waiter in self._waiting:  # cancelled
                    self._waiting.remove(waiter)
            del waiter, entering  # they have the error, whose traceback has this frame

    def _enter(
        self, waiter: _Waiter, prepare: Callable[[], P], loop: asyncio.AbstractEventLoop
    ) -> None:
        """On a worker: straight into the queue, without a turn of the event loop."""
        try:
            waiter.prepared, waiter.since = prepare(), time.perf_counter()
            with self._lock:
                if not waiter.answer.done():  # else cancelled
                    if not self._scheduled:
                        self._device_thread.submit(self._run_next, loop)  # it waits for the lock
                        self._scheduled = True
                    self._waiting.append(waiter)
        except BaseException as error:
            loop.call_soon_threadsafe(_fail, waiter, _told(error))
            raise  # a worker that returns would keep the waiter in its own frame
        finally:
            del waiter  # as in `submit`

    def _run_next(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the device's thread: one batch of what waits, then back to the end of its queue."""
        with self._lock:
            count = self._batch_size(len(self._waiting)) if self._waiting else 0
            batch = [self._waiting.popleft() for _ in range(count)]
        try:
            if batch:
                loop.call_soon_threadsafe(_answer, batch, self._score(batch))
        finally:
            with self._lock:
                self._scheduled = bool(self._waiting)
                if self._scheduled:
                    self._device_thread.submit(self._run_next, loop)

    def _score(self, batch: list[_Waiter]) -> list[Answer | Exception]:
        """To each of the batch an answer, or what went wrong."""
        started = time.perf_counter()
        try:
            self._on_batch(len(batch))
            predictions = self._run(np.stack([waiter.prepared.resized for waiter in batch]))
            infer_s = time.perf_counter() - started
            return [
                Answer(prediction, len(batch), started - waiter.since, infer_s)
                for waiter, prediction in zip(batch, predictions, strict=True)
            ]
        except NoNumber as error:
            if len(batch) == 1:
                return [error]
        except BaseException as error:
            return [_told(error)] * len(batch)
        return [self._score([waiter])[0] for waiter in batch]


def _answer(batch: list[_Waiter], answers: list[Answer | Exception]) -> None:
    for waiter, answer in zip(batch, answers, strict=True):
        if isinstance(answer, Exception):
            _fail(waiter, _as_service_error(answer))
        elif not waiter.answer.done():  # cancelled
            waiter.answer.set_result(answer)


def _fail(waiter: _Waiter, error: Exception) -> None:
    if not waiter.answer.done():  # cancelled
        waiter.answer.set_exception(error)


def _told(error: BaseException) -> Exception:
    """What a caller can be told of anything that ended its work: panics of Rust's are no Exception,
    and nobody else would ever answer."""
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _as_service_error(error: Exception) -> ServiceError:
    """A new exception for each waiter: one shared by many would gather all their tracebacks."""
    if isinstance(error, ServiceError):
        return type(error)(*error.args)
    return InferenceFailed(f"{type(error).__name__}: {error}")
