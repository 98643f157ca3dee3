"""Are there samples among the normal ones that are none? They would raise the threshold unseen.

The upper tail of normal scores is at most as heavy as a power law's, that is, exponential for their
logarithms. Then the scaled gaps between neighbours from the top, i * (log s_(i) - log s_(i+1)), are
independent and exponential (Rényi, On the theory of order statistics, 1953). Defects stand apart
from the normal samples below them: one of the first gaps is too large beside the ones under it.
"""

from dataclasses import dataclass

import numpy as np

TEST = (
    "largest scaled gap between the logarithms of the highest scores, against exponential gaps "
    "below it"
)
SIGNIFICANT = 0.01  # the share of clean sample sets that is suspected at most
_MIN_GAPS = 8  # that the largest is compared with; with fewer samples nothing can be told
_TAIL = 5  # the highest fifth of the samples is their tail
_TINY = 1e-12  # in place of zero, whose logarithm is none


@dataclass(frozen=True)
class Tail:
    """How likely a gap as large as the largest is in the tail of clean samples, and how many
    samples lie above it. `p_value` is None where there are too few samples to tell."""

    p_value: float | None
    above: int

    @property
    def suspects(self) -> int:
        """How many of the highest samples stand apart; 0 where none do."""
        return self.above if self.p_value is not None and self.p_value <= SIGNIFICANT else 0


def examine(scores: np.ndarray) -> Tail:
    """The test of scores (n,).

    Under the hypothesis, the i-th gap's share of it and the k - i gaps below is Beta(1, k - i):
    `(1 - share) ** (k - i)` is a p-value. The i-th gets the share 1 / (i * (i + 1)) of the
    level, since few suspects are likelier than many, and these sum to less than one (Bonferroni).
    """
    gaps = min(max(_MIN_GAPS, len(scores) // _TAIL), len(scores) - 1)
    if gaps < _MIN_GAPS:
        return Tail(None, 0)
    logs = np.log(np.maximum(np.sort(scores)[::-1][: gaps + 1], _TINY))
    number = np.arange(1, gaps + 1)
    scaled = number * (logs[:-1] - logs[1:])
    below = np.cumsum(scaled[::-1])[::-1]  # each with all gaps under it
    candidates = number[: gaps // 2]
    shares = np.divide(scaled, below, out=np.zeros(gaps), where=below > 0)[: gaps // 2]
    p_values = (1 - shares) ** (gaps - candidates) * candidates * (candidates + 1)
    best = int(np.argmin(p_values))
    return Tail(float(min(1.0, p_values[best])), best + 1)
