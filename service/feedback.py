"""What people said of inspected parts -> how often the decisions were right, and the threshold that
would have been right most often.

Labels are told by whoever looked, mostly at what was flagged: counts are of those, and no estimate
of what production makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.calibration import rate_interval
from service.inspections import Labelled

CONFIDENCE = 0.95  # of both intervals


@dataclass(frozen=True)
class Rate:
    """A share of labelled parts; None where there are none of the kind."""

    rate: float | None
    low: float  # Clopper and Pearson's bounds
    high: float


@dataclass(frozen=True)
class Confusion:
    """Decisions that were made beside labels; "positive" is anomalous, as in everybody's tables."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def false_positive_rate(self) -> Rate:
        """Of the normal parts."""
        return _rate(self.false_positives, self.true_negatives)

    @property
    def detection_rate(self) -> Rate:
        """Of the anomalous parts."""
        return _rate(self.true_positives, self.false_negatives)


@dataclass(frozen=True)
class Advice:
    """Thresholds with the fewest errors on labelled parts: above one score, up to another."""

    above: float | None  # None: as low as one likes
    up_to: float | None  # None: as high as one likes
    false_positives: int
    false_negatives: int


@dataclass(frozen=True)
class Summary:
    """Of one graph: scores of different ones can't be compared."""

    version: int
    digest: str
    confusion: Confusion
    advice: Advice


def summaries(labelled: Sequence[Labelled]) -> list[Summary]:
    """Of every graph that has labels, the newest version first."""
    graphs: dict[tuple[int, str], list[Labelled]] = {}
    for one in labelled:
        graphs.setdefault((one.version, one.digest), []).append(one)
    return [
        Summary(version, digest, confusion(members), advise(members))
        for (version, digest), members in sorted(graphs.items(), reverse=True)
    ]


def confusion(labelled: Sequence[Labelled]) -> Confusion:
    def count(label: str, decision: str) -> int:
        return sum(one.label == label and one.decision == decision for one in labelled)

    return Confusion(
        true_positives=count("anomalous", "anomalous"),
        false_positives=count("normal", "anomalous"),
        true_negatives=count("normal", "normal"),
        false_negatives=count("anomalous", "normal"),
    )


def advise(labelled: Sequence[Labelled]) -> Advice:
    """The thresholds at which fewest of these would be decided wrongly; of several such ranges the
    lowest, which misses the fewest anomalous parts."""
    normal = np.sort([one.score for one in labelled if one.label == "normal"])
    anomalous = np.sort([one.score for one in labelled if one.label == "anomalous"])
    # Thresholds above one level and up to the next decide alike; the last are above all.
    levels = np.append(np.union1d(normal, anomalous), np.inf)  # (k + 1,)
    missed = np.searchsorted(anomalous, levels)  # below each
    flagged = len(normal) - np.searchsorted(normal, levels)
    best = int(np.argmin(missed + flagged))  # the first of equals
    return Advice(
        above=float(levels[best - 1]) if best > 0 else None,
        up_to=float(levels[best]) if best < len(levels) - 1 else None,
        false_positives=int(flagged[best]),
        false_negatives=int(missed[best]),
    )


def _rate(hits: int, others: int) -> Rate:
    trials = hits + others
    if not trials:
        return Rate(None, 0.0, 1.0)
    return Rate(hits / trials, *rate_interval(hits, trials, CONFIDENCE))
