"""Drift: what is promised of false alarms is kept, and changes in both directions are noticed."""

import random
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from service.calibration import Calibration
from service.drift import (
    CELLS,
    RUN_LENGTH,
    SHIFTS,
    SPREADS,
    WINDOW,
    DriftTest,
    ShiryaevRoberts,
    bets,
)
from service.errors import InvalidParameter

Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal_scores(rng: np.random.Generator, count: int) -> np.ndarray:
    """A normal image's scores: positive, somewhat skewed, in float32 as the graph gives them."""
    return (0.07 * np.exp(0.12 * rng.standard_normal(count))).astype(np.float32)


def two_values(rng: np.random.Generator, count: int) -> np.ndarray:
    """Scores of pictures that are nearly always the same."""
    return rng.choice(np.float32([0.25, 0.26, 0.5]), count, p=[0.6, 0.37, 0.03])


def calibrated(samples: int, target_fpr: float, seed: int = 0, draw: Draw = normal_scores):
    return Calibration("c", target_fpr, draw(np.random.default_rng(seed), samples))


def run(test: DriftTest, calibration: Calibration, scores: np.ndarray) -> None:
    """Up to the alarm, over the images that are decided normal."""
    for score in scores:
        if score < calibration.threshold:
            test.update(float(score))
        if test.alarm:
            return


def brute_force_p_values(
    calibration: list[float], stream: list[float], limit: float, id: str
) -> list[float]:
    """The definition: the share of all scores so far that lie above, and a random part of ties."""
    shares = random.Random(id)
    step = [int(CELLS * score / limit) for score in calibration]
    p_values = []
    for score in stream:
        mine = int(CELLS * score / limit)
        step.append(mine)
        above = sum(1 for other in step if other > mine)
        equal = sum(1 for other in step if other == mine)
        p_values.append((above + (1 - shares.random()) * equal) / len(step))
    return p_values


def brute_force_statistic(p_values: list[float]) -> float:
    """The mean over bets of the sum over starts of the products since."""
    unchanged = NormalDist()
    changed = [NormalDist(shift, 1) for shift in SHIFTS] + [NormalDist(0, s) for s in SPREADS]
    z = [unchanged.inv_cdf(1 - p_value) for p_value in p_values]
    total = 0.0
    for density in changed:
        for start in range(len(z)):
            product = 1.0
            for each in z[start:]:
                product *= density.pdf(each) / unchanged.pdf(each)
            total += product
    return total / len(changed)


@pytest.mark.parametrize("draw", [normal_scores, two_values])
def test_p_values_and_statistic_are_those_of_the_definition(draw: Draw) -> None:
    calibration = calibrated(60, 0.05, draw=draw)
    test = DriftTest(calibration, "model/1", run_length=1e15)
    stream = draw(np.random.default_rng(1), 90)
    stream[60:] *= np.float32(0.97)
    below = sorted(calibration.scores)[57]  # 61 x 5 % allow two above, and the new one
    entered = [float(score) for score in stream if score < below]
    reference = [float(score) for score in calibration.scores if score < below]

    for score in stream:
        test.update(float(score))

    expected = brute_force_p_values(reference, entered, below, "model/1")
    assert test.limit == below
    assert test.images == len(entered) >= 30
    assert test.p_values == pytest.approx(expected, rel=1e-12)
    assert test.statistic == pytest.approx(brute_force_statistic(expected), rel=1e-6)


def test_each_bet_is_fair_while_nothing_changes() -> None:
    z, width = np.linspace(-8, 8, 4001, retstep=True)
    unchanged = NormalDist()

    found = sum(unchanged.pdf(each) * width * bets(unchanged.cdf(-each)) for each in z)

    assert found == pytest.approx(np.ones(len(SHIFTS) + len(SPREADS)), abs=1e-3)


@pytest.mark.parametrize("p_value", [5e-324, 1e-300, 1 - 2**-53, 1.0])
def test_the_least_and_the_greatest_p_value_can_be_bet_on(p_value: float) -> None:
    found = bets(p_value)

    assert np.isfinite(found).all() and (found >= 0).all() and found.max() > 1


