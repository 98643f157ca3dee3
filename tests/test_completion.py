"""Work that goes on although whoever asked for it has left."""

import asyncio
import threading

import pytest

from service.completion import on_thread_to_end, to_end
from service.errors import InvalidParameter


def test_the_result_and_the_error_are_those_of_the_work() -> None:
    async def fail() -> None:
        raise InvalidParameter("no")

    assert asyncio.run(on_thread_to_end(divmod, 7, 2)) == (3, 1)
    with pytest.raises(InvalidParameter, match="no"):
        asyncio.run(to_end(fail()))


def test_it_goes_on_after_the_caller_left() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        assert may_end.wait(30)
        ended.set()

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await on_thread_to_end(work)
        may_end.set()
        assert await asyncio.to_thread(ended.wait, 30)

    asyncio.run(leave())


@pytest.mark.parametrize(
    ("error", "level", "told"),
    [
        (InvalidParameter("too few"), "INFO", "refused after the caller left: too few"),
        (ZeroDivisionError(), "ERROR", "failed after the caller left"),
    ],
)
def test_what_fails_after_the_caller_left_is_in_the_log_once(
    caplog: pytest.LogCaptureFixture, error: Exception, level: str, told: str
) -> None:
    caplog.set_level("INFO")

    async def leave() -> None:
        left = asyncio.Event()

        async def fail() -> None:
            await left.wait()
            raise error

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await to_end(fail())
        left.set()
        async with asyncio.timeout(30):
            while not caplog.records:
                await asyncio.sleep(0.01)

    asyncio.run(leave())

    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [(level, told)]
