"""Numbers -> the shapes of a chart, which the report's template draws as SVG.

Laid out here and not by a plotting library, so that text stays text in the page's own fonts,
colours follow its style sheet, and a curve takes two kilobytes.
"""

import math
from dataclasses import dataclass

import numpy as np

BINS = 36
MAX_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """A range of values, `low` lying at 0 and `high` at 1."""

    low: float
    high: float
    log: bool = False

    def at(self, values: np.ndarray | float) -> np.ndarray:
        low, high, values = self.low, self.high, np.asarray(values, np.float64)
        if self.log:
            low, high, values = math.log(low), math.log(high), np.log(values)
        return np.asarray((values - low) / (high - low))

    def values(self, places: np.ndarray) -> np.ndarray:
        """The inverse of `at`."""
        if self.log:
            return np.asarray(self.low * (self.high / self.low) ** places)
        return np.asarray(self.low + (self.high - self.low) * places)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of round values."""
        values = [v for v in self._round_values() if -1e-9 <= self.at(v) <= 1 + 1e-9]
        return [(float(self.at(value)), f"{value:.6g}") for value in values]

    def _round_values(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if last - first <= 3 else (1,)
            return [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        least = (self.high - self.low) / MAX_TICKS
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
        return [i * step for i in range(math.ceil(self.low / step), int(self.high / step) + 1)]


def axis_over(values: np.ndarray) -> Axis:
    """An axis with a little room around all values; logarithmic where they span a decade."""
    low, high = float(np.min(values)), float(np.max(values))
    if low > 0 and high >= 10 * low:
        room = (high / low) ** 0.03
        return Axis(low / room, high * room, log=True)
    room = 0.03 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room)


@dataclass(frozen=True)
class Chart:
    """A curve in a plot of WIDTH x HEIGHT; SVG's y grows downwards."""

    name: str
    description: str  # for a reader who can't see it
    x_label: str
    y_label: str
    x: Axis
    y: Axis
    curve: tuple[np.ndarray, np.ndarray]  # x, y
    mark: tuple[float, float] | None = None
    limit: float | None = None  # a value of x

    WIDTH, HEIGHT = 290, 210

    def place(self, x: np.ndarray | float, y: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        return self.WIDTH * self.x.at(x), self.HEIGHT * (1 - self.y.at(y))

    @property
    def points(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(*self.place(*self.curve), strict=True))


@dataclass(frozen=True)
class Bar:
    """Places from 0 to 1, as everything of a histogram."""

    x: float
    width: float
    height: float
    above: bool  # the threshold


@dataclass(frozen=True)
class Group:
    name: str
    bars: list[Bar]
    highest: int  # images in the highest bar
    above: int  # images at or above the threshold
    images: int


@dataclass(frozen=True)
class Histogram:
    axis: Axis
    threshold: float
    groups: list[Group]

    @property
    def place(self) -> float:
        """Of the threshold."""
        return float(self.axis.at(self.threshold))


def histogram(groups: dict[str, np.ndarray], threshold: float) -> Histogram:
    """Of groups of scores (n,) over one axis.

    One bin begins exactly at the threshold, so that colours and counts are the decisions.
    """
    axis = axis_over(np.concatenate([*groups.values(), [threshold]]))
    place = float(axis.at(threshold))
    below, above = math.ceil(place * BINS), math.ceil((1 - place) * BINS)
    edges = axis.values(place + np.arange(-below, above + 1) / BINS)
    edges[below] = threshold  # not as rounded on the way
    axis = Axis(float(edges[0]), float(edges[-1]), axis.log)
    found = [_group(name, scores, axis, edges, below) for name, scores in groups.items()]
    return Histogram(axis, threshold, found)


def _group(name: str, scores: np.ndarray, axis: Axis, edges: np.ndarray, below: int) -> Group:
    counts = np.histogram(scores, edges)[0]
    places, highest = axis.at(edges), int(counts.max())
    bars = [
        Bar(float(places[i]), float(places[i + 1] - places[i]), float(n / highest), i >= below)
        for i, n in enumerate(counts)
        if n
    ]
    return Group(name, bars, highest, int(counts[below:].sum()), len(scores))
