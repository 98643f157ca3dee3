"""Labels beside decisions: counts, exact intervals, and the threshold that labels would support."""

import numpy as np
import pytest
from scipy import stats

from service.calibration import Decision, rate_interval
from service.feedback import Advice, Confusion, Rate, advise, confusion, summaries
from service.inspections import Labelled

TRIALS = [(0, 1), (1, 1), (0, 20), (1, 20), (10, 20), (20, 20), (3, 1000), (997, 1000), (1, 10**5)]


def labelled(
    score: float,
    label: Decision,
    decision: Decision = "normal",
    version: int = 1,
    digest: str = "a",
) -> Labelled:
    return Labelled(version, digest, score, decision, label)


@pytest.mark.parametrize(("hits", "trials"), TRIALS)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_intervals_are_those_of_clopper_and_pearson(
    hits: int, trials: int, confidence: float
) -> None:
    exact = stats.binomtest(hits, trials).proportion_ci(confidence, "exact")

    low, high = rate_interval(hits, trials, confidence)

    assert (low, high) == pytest.approx((exact.low, exact.high), abs=2e-12)


def test_the_interval_holds_the_true_rate_as_often_as_it_says() -> None:
    rate, trials = 0.07, 60
    chances = stats.binom.pmf(np.arange(trials + 1), trials, rate)
    bounds = [rate_interval(hits, trials) for hits in range(trials + 1)]

    held = sum(
        chance for chance, (low, high) in zip(chances, bounds, strict=True) if low <= rate <= high
    )

    assert 0.95 <= held < 1


def test_decisions_are_counted_beside_labels() -> None:
    told = [labelled(0.9, "anomalous", "anomalous")] * 4
    told += [labelled(0.9, "normal", "anomalous")] * 3
    told += [labelled(0.1, "normal", "normal")] * 2
    told += [labelled(0.1, "anomalous", "normal")]

    counts = confusion(told)

    assert counts == Confusion(
        true_positives=4, false_positives=3, true_negatives=2, false_negatives=1
    )
    assert counts.false_positive_rate == Rate(0.6, *rate_interval(3, 5))
    assert counts.detection_rate == Rate(0.8, *rate_interval(4, 5))


def test_without_a_label_of_a_kind_its_rate_is_unknown() -> None:
    counts = confusion([labelled(0.9, "normal", "anomalous")])

    assert counts.false_positive_rate.rate == 1.0
    assert counts.detection_rate == Rate(None, 0.0, 1.0)


def test_graphs_are_told_apart_and_the_newest_comes_first() -> None:
    told = [labelled(0.1, "normal"), labelled(0.2, "normal", version=2)]
    told += [labelled(0.3, "normal", digest="b"), labelled(0.4, "normal")]

    found = summaries(told)

    assert [(one.version, one.digest) for one in found] == [(2, "a"), (1, "b"), (1, "a")]
    assert [one.confusion.true_negatives for one in found] == [1, 1, 2]
    assert summaries([]) == []


# Advice


def test_kinds_that_scores_part_leave_the_thresholds_between_them() -> None:
    told = [labelled(score, "normal") for score in (0.1, 0.3, 0.2)]
    told += [labelled(score, "anomalous") for score in (0.9, 0.7)]

    assert advise(told) == Advice(above=0.3, up_to=0.7, false_positives=0, false_negatives=0)


def test_one_kind_alone_bounds_thresholds_on_one_side() -> None:
    normal = [labelled(0.1, "normal"), labelled(0.3, "normal")]
    anomalous = [labelled(0.7, "anomalous"), labelled(0.9, "anomalous")]

    assert advise(normal) == Advice(0.3, None, 0, 0)
    assert advise(anomalous) == Advice(None, 0.7, 0, 0)


def test_equal_scores_of_both_kinds_are_decided_alike() -> None:
    told = [labelled(0.5, "normal"), labelled(0.5, "normal"), labelled(0.5, "anomalous")]

    assert advise(told) == Advice(0.5, None, 0, 1)


def test_of_ranges_with_as_many_errors_the_lowest_misses_fewest() -> None:
    told = [labelled(0.2, "anomalous"), labelled(0.4, "normal")]

    assert advise(told) == Advice(None, 0.2, 1, 0)


def test_no_threshold_makes_fewer_errors_than_the_advised() -> None:
    """Beside every threshold that decides differently, one by one."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 30))
        told = [
            labelled(float(np.float32(score)), "anomalous" if defect else "normal")
            for score, defect in zip(
                rng.integers(0, 12, size) / 10, rng.random(size) < 0.4, strict=True
            )
        ]

        def errors(threshold: float, told: list[Labelled] = told) -> int:
            return sum((one.score >= threshold) != (one.label == "anomalous") for one in told)

        advice = advise(told)
        least = advice.false_positives + advice.false_negatives
        levels = [one.score for one in told] + [np.inf]
        assert least == min(errors(level) for level in levels)
        assert errors(np.inf if advice.up_to is None else advice.up_to) == least
        if advice.above is not None:
            assert errors(np.nextafter(advice.above, 2)) == least
