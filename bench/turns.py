"""Pieces of work that take turns, so that other work on the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
    """Each work's time, compared with the first's."""
    seconds = in_turns(list(works.values()), rounds)
    return {name: _compared(taken, seconds[0]) for name, taken in zip(works, seconds, strict=True)}


def in_turns(
    works: Sequence[Callable[[], object]], rounds: int, turn_s: float | None = None
) -> list[list[float]]:
    """Seconds of a call of each work in each round, in turns of about `turn_s` (TURN_S)."""
    calls = [_calls(work, TURN_S if turn_s is None else turn_s) for work in works]
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, count, taken in zip(works, calls, seconds, strict=True):
            taken.append(_turn(work, count))
    return seconds


def _calls(work: Callable[[], object], turn_s: float) -> int:
    """Calls in a turn, by one that comes after a first, slow one."""
    work()
    return max(1, round(turn_s / _turn(work, 1)))


def _turn(work: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def _compared(taken: list[float], first: list[float]) -> Timed:
    ratios = [theirs / ours for theirs, ours in zip(first, taken, strict=True)]
    return Timed(statistics.median(taken), statistics.median(ratios), min(ratios), max(ratios))
