"""Split conformal thresholds: what is promised is kept, and what can't be is refused."""

import numpy as np
import pytest
from scipy.stats import beta, binom

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
    with pytest.raises(InvalidParameter, match="^target_fpr must lie between 0 and 1"):
        min_samples(target)


@pytest.mark.parametrize(
    ("samples", "confidence", "says"),
    [
        (0, None, "target_fpr 0.01 needs at least 99 normal samples, got 0; send some first"),
        (
            49,
            None,
            "target_fpr 0.01 needs at least 99 normal samples, got 49; with 49 the finest rate is "
            "0.02",
        ),
        (
            100,
            0.95,
            "target_fpr 0.01 with confidence 0.95 needs at least 299 normal samples, got 100; "
            "with 100 the finest rate is 0.02951",
        ),
    ],
)
def test_too_few_samples_are_told_with_what_they_would_do_for(
    samples: int, confidence: float | None, says: str
) -> None:
    with pytest.raises(TooFewSamples) as refusal:
        Calibration("c", 0.01, np.arange(float(samples)), confidence=confidence)

    assert str(refusal.value) == says


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


def test_a_score_that_is_the_threshold_is_anomalous() -> None:
    assert decide(0.25, 0.25) == "anomalous"
    assert decide(0.25, 0.25 + 1e-12) == "anomalous"  # the same float32


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


def test_scores_in_any_order_and_precision_give_a_threshold_that_float32_holds() -> None:
    given = np.random.default_rng(5).uniform(0.1, 0.9, 40)

    calibration = Calibration("c", 0.1, given)

    assert np.array_equal(calibration.scores, np.sort(given))
    assert float(np.float32(calibration.threshold)) == calibration.threshold
    single = Calibration("c", 0.1, given.astype(np.float32)).scores
    assert single.dtype == np.float64


def test_the_threshold_that_was_told_is_kept() -> None:
    assert Calibration("c", 0.1, np.arange(40.0), kept_threshold=38.5).threshold == 38.5


@pytest.mark.parametrize(("confidence", "needed"), [(0.5, 1), (0.75, 2), (0.875, 3)])
def test_a_confidence_that_is_met_to_the_last_bit_needs_no_sample_more(
    confidence: float, needed: int
) -> None:
    assert min_samples(0.5, confidence) == needed
    with_one_above = Calibration("c", 0.5, np.arange(3.0), confidence=0.5)  # P(at most 1) = 0.5
    assert with_one_above.above == 1


def test_quantiles_are_those_of_the_samples() -> None:
    quantiles = Calibration("c", 0.05, np.arange(101.0)).quantiles()

    assert quantiles == {"min": 0.0, "q05": 5.0, "q50": 50.0, "q95": 95.0, "max": 100.0}


# With a confidence


def by_the_binomial(samples: int, target: float, confidence: float) -> int | None:
    """The most samples above the threshold, by SciPy; None where not even none is allowed."""
    allowed = [
        above
        for above in range(samples)
        if binom.cdf(above, samples, target) <= (1 - confidence) * (1 + 1e-9)
    ]
    return max(allowed, default=None)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("target", [0.3, 0.05, 0.01])
@pytest.mark.parametrize("samples", [1, 10, 59, 299, 1000])
def test_the_threshold_leaves_as_many_samples_above_as_the_binomial_tail_allows(
    samples: int, target: float, confidence: float
) -> None:
    allowed = by_the_binomial(samples, target, confidence)
    scores = np.arange(1.0, samples + 1)
    if allowed is None:
        with pytest.raises(TooFewSamples, match=f"with confidence {confidence:g}"):
            Calibration("c", target, scores, confidence=confidence)
        return

    calibration = Calibration("c", target, scores, confidence=confidence)

    assert (scores >= calibration.threshold).sum() == allowed
    assert calibration.achievable_fpr == pytest.approx(
        beta.ppf(confidence, allowed + 1, samples - allowed), abs=1e-9
    )
    assert calibration.achievable_fpr <= target + 1e-9


@pytest.mark.parametrize(
    ("target", "confidence", "needed"), [(0.05, 0.95, 59), (0.01, 0.95, 299), (0.001, 0.99, 4603)]
)
def test_the_number_of_samples_needed_for_a_confidence_is_the_fewest_that_do(
    target: float, confidence: float, needed: int
) -> None:
    assert min_samples(target, confidence) == needed
    assert by_the_binomial(needed, target, confidence) == 0
    assert by_the_binomial(needed - 1, target, confidence) is None
    assert finest_fpr(needed, confidence) <= target < finest_fpr(needed - 1, confidence)


@pytest.mark.parametrize(("samples", "target"), [(59, 0.05), (150, 0.05), (299, 0.01)])
def test_with_a_confidence_hardly_any_calibration_is_beyond_its_rate(
    samples: int, target: float
) -> None:
    """The rate of each of 2000 calibrations is known, as scores are uniform; without a confidence
    about half of them are beyond it."""
    rng = np.random.default_rng(2)
    beyond = {0.9: 0, None: 0}
    for _ in range(2000):
        scores = rng.uniform(1, 2, samples)
        for confidence in beyond:
            threshold = Calibration("c", target, scores, confidence=confidence).threshold
            beyond[confidence] += max(0.0, 2 - threshold) > target

    error = np.sqrt(0.1 * 0.9 / 2000)
    assert beyond[0.9] / 2000 <= 0.1 + 4 * error
    assert beyond[None] / 2000 > 0.25


def test_the_p_value_is_the_same_with_a_confidence() -> None:
    scores = np.random.default_rng(3).gamma(3.0, 0.1, 100)
    plain, confident = Calibration("c", 0.05, scores), Calibration("c", 0.05, scores, 0.9)

    assert confident.p_value(0.6) == plain.p_value(0.6)
    assert confident.threshold > plain.threshold


@pytest.mark.parametrize("confidence", [0.0, 1.0, 1.5, float("nan")])
def test_a_confidence_outside_zero_and_one_is_refused(confidence: float) -> None:
    with pytest.raises(InvalidParameter, match="confidence must lie between 0 and 1"):
        Calibration("c", 0.05, np.arange(100.0), confidence=confidence)


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_over_200_resamples_unseen_normals_are_refused_no_more_often_than_promised(
    confidence: float | None,
) -> None:
    """Resampled from one pool of scores, as a line would calibrate again and again."""
    rng = np.random.default_rng(4)
    pool = rng.lognormal(-2.0, 0.3, 20_000)
    target, rates = 0.05, []
    for _ in range(200):
        order = rng.permutation(len(pool))
        calibration = Calibration("c", target, pool[order[:150]], confidence=confidence)
        rates.append(float(np.mean(pool[order[150:]] >= calibration.threshold)))

    if confidence is None:
        assert np.mean(rates) <= calibration.achievable_fpr + 4 * np.std(rates) / np.sqrt(200)
    else:
        assert np.mean(np.array(rates) > target) <= 0.1 + 4 * np.sqrt(0.1 * 0.9 / 200)
