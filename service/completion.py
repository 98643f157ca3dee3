"""Work that goes on to its end although whoever asked for it has left, and work that comes again
until the service stops."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from service.errors import ServiceError

log = logging.getLogger(__name__)

T = TypeVar("T")


async def to_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Cancelling the call leaves `work` running; if that fails then, the log
    has it, as nobody else will."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_tell_failure)
        raise


async def on_thread_to_end(write: Callable[..., T], *arguments: object) -> T:
    """The same on a thread."""
    return await to_end(asyncio.to_thread(write, *arguments))


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Until the next turn, or until `stop`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()


def _tell_failure(task: "asyncio.Task[Any]") -> None:
    error = None if task.cancelled() else task.exception()
    if isinstance(error, ServiceError):
        log.info("refused after the caller left: %s", error)
    elif error is not None:
        log.error("failed after the caller left", exc_info=error)
