"""From a score to a decision with a promised false-positive rate, by split conformal prediction.

With n scores of normal images that the model was not trained on, a new normal image's p-value
`(1 + #{calibration scores >= score}) / (n + 1)` is at most t with probability at most t, whatever
the scores' distribution, as long as it is exchangeable with the calibration images.
(Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, ch. 2; Laxhammar, 2014.)

That holds on average over calibrations: about half of them are a little above their rate. With a
confidence as well, this very calibration keeps the rate, unless the samples were unlucky, which
happens with probability 1 - confidence at most: of n samples, a are left above the threshold, and
its rate is beyond t with the probability that a binomial of n trials at t gives a or fewer.
(Vovk, Conditional validity of inductive conformal predictors, ACML 2012, proposition 2a; the
tolerance limits of Wilks, 1941.)
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np

from service.errors import InvalidParameter, TooFewSamples

# The same image scored in another batch differs in its last bits (2e-7 relative, more in
# reduced precision); scores closer than this count as equal, in the normal image's favour.
TIE_MARGIN = 1e-5

Decision = Literal["normal", "anomalous"]


def min_samples(target_fpr: float, confidence: float | None = None) -> int:
    """The fewest normal images with which a false-positive rate of `target_fpr` can be promised.

    Raises InvalidParameter where a rate or confidence lies outside of 0 to 1.
    """
    _check_rate("target_fpr", target_fpr)
    if confidence is None:
        return max(1, math.ceil(1 / target_fpr - 1e-9) - 1)
    _check_rate("confidence", confidence)
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-target_fpr) - 1e-9))


def finest_fpr(samples: int, confidence: float | None = None) -> float:
    """The lowest false-positive rate that `samples` normal images can promise."""
    if confidence is not None:
        return -math.expm1(math.log1p(-confidence) / samples)
    return 1 / (samples + 1)


def default_target_fpr(samples: int, wanted: float = 0.01) -> float:
    """`wanted`, or the finest rate that `samples` normal images allow where that is coarser."""
    return max(wanted, finest_fpr(samples))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out normal images (n,) and the false-positive rate asked of them.

    `kept_threshold` is the one that was told when the calibration was made: it never changes
    afterwards. Raises TooFewSamples where n can't promise the rate.
    """

    id: str
    target_fpr: float
    scores: np.ndarray
    confidence: float | None = None  # None: the rate is kept on average over calibrations
    profile: str = ""  # that it was made for; "": for the whole model
    made: datetime | None = None
    kept_threshold: float | None = None
    threshold: float = field(init=False)  # exactly representable in float32, like every score
    _ceilings: np.ndarray = field(init=False, repr=False)  # ascending, tie margin included

    def __post_init__(self) -> None:
        check_samples(len(self.scores), self.target_fpr, self.confidence)
        scores = np.sort(np.asarray(self.scores, np.float64))
        if not np.isfinite(scores).all():
            raise InvalidParameter("calibration scores must be finite numbers")
        ceilings = (scores + np.abs(scores) * TIE_MARGIN).astype(np.float32)
        # Anomalous means that at most `above` calibration scores are as high or higher, that is,
        # a score strictly above the next one: the first float32 beyond it makes that a ">=".
        threshold = np.nextafter(ceilings[len(scores) - 1 - self.above], np.float32(np.inf))
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "_ceilings", ceilings)
        kept = self.kept_threshold
        object.__setattr__(self, "threshold", float(threshold) if kept is None else kept)

    @property
    def above(self) -> int:
        """How many of the samples the threshold leaves above: those that it was not put upon."""
        if self.confidence is not None:
            above = _most_above(self.samples, self.target_fpr, 1 - self.confidence)
            return min(above, self.samples - 1)
        allowed = math.floor(self.target_fpr * (len(self.scores) + 1) + 1e-9) - 1
        return min(allowed, len(self.scores) - 1)

    @property
    def samples(self) -> int:
        return len(self.scores)

    @property
    def achievable_fpr(self) -> float:
        """The rate that is promised: the largest multiple of 1 / (n + 1) up to the target; with a
        confidence, the lowest that the same threshold keeps with it."""
        if self.confidence is not None:
            return _rate_kept(self.samples, self.above, 1 - self.confidence)
        return (self.above + 1) / (self.samples + 1)

    def p_value(self, score: float) -> float:
        """Share of normal images expected to score this high or higher, in (0, 1]."""
        below = int(np.searchsorted(self._ceilings, np.float32(score), side="left"))
        return (1 + self.samples - below) / (self.samples + 1)

    def quantiles(self) -> dict[str, float]:
        levels = {"min": 0.0, "q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}
        return {name: float(np.quantile(self.scores, level)) for name, level in levels.items()}


def decide(score: float, threshold: float) -> Decision:
    """Anomalous at or above the threshold, compared in float32 as the map's pixels are."""
    return "anomalous" if np.float32(score) >= np.float32(threshold) else "normal"


def check_samples(
    samples: int, target_fpr: float, confidence: float | None = None, more: str = ""
) -> None:
    """Raises TooFewSamples where the rate needs more; `more` says what became of others."""
    needed = min_samples(target_fpr, confidence)
    if samples >= needed:
        return
    asked = f"target_fpr {target_fpr:g}"
    if confidence is not None:
        asked += f" with confidence {confidence:g}"
    hint = "send some first"
    if samples:
        hint = f"with {samples} the finest rate is {finest_fpr(samples, confidence):.4g}"
    raise TooFewSamples(
        f"{asked} needs at least {needed} normal samples, got {samples}{more}; {hint}",
        samples=samples,
        needed=needed,
    )


def rate_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of a rate of which `hits` in `trials` were seen, exact: outside lies
    the true rate with probability 1 - confidence at most. (Clopper & Pearson, Biometrika 1934.)
    """
    risk = (1 - confidence) / 2
    low = 0.0 if hits == 0 else 1 - _rate_kept(trials, trials - hits, risk)
    high = 1.0 if hits == trials else _rate_kept(trials, hits, risk)
    return low, high


def _most_above(samples: int, rate: float, risk: float) -> int:
    """The most of n samples above a threshold such that more than `rate` of all images are with
    probability `risk` at most: the largest a where a binomial of n at `rate` is up to a with that
    probability at most. 0 where there is none, which is for the caller to have checked."""
    up_to = np.cumsum(_binomial(samples, math.ceil(samples * rate), rate))
    return max(0, int(np.searchsorted(up_to, risk * (1 + 1e-9), side="right")) - 1)


def _rate_kept(samples: int, above: int, risk: float) -> float:
    """The lowest rate for which `_most_above` allows `above`: a quantile of Beta(above + 1,
    samples - above), by bisection."""
    low, high = above / samples, 1.0
    while high - low > 1e-12:
        rate = (low + high) / 2
        if _binomial(samples, above, rate).sum() > risk:
            low = rate
        else:
            high = rate
    return high


def _binomial(trials: int, highest: int, rate: float) -> np.ndarray:
    """Probabilities (highest + 1,) of 0 to `highest` successes."""
    k = np.arange(1, highest + 1)
    choices = np.concatenate([[0.0], np.cumsum(np.log((trials - k + 1) / k))])
    successes = np.arange(highest + 1)
    logs = successes * math.log(rate) + (trials - successes) * math.log1p(-rate)
    return np.asarray(np.exp(choices + logs))


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate < 1:
        raise InvalidParameter(f"{name} must lie between 0 and 1, got {rate:g}")
