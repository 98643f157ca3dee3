"""Batches without a timer: shared, bounded, and every caller answered."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from service.batcher import Answer, Batcher
from service.detector import Prediction
from service.errors import InferenceFailed, InvalidImage, NoNumber, Overloaded

IMAGE = np.zeros((4, 4, 3), np.uint8)
MAP = np.zeros((4, 4), np.float32)


class Device:
    """Scores an image by its first byte; can be held up, and fails for 255."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []

    def run(self, images: np.ndarray) -> list[Prediction]:
        values = [int(image[0, 0, 0]) for image in images]
        self.batches.append(values)
        self.entered.set()
        assert self.open.wait(10)
        if 255 in values:
            raise InferenceFailed("white is too much")
        return [Prediction(float(value), MAP) for value in values]


class AtOnce(Executor):
    """Works on the caller's thread."""

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work(*given, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class Prepared:
    resized: np.ndarray


async def submit(batcher: Batcher, image: np.ndarray) -> Answer:
    return (await batcher.submit(lambda: Prepared(image), AtOnce()))[1]


def image_of(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def at_most(most: int) -> Callable[[int], int]:
    return lambda waiting: min(waiting, most)


def run(scenario: Callable[[Batcher, Device], Coroutine[Any, Any, None]], **limits: int) -> Device:
    """Runs a scenario with a batcher of at most 4 images a batch."""
    device = Device()

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            options = {"max_queue": 8} | limits
            batcher = Batcher(device.run, thread, batch_size=at_most(4), **options)
            try:
                await asyncio.wait_for(scenario(batcher, device), 20)
            finally:
                device.open.set()

    asyncio.run(main())
    return device


async def held_up(batcher: Batcher, device: Device) -> "asyncio.Task[Any]":
    """The device busy with one image until `device.open` is set."""
    device.open.clear()
    first = asyncio.create_task(submit(batcher, image_of(0)))
    await asyncio.to_thread(device.entered.wait, 10)
    return first


def test_a_lone_image_is_run_at_once_and_alone() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        answer = await submit(batcher, image_of(7))
        assert answer.prediction.score == 7
        assert answer.batch_size == 1

    assert run(scenario).batches == [[7]]


def test_times_are_those_of_this_image_and_its_batch_is_told() -> None:
    sizes: list[int] = []

    async def main() -> None:
        device = Device()
        with ThreadPoolExecutor(1) as thread:
            options: dict[str, Any] = {"batch_size": at_most(4), "max_queue": 4}
            batcher = Batcher(device.run, thread, on_batch=sizes.append, **options)
            for _ in range(2):
                began = time.perf_counter()
                answer = await submit(batcher, IMAGE)
                took = time.perf_counter() - began
                assert 0 < answer.queue_s < took and 0 < answer.infer_s < took

    asyncio.run(main())
    assert sizes == [1, 1]


def test_it_is_busy_as_long_as_somebody_waits_or_has_a_place() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        assert not batcher.busy
        with batcher.place():
            assert batcher.busy
        assert not batcher.busy
        for _ in range(2):
            first = await held_up(batcher, device)
            second = asyncio.create_task(submit(batcher, image_of(1)))
            await asyncio.sleep(0)
            device.open.set()
            await first
            await second
            assert not batcher.busy
            device.entered.clear()
        first = await held_up(batcher, device)
        assert batcher.busy
        second = asyncio.create_task(submit(batcher, image_of(1)))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        assert batcher.busy
        device.open.set()
        await first
        assert not batcher.busy

    run(scenario)


def test_what_waits_while_the_device_is_busy_becomes_the_next_batch() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        first = await held_up(batcher, device)
        rest = [asyncio.create_task(submit(batcher, image_of(v))) for v in (1, 2, 3)]
        await asyncio.sleep(0)
        device.open.set()
        answers = await asyncio.gather(first, *rest)
        assert [answer.prediction.score for answer in answers] == [0, 1, 2, 3]
        assert [answer.batch_size for answer in answers] == [1, 3, 3, 3]
        assert all(answer.queue_s >= 0 and answer.infer_s > 0 for answer in answers)

    assert run(scenario).batches == [[0], [1, 2, 3]]


def test_a_batch_is_never_larger_than_its_limit() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        first = await held_up(batcher, device)
        rest = [asyncio.create_task(submit(batcher, image_of(v))) for v in range(1, 8)]
        await asyncio.sleep(0)
        device.open.set()
        await asyncio.gather(first, *rest)

    assert [len(batch) for batch in run(scenario).batches] == [1, 4, 3]


def test_one_failure_answers_every_waiter_and_the_next_batch_still_runs() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        first = await held_up(batcher, device)
        doomed = [asyncio.create_task(submit(batcher, image_of(v))) for v in (1, 255, 3)]
        await asyncio.sleep(0)
        device.open.set()
        await first
        for task in doomed:
            with pytest.raises(InferenceFailed, match="white is too much"):
                await task
        assert (await submit(batcher, image_of(9))).prediction.score == 9

    run(scenario)


def test_an_image_without_a_number_is_a_failure_of_its_own() -> None:
    class Overflowing(Device):
        def run(self, images: np.ndarray) -> list[Prediction]:
            predictions = super().run(images)
            if any(prediction.score == 9 for prediction in predictions):
                raise NoNumber("no number")
            return predictions

    async def main() -> None:
        device = Overflowing()
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(device.run, thread, batch_size=at_most(4), max_queue=8)
            first = await held_up(batcher, device)
            tasks = [asyncio.create_task(submit(batcher, image_of(v))) for v in (1, 9, 3)]
            await asyncio.sleep(0)
            device.open.set()
            await first
            one, none, three = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(none, NoNumber)
            assert [each.prediction.score for each in (one, three)] == [1, 3]
            assert [each.batch_size for each in (one, three)] == [1, 1]
        assert device.batches == [[0], [1, 9, 3], [1], [9], [3]]

    asyncio.run(main())


def test_an_unforeseen_exception_answers_every_waiter_too() -> None:
    async def main() -> None:
        def broken(images: np.ndarray) -> list[Prediction]:
            raise ZeroDivisionError("by nothing")

        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(broken, thread, batch_size=at_most(4), max_queue=4)
            for _ in range(2):
                with pytest.raises(InferenceFailed, match="ZeroDivisionError: by nothing"):
                    await asyncio.wait_for(submit(batcher, IMAGE), 10)

    asyncio.run(main())


def test_an_observer_that_fails_is_a_failure_too_and_the_next_batch_runs() -> None:
    async def main() -> None:
        observed = iter([ZeroDivisionError("no counter")])

        def observe(size: int) -> None:
            for error in observed:
                raise error

        device = Device()
        with ThreadPoolExecutor(1) as thread:
            options: dict[str, Any] = {"batch_size": at_most(4), "max_queue": 4}
            batcher = Batcher(device.run, thread, on_batch=observe, **options)
            with pytest.raises(InferenceFailed, match="no counter"):
                await asyncio.wait_for(submit(batcher, IMAGE), 10)
            assert (await asyncio.wait_for(submit(batcher, IMAGE), 10)).prediction.score == 0

    asyncio.run(main())


def test_after_shutdown_every_caller_is_refused_and_none_waits() -> None:
    async def main() -> None:
        thread = ThreadPoolExecutor(1)
        batcher = Batcher(Device().run, thread, batch_size=at_most(4), max_queue=4)
        thread.shutdown()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shutdown"):
                await asyncio.wait_for(submit(batcher, IMAGE), 10)
        assert batcher.waiting == 0

    asyncio.run(main())


def test_a_run_that_forgets_an_image_is_a_failure_and_nobody_waits_for_ever() -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(lambda images: [], thread, batch_size=at_most(4), max_queue=4)
            with pytest.raises(InferenceFailed, match="ValueError"):
                await asyncio.wait_for(submit(batcher, IMAGE), 10)

    asyncio.run(main())


def test_a_cancelled_caller_never_reaches_the_device_and_frees_the_queue() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        first = await held_up(batcher, device)
        leaving = asyncio.create_task(submit(batcher, image_of(1)))
        staying = asyncio.create_task(submit(batcher, image_of(2)))
        await asyncio.sleep(0)
        assert batcher.waiting == 2
        leaving.cancel()
        await asyncio.wait((leaving,))
        assert batcher.waiting == 1
        device.open.set()
        await asyncio.gather(first, staying)

    assert run(scenario).batches == [[0], [2]]


def test_a_device_that_finds_nobody_waiting_any_more_goes_on() -> None:
    """It was told that somebody waits, and is asked for a batch of one at least."""

    def batch_size(waiting: int) -> int:
        assert waiting > 0
        return waiting

    async def main() -> None:
        device, free = Device(), threading.Event()
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(device.run, thread, batch_size=batch_size, max_queue=4)
            thread.submit(free.wait, 10)  # another model's turn
            leaving = asyncio.create_task(submit(batcher, image_of(1)))
            await asyncio.sleep(0)
            assert batcher.waiting == 1
            leaving.cancel()
            await asyncio.wait([leaving])
            free.set()
            await asyncio.to_thread(lambda: thread.submit(int).result(10))
            answer = await asyncio.wait_for(submit(batcher, image_of(2)), 10)
            assert answer.prediction.score == 2
        assert device.batches == [[2]]

    asyncio.run(main())


def test_a_caller_that_leaves_while_its_image_is_prepared_never_reaches_the_device() -> None:
    began, ready = threading.Event(), threading.Event()
    preparations = []

    def prepare() -> Prepared:
        preparations.append(1)
        began.set()
        assert ready.wait(10)
        return Prepared(image_of(1))

    async def scenario(batcher: Batcher, device: Device) -> None:
        with ThreadPoolExecutor(1) as worker:
            leaving = [asyncio.create_task(batcher.submit(prepare, worker)) for _ in range(2)]
            await asyncio.to_thread(began.wait, 10)
            for task in leaving:
                task.cancel()
            await asyncio.wait(leaving)
            ready.set()
            prepared, answer = await batcher.submit(lambda: Prepared(image_of(2)), worker)
            assert (prepared.resized[0, 0, 0], answer.prediction.score) == (2, 2)

    assert run(scenario).batches == [[2]]
    assert len(preparations) == 1  # the other had not begun


def test_what_can_not_be_prepared_is_its_callers_error_alone() -> None:
    def unreadable() -> Prepared:
        raise InvalidImage("no picture")

    async def scenario(batcher: Batcher, device: Device) -> None:
        with ThreadPoolExecutor(1) as worker:
            failing = asyncio.create_task(batcher.submit(unreadable, worker))
            other = asyncio.create_task(submit(batcher, image_of(3)))
            with pytest.raises(InvalidImage, match="^no picture$"):
                await failing
            assert (await other).prediction.score == 3

    assert run(scenario).batches == [[3]]


class Panic(BaseException):
    """As extensions in Rust raise it."""


def test_a_panic_is_answered_too_on_a_worker_and_on_the_device() -> None:
    def panic() -> Prepared:
        raise Panic("oh")

    def score(images: np.ndarray) -> list[Prediction]:
        raise Panic("no")

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(score, thread, batch_size=at_most(4), max_queue=4)
            with pytest.raises(RuntimeError, match="oh"):
                await asyncio.wait_for(batcher.submit(panic, thread), 10)
            with pytest.raises(InferenceFailed, match="no"):
                await asyncio.wait_for(submit(batcher, IMAGE), 10)

    asyncio.run(main())


def test_what_failed_is_freed_at_once_with_its_encoded_bytes() -> None:
    class Encoded:
        def decode(self) -> Prepared:
            raise InvalidImage("no picture")

    async def refused(batcher: Batcher, worker: Executor) -> "weakref.ref[Encoded]":
        encoded = Encoded()
        with contextlib.suppress(InvalidImage):
            await batcher.submit(encoded.decode, worker)
        return weakref.ref(encoded)

    async def scenario(batcher: Batcher, device: Device) -> None:
        gc.disable()
        try:
            with ThreadPoolExecutor(1) as worker:
                references = [await refused(batcher, worker) for _ in range(3)]
            for _ in range(500):  # the worker has still to turn to the next
                await asyncio.sleep(0.01)
                if not any(reference() for reference in references):
                    return
            raise AssertionError("kept for the garbage collector")
        finally:
            gc.enable()

    run(scenario)


def test_a_caller_that_leaves_during_the_run_does_not_disturb_the_others() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        first = await held_up(batcher, device)
        first.cancel()
        await asyncio.wait((first,))
        second = asyncio.create_task(submit(batcher, image_of(5)))
        await asyncio.sleep(0)
        device.open.set()
        assert (await second).prediction.score == 5

    run(scenario)


def test_the_device_takes_its_next_batch_while_the_event_loop_is_busy() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        first = await held_up(batcher, device)
        rest = [asyncio.create_task(submit(batcher, image_of(v))) for v in (1, 2)]
        await asyncio.sleep(0)
        device.entered.clear()
        device.open.set()
        assert device.entered.wait(10)  # on the loop's own thread: nothing else runs on it
        await asyncio.gather(first, *rest)

    assert run(scenario).batches == [[0], [1, 2]]


def test_models_that_share_a_device_take_turns() -> None:
    async def main() -> list[list[int]]:
        device = Device()
        with ThreadPoolExecutor(1) as thread:
            one, other = (
                Batcher(device.run, thread, batch_size=at_most(2), max_queue=8) for _ in range(2)
            )
            first = await held_up(one, device)
            rest = [asyncio.create_task(submit(one, image_of(v))) for v in (1, 2, 3, 4)]
            rest += [asyncio.create_task(submit(other, image_of(v))) for v in (11, 12, 13)]
            await asyncio.sleep(0)
            device.open.set()
            await asyncio.wait_for(asyncio.gather(first, *rest), 10)
        return device.batches

    assert asyncio.run(main()) == [[0], [11, 12], [1, 2], [13], [3, 4]]


def test_places_are_bounded_and_given_back() -> None:
    async def scenario(batcher: Batcher, device: Device) -> None:
        with (
            batcher.place(),
            batcher.place(),
            pytest.raises(Overloaded, match="2 inspections .* the limit is 2"),
            batcher.place(),
        ):
            raise AssertionError("a third place was given")
        with batcher.place():
            pass

    run(scenario, max_queue=2)
