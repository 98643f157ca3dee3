"""Drift: whether images decided normal still score as the calibration's normal images did.

    score -> rank among calibration and earlier scores -> p-value -> bets -> statistic -> alarm

While nothing changes, each new score is as likely to take any rank among all scores so far, and
the smoothed p-values are independent and uniform on (0, 1), whatever the scores' distribution
(Vovk, Testing randomness online, Statistical Science 36(4), 2021). Ranks among the calibration
alone would not do: given one calibration they are uniform only up to 1 / sqrt(n), which a long
stream finds out.

Shiryaev and Roberts' statistic bets at every image that scores changed there. It is a mean over
densities f of p-values after a change, each with R = (R + 1) f(p) from R = 0 (a mixture of
e-detectors: Shin, Ramdas & Rinaldo, New England Journal of Statistics in Data Science 2(2), 2023).
The densities are those of normal scores that move or spread (Vovk, Nouretdinov & Gammerman,
arXiv:2412.03464). As each integrates to 1, R less the number of images is a martingale while
nothing changes. Hence an alarm at R >= c comes after at least c images on average (optional
stopping), and within the first N images with probability at most N / c (Doob's inequality), both
on average over calibrations too.
"""

import math
import random
from collections import deque
from statistics import NormalDist

import numpy as np

from service.calibration import Calibration
from service.errors import InvalidParameter

RUN_LENGTH = 100_000  # images until a false alarm, on average, at least
WINDOW = 200  # recent images, for the picture
# Scores are ranked by steps of limit / CELLS, so that all there ever were take 32 KB of counts.
# Equal ones share their ranks at random, so coarse steps cost power at most.
CELLS = 4096
# What is bet on: z, the normal quantile of 1 - p, has another mean or standard deviation than the
# 0 and 1 of no change. The least shift doubles the false-positive rate of a threshold at 1 %.
SHIFTS = np.array([-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0])
SPREADS = np.array([0.5, 2.0])

_NORMAL = NormalDist()
_BELOW_ONE = 1 - 2**-53
# Logarithms of the densities over N(0, 1)'s, as polynomials of z.
_LINEAR = np.concatenate([SHIFTS, 0 * SPREADS])
_SQUARE = np.concatenate([0 * SHIFTS, (1 - SPREADS**-2) / 2])
_CONSTANT = np.concatenate([-(SHIFTS**2) / 2, -np.log(SPREADS)])


def bets(p_value: float) -> np.ndarray:
    """What each bet makes of 1 at a p-value in (0, 1]: densities on (0, 1), (10,)."""
    z = -_NORMAL.inv_cdf(min(p_value, _BELOW_ONE))
    return np.asarray(np.exp(_LINEAR * z + _SQUARE * (z * z) + _CONSTANT))


class ShiryaevRoberts:
    """The statistic of independent p-values, uniform on (0, 1) while nothing changes.

    Beyond `limit` it means an alarm, and is held so that it may fall again soon.
    """

    def __init__(self, limit: float) -> None:
        self.statistic = 0.0
        self._parts = np.zeros(len(_LINEAR))
        self._most = limit * len(_LINEAR)  # none reaches it while their mean is below the limit

    def update(self, p_value: float) -> None:
        self._parts = np.minimum((self._parts + 1) * bets(p_value), self._most)
        self.statistic = float(self._parts.sum()) / len(self._parts)