@pytest.mark.parametrize("draw", [normal_scores, two_values])
@pytest.mark.parametrize(("samples", "target"), [(199, 0.01), (19, 0.05), (9, 0.3), (1, 0.5)])
def test_p_values_of_unchanged_images_are_uniform_and_independent(
    samples: int, target: float, draw: Draw
) -> None:
    """Over new calibrations, the third and the fourth image that entered; a chance of 1e-4."""
    pairs = []
    rng = np.random.default_rng(samples)
    while len(pairs) < 500:
        calibration = Calibration("c", target, draw(rng, samples))
        test = DriftTest(calibration, str(len(pairs)))
        run(test, calibration, draw(rng, 30))
        if test.images >= 4:
            pairs.append(test.p_values[2:4])
        elif not (calibration.scores < test.limit).any() and draw is two_values:
            pairs.append(list(rng.random(2)))  # nothing lies below the lowest of two values
    third, fourth = np.sort(np.array(pairs), axis=0).T
    uniform = np.arange(1, 501) / 500
    correlation = np.corrcoef(np.array(pairs).T)[0, 1]

    assert np.abs(third - uniform).max() < 2.23 / np.sqrt(500)
    assert np.abs(fourth - uniform).max() < 2.23 / np.sqrt(500)
    assert abs(correlation) < 3.9 / np.sqrt(500)


@pytest.mark.parametrize(
    ("samples", "target", "draw"),
    [
        (199, 0.01, normal_scores),
        (19, 0.05, normal_scores),
        (19, 0.05, two_values),
        (9, 0.3, normal_scores),
        (5, 1 / 6, normal_scores),
        (1, 0.5, normal_scores),
    ],
)
def test_false_alarms_are_as_rare_as_promised(samples: int, target: float, draw: Draw) -> None:
    """Over new calibrations, with four standard errors of room."""
    run_length, streams, early = 60, 150, 12
    rng = np.random.default_rng(7)
    lengths = []
    for stream in range(streams):
        calibration = Calibration("c", target, draw(rng, samples))
        test = DriftTest(calibration, str(stream), run_length)
        while not test.alarm and test.images < 20 * run_length:
            before = test.images
            run(test, calibration, draw(rng, 200))
            if test.images == before:
                break  # nothing lies below the lowest of two values: no alarm, ever
        lengths.append(test.images if test.alarm else 20 * run_length)
    error = np.std(lengths) / np.sqrt(streams)
    share = np.mean(np.array(lengths) <= early)

    assert np.mean(lengths) >= run_length - 4 * error
    assert share <= early / run_length + 4 * np.sqrt(early / run_length / streams)
    # And not by never giving one: the statistic jumps over the limit by a few times at most.
    assert np.median(lengths) <= 5 * run_length


def test_ranks_among_the_calibration_alone_would_not_keep_the_promise() -> None:
    """Why earlier images are ranked among: what a fixed sample lacks is found out as a change."""
    rng = np.random.default_rng(3)
    alarms = {"calibration alone": 0, "online": 0}
    for stream in range(20):
        calibration = Calibration("c", 0.01, normal_scores(rng, 99))
        test, alone = DriftTest(calibration, str(stream)), ShiryaevRoberts(RUN_LENGTH)
        reference = calibration.scores[calibration.scores < test.limit]
        scores = normal_scores(rng, 2000)
        exceeded = False
        for score in scores[scores < test.limit]:
            test.update(float(score))
            above = int(np.count_nonzero(reference > score))
            alone.update((above + 1 - rng.random()) / (len(reference) + 1))
            exceeded |= alone.statistic >= RUN_LENGTH
        alarms["calibration alone"] += exceeded
        alarms["online"] += test.alarm

    assert alarms["online"] == 0
    assert alarms["calibration alone"] >= 4


@pytest.mark.parametrize(("before", "factor"), [(0, 1.15), (0, 0.87), (1000, 1.08), (1000, 0.92)])
def test_scores_that_rise_or_fall_are_noticed(before: int, factor: float) -> None:
    calibration = calibrated(199, 0.01)
    test = DriftTest(calibration, "model/1")
    rng = np.random.default_rng(1)
    run(test, calibration, normal_scores(rng, before))
    assert not test.alarm
    unchanged = test.images

    run(test, calibration, normal_scores(rng, 300) * np.float32(factor))

    assert test.alarmed_at is not None and unchanged < test.alarmed_at <= unchanged + 150


