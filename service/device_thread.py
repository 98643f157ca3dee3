"""The thread that runs all graphs, and whether it still comes back."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class DeviceThread(ThreadPoolExecutor):
    """One thread for all models: they share one device, and a session has one caller at a time."""

    def __init__(self) -> None:
        super().__init__(1, thread_name_prefix="device")
        self._since: float | None = None

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        return super().submit(self._timed, fn, *args, **kwargs)

    @property
    def busy_s(self) -> float:
        """How long it has been at what it does."""
        since = self._since  # once: the thread may end meanwhile
        return 0.0 if since is None else time.monotonic() - since

    def _timed(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        self._since = time.monotonic()
        try:
            return fn(*args, **kwargs)
        finally:
            self._since = None
            del fn, args, kwargs  # as in `batcher.submit`
