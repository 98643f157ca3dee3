"""What should serve and can't be had here: why, and when to try it again."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Refusal:
    wanted: object
    reason: str
    again: float  # on time.monotonic's clock
    pause_s: float


class Refusals:
    """By the name of a model; pauses between tries double from `pause_s` on."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._refusals: dict[str, Refusal] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._refusals

    def __iter__(self) -> Iterator[str]:
        return iter(self._refusals)

    def __len__(self) -> int:
        return len(self._refusals)

    def reason(self, name: str) -> str | None:
        refusal = self._refusals.get(name)
        return refusal.reason if refusal else None

    def add(self, name: str, wanted: object, reason: str) -> None:
        before = self._refusals.get(name)
        pause_s = self._pause_s
        if before and before.wanted == wanted:
            pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S)
        if not before or before.reason != reason:  # said once
            log.error("%s", reason)
        self._refusals[name] = Refusal(wanted, reason, time.monotonic() + pause_s, pause_s)

    def is_due(self, name: str, wanted: object) -> bool:
        """Whether to try: something else than was refused, or the pause is over."""
        refusal = self._refusals.get(name)
        return not refusal or refusal.wanted != wanted or refusal.again <= time.monotonic()

    def hurry(self, name: str) -> None:
        """Try again at once."""
        if name in self._refusals:
            self._refusals[name] = replace(self._refusals[name], again=0.0)

    def forget(self, name: str) -> None:
        self._refusals.pop(name, None)
