"""Split conformal thresholds: what is promised is kept, and what can't be is refused."""

import numpy as np
import pytest

from service.calibration import (
    Calibration,
    decide,
    default_target_fpr,
    finest_fpr,
    min_samples,
)
from service.errors import InvalidParameter, TooFewSamples


def brute_force_p_value(scores: np.ndarray, score: float) -> float:
    """The definition, with the documented tie margin of 1e-5 relative."""
    as_high = sum(1 for s in scores if np.float32(s + abs(s) * 1e-5) >= np.float32(score))
    return (1 + as_high) / (len(scores) + 1)


@pytest.mark.parametrize(
    ("target", "needed"),
    [(0.5, 1), (0.05, 19), (0.01, 99), (0.005, 199), (0.001, 999), (0.3, 3), (0.999999999999, 1)],
)
def test_the_number_of_samples_needed_is_one_over_the_rate_less_one(
    target: float, needed: int
) -> None:
    assert min_samples(target) == needed


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_zero_and_one_is_refused(target: float) -> None:
    with pytest.raises(InvalidParameter, match="between 0 and 1"):
        min_samples(target)


def test_one_sample_short_is_refused_with_the_number_needed() -> None:
    with pytest.raises(TooFewSamples, match="at least 99 normal samples, got 98") as refusal:
        Calibration("c", 0.01, np.arange(98.0))

    assert (refusal.value.samples, refusal.value.needed) == (98, 99)


def test_with_just_enough_samples_the_threshold_lies_just_above_the_highest() -> None:
    calibration = Calibration("c", 0.01, np.linspace(0.1, 0.5, 99))

    assert 0.5 < calibration.threshold < 0.5 * (1 + 2e-5)
    assert calibration.achievable_fpr == pytest.approx(0.01)


def test_with_twice_as_many_samples_one_may_lie_above() -> None:
    scores = np.arange(1.0, 200.0)  # 199 samples at 1 %: 2 of 200, of which one is the new image

    calibration = Calibration("c", 0.01, scores)

    assert 198 < calibration.threshold < 198.01


@pytest.mark.parametrize("target", [0.01, 0.05, 0.07, 0.1, 0.29, 0.5])
@pytest.mark.parametrize("samples", [99, 100, 137, 250])
def test_anomalous_is_exactly_a_p_value_up_to_the_target(target: float, samples: int) -> None:
    rng = np.random.default_rng(samples)
    scores = rng.gamma(2.0, 0.1, samples).astype(np.float32)
    calibration = Calibration("c", target, scores)
    tests = np.concatenate([rng.gamma(2.0, 0.15, 300).astype(np.float32), scores])

    for score in tests:
        p_value = calibration.p_value(float(score))
        assert p_value == pytest.approx(brute_force_p_value(scores.astype(float), float(score)))
        anomalous = decide(float(score), calibration.threshold) == "anomalous"
        assert anomalous == (p_value <= target + 1e-12)


def test_a_calibration_image_scored_again_in_another_batch_stays_normal() -> None:
    scores = np.linspace(0.1, 0.7, 99, dtype=np.float32)
    calibration = Calibration("c", 0.01, scores)

    jittered = float(scores.max()) * (1 + 3e-7)

    assert decide(jittered, calibration.threshold) == "normal"


def test_equal_scores_count_as_equal() -> None:
    calibration = Calibration("c", 0.05, np.full(40, 0.25))

    assert calibration.p_value(0.25) == 1.0
    assert decide(0.25, calibration.threshold) == "normal"
    assert decide(0.2501, calibration.threshold) == "anomalous"


def test_p_values_run_from_one_to_one_over_n_plus_one() -> None:
    calibration = Calibration("c", 0.05, np.linspace(0.2, 0.4, 39))

    assert calibration.p_value(0.0) == 1.0
    assert calibration.p_value(9.0) == pytest.approx(1 / 40)


@pytest.mark.parametrize(("samples", "target"), [(99, 0.01), (150, 0.05), (30, 0.1)])
def test_the_promised_false_positive_rate_is_kept_on_unseen_normal_images(
    samples: int, target: float
) -> None:
    """Mean over resamples against the promise, with four standard errors of room above."""
    rng = np.random.default_rng(1)
    rates = []
    for _ in range(400):
        calibration = Calibration("c", target, rng.gamma(3.0, 0.1, samples))
        unseen = rng.gamma(3.0, 0.1, 500)
        rates.append(float(np.mean(unseen >= calibration.threshold)))
    error = np.std(rates) / np.sqrt(len(rates))

    assert np.mean(rates) <= calibration.achievable_fpr + 4 * error
    # And not by refusing everything: conformal rates lie within 1 / (n + 1) of the promise.
    assert np.mean(rates) >= calibration.achievable_fpr - 1 / (samples + 1) - 4 * error


def test_the_default_rate_is_one_percent_or_the_finest_possible() -> None:
    assert default_target_fpr(500) == 0.01
    assert default_target_fpr(99) == 0.01
    assert default_target_fpr(5) == finest_fpr(5) == pytest.approx(1 / 6)
    assert Calibration("c", default_target_fpr(5), np.arange(5.0)).samples == 5


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="finite"):
        Calibration("c", 0.5, np.array([0.1, np.nan]))


def test_quantiles_are_those_of_the_samples() -> None:
    quantiles = Calibration("c", 0.05, np.arange(101.0)).quantiles()

    assert quantiles == {"min": 0.0, "q05": 5.0, "q50": 50.0, "q95": 95.0, "max": 100.0}
