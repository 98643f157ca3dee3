"""Pieces of work that take turns, so that other work on the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TURN_S = 0.3  # a turn is repeated calls of about this much


@dataclass(frozen=True)
class Timed:
    """One piece of work: seconds of a call, and how many times as fast as the first piece."""

    seconds: float  # median over rounds
    times_as_fast: float  # median of the ratios within each round, with the least and the most
    least: float
    most: float


def timed(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timed]:
    """Each work's time in `rounds` rounds of a turn each, compared with the first's."""
    calls = {name: _calls(work) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(_turn(work, calls[name]))
    first = next(iter(seconds.values()))
    return {name: _compared(taken, first) for name, taken in seconds.items()}


def _calls(work: Callable[[], object]) -> int:
    """Calls in a turn, by one that comes after a first, slow one."""
    work()
    return max(1, round(TURN_S / _turn(work, 1)))


def _turn(work: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def _compared(taken: list[float], first: list[float]) -> Timed:
    ratios = [theirs / ours for theirs, ours in zip(first, taken, strict=True)]
    return Timed(statistics.median(taken), statistics.median(ratios), min(ratios), max(ratios))