class DriftTest:
    """The test of one model's images decided normal, since one calibration took effect.

    What is exchangeable: the threshold is put just above the calibration's k-th lowest score,
    `limit`, and depends on no other. Given `limit` and which calibration scores lie below it,
    these, and new normal images' scores below it, are independent draws of one distribution. So
    scores from `limit` on don't enter, the k-th itself included; between `limit` and threshold
    lies no more than the tie margin. What was decided by another threshold, such as a request's
    own, is left out by the caller.

    All scores are remembered, as counts of bounded size. The same `id`, calibration and scores in
    the same order give the same state, so it can be rebuilt from what was kept. Not for several
    threads at a time. Raises InvalidParameter for a `run_length` that is not from 1 on.
    """

    def __init__(self, calibration: Calibration, id: str, run_length: float = RUN_LENGTH) -> None:
        if not 1 <= run_length < math.inf:
            raise InvalidParameter(f"run_length must be a number from 1 on, got {run_length:g}")
        self.run_length = run_length
        self.limit = max(_limit(calibration), 0.0)
        self.images = 0  # that entered
        self.alarmed_at: int | None = None  # `images` at the alarm, which stays
        scores = calibration.scores.clip(min=0)
        self._calibration = scores[scores < self.limit]  # ascending
        cells = [self._cell(score) for score in self._calibration]
        self._counts = np.bincount(np.array(cells, np.int64), minlength=CELLS)
        self._ranked = len(cells)
        self._evidence = ShiryaevRoberts(run_length)
        # Of which Python promises the same numbers in every version; text is hashed by SHA-512.
        self._random = random.Random(id)
        self._scores: deque[float] = deque(maxlen=WINDOW)
        self._p_values: deque[float] = deque(maxlen=WINDOW)

    def update(self, score: float) -> None:
        """Take the score of the next image decided normal; one not below `limit` is left out.

        A score below 0, which only rounding makes of a distance, counts as 0.
        """
        score = max(score, 0.0)
        if not score < self.limit:
            return
        p_value = self._rank(score)
        self._evidence.update(p_value)
        self.images += 1
        self._scores.append(score)
        self._p_values.append(p_value)
        if self.alarmed_at is None and self.statistic >= self.run_length:
            self.alarmed_at = self.images

    @property
    def statistic(self) -> float:
        """Evidence of a change: 0 at first, an alarm from `run_length` on.

        While nothing changes its mean is the number of images; after an alarm it is held at ten
        times `run_length` at most, and falls once images score again as before.
        """
        return self._evidence.statistic

    @property
    def alarm(self) -> bool:
        """Whether the statistic ever reached `run_length`; only a new test takes it back."""
        return self.alarmed_at is not None

    @property
    def p_values(self) -> list[float]:
        """Those of the last WINDOW images, in (0, 1], oldest first; small for high scores."""
        return list(self._p_values)

    def histogram(self, bins: int = 10) -> list[int]:
        """How many recent p-values lie in each of `bins` equal parts of (0, 1], ascending."""
        parts = np.ceil(np.array(self.p_values) * bins).astype(np.int64) - 1
        return [int(count) for count in np.bincount(parts, minlength=bins)]

    @property
    def distance(self) -> float | None:
        """Kolmogorov and Smirnov's, in [0, 1]: recent scores against the calibration's.

        The largest difference of their distribution functions, both below `limit`; None without
        scores on both sides.
        """
        if not self._scores or not len(self._calibration):
            return None
        recent = np.sort(self._scores)
        pooled = np.concatenate([recent, self._calibration])
        found = np.searchsorted(recent, pooled, side="right") / len(recent)
        expected = np.searchsorted(self._calibration, pooled, side="right")
        return float(np.abs(found - expected / len(self._calibration)).max())

    def _rank(self, score: float) -> float:
        """The smoothed p-value of a score among all so far, which it then joins.

        Beyond an alarm it joins no more: what is told is how images differ from those before.
        """
        cell = self._cell(score)
        above, equal = int(self._counts[cell + 1 :].sum()), int(self._counts[cell]) + 1
        share = 1 - self._random.random()  # in (0, 1]
        p_value = (above + share * equal) / (self._ranked + 1)
        if not self.alarm:
            self._counts[cell] += 1
            self._ranked += 1
        return p_value

    def _cell(self, score: float) -> int:
        return min(int(CELLS * score / self.limit), CELLS - 1)


def _limit(calibration: Calibration) -> float:
    """The calibration score that the threshold was put upon, or a lower threshold that was kept."""
    chosen = float(calibration.scores[calibration.samples - 1 - calibration.above])
    return min(chosen, calibration.threshold)