@pytest.mark.parametrize("spread", [0.4, 2.0])
def test_scores_that_gather_or_scatter_are_noticed(spread: float) -> None:
    calibration = calibrated(199, 0.01)
    test = DriftTest(calibration, "model/1")
    rng = np.random.default_rng(1)
    run(test, calibration, normal_scores(rng, 1000))
    assert not test.alarm

    middle = float(np.median(calibration.scores))
    run(test, calibration, middle * np.exp(spread * 0.12 * rng.standard_normal(300)))

    assert test.alarm


def test_a_change_is_noticed_after_one_the_other_way_that_was_too_small() -> None:
    calibration = calibrated(199, 0.01)
    test = DriftTest(calibration, "model/1")
    rng = np.random.default_rng(1)
    run(test, calibration, normal_scores(rng, 500) * np.float32(1.005))
    assert not test.alarm

    run(test, calibration, normal_scores(rng, 200) * np.float32(0.9))

    assert test.alarm


def test_replayed_scores_give_the_same_state() -> None:
    calibration = calibrated(99, 0.01)
    stream = normal_scores(np.random.default_rng(1), 400)
    first, again = (DriftTest(calibration, "model/1") for _ in range(2))

    for test in (first, again):
        for score in stream:
            test.update(float(score))

    assert first.p_values == again.p_values
    assert (first.statistic, first.images, first.distance) == (
        again.statistic,
        again.images,
        again.distance,
    )


def test_ties_are_shared_out_by_the_id() -> None:
    tests = [DriftTest(calibrated(99, 0.05, draw=two_values), id) for id in ("model/1", "model/2")]

    for test in tests:
        for _ in range(10):
            test.update(0.25)

    assert tests[0].p_values != tests[1].p_values


def test_the_random_numbers_are_the_same_on_every_machine() -> None:
    """A state rebuilt elsewhere, or years later, is the same: Python's promise, kept by value."""
    test = DriftTest(Calibration("c", 0.5, np.array([0.5])), "model/1")

    test.update(0.1)

    assert test.p_values == [0.27590840941236117]


def test_many_equal_scores_are_no_alarm() -> None:
    calibration = Calibration("c", 0.01, np.repeat(np.float32([0.2, 0.3]), [150, 49]))
    test = DriftTest(calibration, "model/1")

    for _ in range(3000):
        test.update(float(np.float32(0.2)))

    assert test.images == 3000 and not test.alarm


def test_where_all_calibration_scores_are_equal_none_of_them_enters() -> None:
    test = DriftTest(Calibration("c", 0.05, np.full(40, 0.25)), "model/1")

    test.update(0.25)

    assert (test.images, test.statistic, test.distance) == (0, 0.0, None)


def test_scores_from_the_one_that_the_threshold_lies_on_do_not_enter() -> None:
    calibration = Calibration("c", 0.01, np.arange(1.0, 200.0))  # the threshold lies above 198
    test = DriftTest(calibration, "model/1")

    for score in (198.0, 198.001, calibration.threshold, 500.0, float("inf"), float("nan")):
        test.update(score)
    assert test.limit == 198 and test.images == 0 and test.p_values == []

    test.update(np.nextafter(198.0, 0))
    assert test.images == 1 and test.p_values[0] <= 1 / 198  # the highest of 197 and itself


def test_with_a_confidence_the_limit_is_still_the_score_that_the_threshold_lies_on() -> None:
    calibration = Calibration("c", 0.05, np.arange(1.0, 201.0), confidence=0.9)
    test = DriftTest(calibration, "model/1")

    assert test.limit < calibration.threshold < test.limit + 0.01
    assert test.limit in calibration.scores and calibration.above == 5


def test_a_lower_threshold_that_was_kept_is_the_limit() -> None:
    kept = Calibration("c", 0.05, np.arange(1.0, 100.0), kept_threshold=90.5)
    test = DriftTest(kept, "model/1")

    test.update(90.7)
    test.update(90.2)

    assert test.limit == 90.5 and test.images == 1
    assert test.p_values[0] <= 1 / 91  # of the 90 below it and itself


def test_scores_of_zero_and_below_are_equal() -> None:
    test = DriftTest(Calibration("c", 0.5, np.array([-1e-7, 0.0, 0.0, 1.0])), "model/1")

    test.update(-2e-7)

    assert test.images == 0 and test.limit == 0.0


