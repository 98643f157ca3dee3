"""A bundle on disk -> a model that is warm and has passed its self-check, beside those that serve.

Models load one at a time on a thread of their own, so that no request to another one waits. What
served is freed on that thread as well, as soon as nobody holds it any more: giving the memory of a
large network back takes longer than an answer should wait.
"""

import asyncio
import logging
import re
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np

from service import memory
from service.batcher import Batcher
from service.bundle import Bundle
from service.detector import Detector
from service.device_thread import DeviceThread
from service.errors import (
    BundleError,
    DeviceUnavailable,
    InferenceFailed,
    NoNumber,
    ServiceError,
)
from service.metrics import Metrics
from service.model import Key, Model
from service.settings import Settings

log = logging.getLogger(__name__)

# A CPU's runtimes have no type for it; their words are these, but for the names of nodes.
_NO_ROOM = re.compile("failed to allocate|bad_alloc|out of memory", re.IGNORECASE)
_NODE_NAME = re.compile("Name:'[^']*'")
CLOSE_S = 10.0  # for what the threads are at when the service goes


class Loader:
    """Loads and frees models; `device_thread` is the one that runs all their graphs."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.device_thread = DeviceThread()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._alive: weakref.WeakSet[Model] = weakref.WeakSet()
        self._freed = threading.Condition()
        self._closed = False
        self._busy = threading.Lock()  # while something is loaded

    def load(
        self, bundle: Callable[[], Bundle], key: Key, *, aside: bool = True
    ) -> "Future[Model]":
        """The model of what `bundle` opens; `aside` where others serve meanwhile.

        The future raises BundleError where it is another one than `key` says, damaged, or its
        self-check fails, and DeviceUnavailable where there is no room for it.
        """
        return self._thread.submit(self._load, bundle, key, aside)

    @property
    def hung_s(self) -> float | None:
        """For how long the device has not come back, where that is longer than it may take."""
        busy_s = self.device_thread.busy_s
        return busy_s if busy_s > self._settings.hang_timeout_s else None

    @property
    def alive(self) -> int:
        """Models in memory: those that serve, and those that somebody still holds."""
        return len(self._alive)

    async def wait_for_room(self, most: int, seconds: float) -> bool:
        """Whether no more than `most` are alive, at last within `seconds`."""

        def wait() -> bool:
            with self._freed:
                return self._freed.wait_for(lambda: self.alive <= most or self._closed, seconds)

        return self.alive <= most or await asyncio.to_thread(wait)

    def close(self) -> bool:
        """Ends the threads; False where one doesn't come back within `CLOSE_S`."""
        self._closed = True
        self._notify()
        self._thread.shutdown(wait=False, cancel_futures=True)
        ended = self.device_thread.submit(lambda: None)  # behind all that it has to do
        self.device_thread.shutdown(wait=False)
        deadline = time.monotonic() + CLOSE_S
        if not self._busy.acquire(timeout=CLOSE_S):
            return False
        return not wait([ended], deadline - time.monotonic()).not_done

    def _load(self, bundle: Callable[[], Bundle], key: Key, aside: bool) -> Model:
        with self._busy:
            return self._loaded(bundle, key, aside)

    def _loaded(self, bundle: Callable[[], Bundle], key: Key, aside: bool) -> Model:
        started = time.perf_counter()
        try:
            model = self._opened(bundle(), key, aside)
        except ServiceError:
            self._metrics.model_load_failures.inc()
            raise
        finally:
            memory.trim()  # what making a session took
        seconds = time.perf_counter() - started
        self._metrics.model_load.observe(seconds)
        log.info(
            "loaded %s version %d (%s) on %s in %s, in %.2f s",
            *key,
            model.bundle.digest[:12],
            model.detector.provider,
            model.detector.precision,
            seconds,
        )
        self._alive.add(model)
        weakref.finalize(model, self._free, [model.detector]).atexit = False
        return model

    def _opened(self, bundle: Bundle, key: Key, aside: bool) -> Model:
        graph, golden = bundle.read_graph(), bundle.golden_pixels()
        if (bundle.name, bundle.version) != key:
            raise BundleError(
                f"{bundle.folder}: its manifest says {bundle.name} version {bundle.version}"
            )
        try:
            detector = Detector(
                graph,
                bundle.manifest.image_size,
                self._settings.device,
                self._settings.threads,
                self._settings.precision,
                self._settings.max_batch_size,
            )
        except BundleError as error:
            raise BundleError(f"{bundle.folder}: {error}") from error
        self._warm_up(bundle, detector, golden, aside)
        batcher = Batcher(
            detector.run,
            self.device_thread,
            batch_size=detector.batch_size,
            max_queue=self._settings.max_queue,
            on_batch=self._metrics.batch_size.observe,
        )
        return Model(
            bundle=bundle,
            detector=detector,
            batcher=batcher,
            own=bundle.default_calibration(),
            trained=frozenset(bundle.manifest.data.trained),
        )

    def _warm_up(
        self, bundle: Bundle, detector: Detector, golden: np.ndarray | None, aside: bool
    ) -> None:
        try:
            if detector.device == "cuda":
                # The first run of each size is recorded as a CUDA graph, which work for another
                # model at the same time would spoil: those that serve wait for that.
                self.device_thread.submit(_run_first, bundle, detector, golden).result()
            else:
                _run_first(bundle, detector, golden, aside=aside)
        except InferenceFailed as error:
            refusal = BundleError if _is_graphs_fault(error, detector) else DeviceUnavailable
            raise refusal(f"{bundle.folder}: {error}") from error

    def _free(self, detector: list[Detector]) -> None:
        """Nobody holds the model any more, on whatever thread that turns out."""
        with suppress(RuntimeError):  # closed: the process ends
            self._thread.submit(self._drop, detector)

    def _drop(self, detector: list[Detector]) -> None:
        detector.clear()
        memory.trim()
        self._notify()

    def _notify(self) -> None:
        with self._freed:
            self._freed.notify_all()


def _is_graphs_fault(error: InferenceFailed, detector: Detector) -> bool:
    """Else the device's: it lacks memory, or is a GPU, of which a sick one says all sorts."""
    if isinstance(error, NoNumber):
        return True
    no_room = _NO_ROOM.search(_NODE_NAME.sub("", str(error)))
    return detector.device != "cuda" and not no_room


def _run_first(
    bundle: Bundle, detector: Detector, golden: np.ndarray | None, *, aside: bool = False
) -> None:
    """Warm up, then check that the golden picture gets its score, here on this device."""
    if golden is None or not aside:  # else it is what warms up
        detector.warm_up(aside=aside)
    if golden is None or bundle.manifest.golden is None:
        return
    expected, tolerance = bundle.manifest.golden.score, bundle.manifest.golden.tolerance
    (found,) = detector.run(golden[None], aside=aside)
    if not abs(found.score - expected) <= tolerance * expected:
        raise BundleError(
            f"{bundle.folder}: the self-check failed: {bundle.manifest.golden.file} scores "
            f"{found.score:.6g} on {detector.provider} in {detector.precision}, the manifest says "
            f"{expected:.6g}, and {tolerance:g} of that is the most it may differ by"
        )
