"""uvicorn's server, which says that it is going before it goes.

On SIGTERM `/readyz` fails at once, and for a while all else goes on as before, so that whoever
spreads requests has time to see it; then the listener closes, and what was accepted is answered.
"""

import asyncio
import logging
import signal
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.protocol import CLOSE_S

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """`delay_s` passes between SIGTERM and the end of listening, none after Ctrl-C. Another signal
    skips it, and one that comes when nobody listens any more breaks off what is under way."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, delay_s: float) -> None:
        super().__init__(config)
        self._app, self._delay_s = app, delay_s
        self._leave_at: float | None = None
        self._closing = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._captured_signals.append(sig)
        if self._closing:
            asyncio.get_running_loop().call_soon_threadsafe(self._break_off)
        elif self._leave_at is None and sig == signal.SIGTERM:
            self._app.state.leaving = True
            self._leave_at = time.monotonic() + self._delay_s
            log.info("going: still listening for %g s", self._delay_s)
        else:
            self.should_exit = True

    def _break_off(self) -> None:
        """Tell everybody who waits for an answer, and wait for nobody who doesn't read it."""
        for task in self.server_state.tasks:
            task.cancel()
        for connection in self.server_state.connections:
            connection.loop.call_later(CLOSE_S, connection.abort)  # type: ignore[union-attr]

    async def on_tick(self, counter: int) -> bool:
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            self.should_exit = True
        self._closing = await super().on_tick(counter)
        self._app.state.leaving |= self._closing
        return self._closing