@pytest.mark.parametrize("samples", [1, 5, 19])
def test_with_few_calibration_scores_a_later_change_is_noticed(samples: int) -> None:
    calibration = calibrated(samples, 1 / (samples + 1), seed=2)
    test = DriftTest(calibration, "model/1")
    rng = np.random.default_rng(1)
    run(test, calibration, normal_scores(rng, 1500))
    unchanged = test.images
    assert unchanged >= 300 and not test.alarm

    run(test, calibration, normal_scores(rng, 300) * np.float32(0.85))

    assert test.alarmed_at is not None and test.alarmed_at <= unchanged + 100


def test_one_calibration_score_leaves_nothing_to_compare_with() -> None:
    test = DriftTest(Calibration("c", 0.5, np.array([0.5])), "model/1")

    for score in (0.1, 0.2, 0.3):
        test.update(score)

    assert test.images == 3 and test.distance is None
    assert sum(test.histogram()) == 3


def test_the_alarm_stays_while_the_statistic_falls_once_all_is_as_before() -> None:
    calibration = calibrated(199, 0.01)
    test = DriftTest(calibration, "model/1")
    rng = np.random.default_rng(1)
    run(test, calibration, normal_scores(rng, 800))
    assert not test.alarm
    for score in normal_scores(rng, 3000) * np.float32(0.8):
        test.update(float(score))
    alarmed_at, highest = test.alarmed_at, test.statistic
    assert alarmed_at is not None and alarmed_at < 850
    assert test.histogram()[9] > 0.6 * WINDOW  # still against those before the alarm
    assert RUN_LENGTH <= highest <= (len(SHIFTS) + len(SPREADS)) * RUN_LENGTH

    for score in normal_scores(rng, 500):
        test.update(float(score))

    assert test.statistic < RUN_LENGTH / 2
    assert test.alarm and test.alarmed_at == alarmed_at


def test_a_long_stream_takes_no_more_memory_than_a_short_one() -> None:
    test = DriftTest(calibrated(99, 0.01), "model/1")
    sizes = []

    for score in normal_scores(np.random.default_rng(1), 3 * WINDOW):
        test.update(float(score))
        sizes.append((len(test.p_values), test._counts.nbytes))

    assert sizes[-1] == sizes[WINDOW + 20] == (WINDOW, 8 * CELLS)
    assert int(test._counts.sum()) == test.images + 98  # and yet none is forgotten


def test_the_histogram_is_of_recent_p_values_alone() -> None:
    calibration = calibrated(199, 0.01)
    test = DriftTest(calibration, "model/1")
    assert test.histogram() == [0] * 10
    rng = np.random.default_rng(1)
    run(test, calibration, normal_scores(rng, 1000))
    level = test.histogram()

    for score in normal_scores(rng, WINDOW) * np.float32(0.9):
        test.update(float(score))
    tilted = test.histogram()

    assert sum(level) == sum(tilted) == WINDOW
    assert max(level) < 40 and tilted[9] > 60 and tilted[0] < 10
    expected = [sum(low < 4 * p <= low + 1 for p in test.p_values) for low in range(4)]
    assert test.histogram(bins=4) == expected


def test_the_distance_is_the_largest_difference_of_distribution_functions() -> None:
    test = DriftTest(Calibration("c", 0.15, np.arange(1.0, 7.0)), "model/1")  # 1 to 5 below 6
    assert test.distance is None

    test.update(3.0)
    assert test.distance == pytest.approx(2 / 5)  # below 3 none against two, at 3 one against three
    test.update(3.5)
    test.update(3.5)
    assert test.distance == pytest.approx(2 / 5)  # at 2: none of three against two of five
    test.update(0.5)
    test.update(0.5)
    assert test.distance == pytest.approx(2 / 5)  # at 0.5: two of five against none


def test_the_distance_is_of_recent_scores_alone() -> None:
    test = DriftTest(calibrated(199, 0.01), "model/1")
    rng = np.random.default_rng(1)
    for score in normal_scores(rng, 400) * np.float32(0.8):
        test.update(float(score))
    far = test.distance

    for score in normal_scores(rng, 2 * WINDOW):
        test.update(float(score))

    assert far is not None and far > 0.5
    assert test.distance is not None and test.distance < 0.2


@pytest.mark.parametrize("run_length", [0.5, 0, -1, float("inf"), float("nan")])
def test_a_run_length_below_one_image_is_refused(run_length: float) -> None:
    with pytest.raises(InvalidParameter, match="run_length must be a number from 1 on"):
        DriftTest(calibrated(99, 0.01), "model/1", run_length)
