"""Loads that are under way: one for each model, whoever waits for it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

from service.errors import DeviceUnavailable, NotReady, Overloaded, ServiceError, UnknownModel
from service.model import Key, Model

log = logging.getLogger(__name__)


class Loads:
    """Calls `load` once for all who ask meanwhile, at most `most_waiting` for each model; it goes
    on when they leave."""

    def __init__(self, load: Callable[[Key], Awaitable[Model]], most_waiting: int) -> None:
        self._load, self._most_waiting = load, most_waiting
        self._tasks: dict[Key, asyncio.Task[Model]] = {}
        self._waiting: Counter[Key] = Counter()

    async def get(self, key: Key) -> Model:
        """Raises what `load` raises, NotReady where there is no room, and Overloaded."""
        if self._waiting[key] >= self._most_waiting:
            raise Overloaded(
                f"{self._waiting[key]} requests wait for {key[0]} version {key[1]} to be loaded; "
                f"the limit is {self._most_waiting}"
            )
        task = self._tasks.get(key) or self._begin(key)
        self._waiting[key] += 1
        try:
            return await asyncio.shield(task)
        except DeviceUnavailable as error:  # out of memory, say: it may be had later
            raise NotReady(str(error)) from None
        except ServiceError as error:  # one for each: a shared one would gather all tracebacks
            raise type(error)(*error.args) from None
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:  # callers may name anything: nothing stays of it
                del self._waiting[key]
            del task  # which has the error, whose traceback has this frame

    def _begin(self, key: Key) -> "asyncio.Task[Model]":
        task = self._tasks[key] = asyncio.ensure_future(self._load(key))
        task.add_done_callback(partial(self._end, key))
        return task

    def _end(self, key: Key, task: "asyncio.Task[Model]") -> None:
        del self._tasks[key]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, UnknownModel):
            log.error("%s version %d can't be loaded: %s", *key, str(error))  # without its frames

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
