"""From a score to a decision with a promised false-positive rate, by split conformal prediction.

With n scores of normal images that the model was not trained on, a new normal image's p-value
`(1 + #{calibration scores >= score}) / (n + 1)` is at most t with probability at most t, whatever
the scores' distribution, as long as it is exchangeable with the calibration images.
(Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, ch. 2; Laxhammar, 2014.)
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from service.errors import InvalidParameter, TooFewSamples

# The same image scored in another batch differs in its last bits (2e-7 relative, more in
# reduced precision); scores closer than this count as equal, in the normal image's favour.
TIE_MARGIN = 1e-5

Decision = Literal["normal", "anomalous"]


def min_samples(target_fpr: float) -> int:
    """The fewest normal images with which a false-positive rate of `target_fpr` can be promised."""
    _check_target(target_fpr)
    return max(1, math.ceil(1 / target_fpr - 1e-9) - 1)


def finest_fpr(samples: int) -> float:
    """The lowest false-positive rate that `samples` normal images can promise."""
    return 1 / (samples + 1)


def default_target_fpr(samples: int, wanted: float = 0.01) -> float:
    """`wanted`, or the finest rate that `samples` normal images allow where that is coarser."""
    return max(wanted, finest_fpr(samples))


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out normal images (n,) and the false-positive rate asked of them.

    `kept_threshold` is the one that was told when the calibration was made: it never changes
    afterwards. Raises TooFewSamples where the rate is finer than 1 / (n + 1).
    """

    id: str
    target_fpr: float
    scores: np.ndarray
    kept_threshold: float | None = None
    threshold: float = field(init=False)  # exactly representable in float32, like every score
    _ceilings: np.ndarray = field(init=False, repr=False)  # ascending, tie margin included

    def __post_init__(self) -> None:
        needed = min_samples(self.target_fpr)
        if len(self.scores) < needed:
            raise TooFewSamples(
                f"target_fpr {self.target_fpr:g} needs at least {needed} normal samples, got "
                f"{len(self.scores)}; with {len(self.scores)} the finest rate is "
                f"{finest_fpr(len(self.scores)):.4g}",
                samples=len(self.scores),
                needed=needed,
            )
        scores = np.sort(np.asarray(self.scores, np.float64))
        if not np.isfinite(scores).all():
            raise InvalidParameter("calibration scores must be finite numbers")
        ceilings = (scores + np.abs(scores) * TIE_MARGIN).astype(np.float32)
        allowed = self._allowed_exceedances()
        # Anomalous means that at most `allowed` calibration scores are as high or higher, that is,
        # a score strictly above the next one: the first float32 beyond it makes that a ">=".
        threshold = np.nextafter(ceilings[len(scores) - 1 - allowed], np.float32(np.inf))
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "_ceilings", ceilings)
        kept = self.kept_threshold
        object.__setattr__(self, "threshold", float(threshold) if kept is None else kept)

    def _allowed_exceedances(self) -> int:
        allowed = math.floor(self.target_fpr * (len(self.scores) + 1) + 1e-9) - 1
        return min(allowed, len(self.scores) - 1)

    @property
    def samples(self) -> int:
        return len(self.scores)

    @property
    def achievable_fpr(self) -> float:
        """The rate that is promised: the largest multiple of 1 / (n + 1) up to the target."""
        return (self._allowed_exceedances() + 1) / (self.samples + 1)

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


def _check_target(target_fpr: float) -> None:
    if not 0 < target_fpr < 1:
        raise InvalidParameter(f"target_fpr must lie between 0 and 1, got {target_fpr:g}")
