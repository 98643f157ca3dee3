"""Axes and bars: where values lie, and that a histogram counts what the threshold decides."""

import numpy as np
import pytest

from training.charts import Axis, Chart, axis_over, histogram


@pytest.mark.parametrize(
    "axis, labels",
    [
        (Axis(0, 200), ["0", "50", "100", "150", "200"]),
        (Axis(0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis(-3, 4), ["-2", "0", "2", "4"]),
        (Axis(0.11, 0.38), ["0.15", "0.2", "0.25", "0.3", "0.35"]),
        (Axis(0.07, 0.9, log=True), ["0.1", "0.2", "0.5"]),
        (Axis(1e-6, 2, log=True), ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]),
    ],
)
def test_ticks_are_round_and_inside(axis, labels):
    assert [label for _, label in axis.ticks()] == labels
    assert all(axis.at(float(label)) == pytest.approx(place) for place, label in axis.ticks())


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_runs_from_0_to_1_and_back(log):
    axis = Axis(0.5, 50, log)
    assert axis.at(np.array([0.5, 5, 50])) == pytest.approx([0, 0.5 if log else 1 / 11, 1])
    assert axis.values(axis.at(np.array([0.5, 2, 50]))) == pytest.approx([0.5, 2, 50])


def test_an_axis_is_logarithmic_where_values_span_a_decade_and_none_is_zero():
    assert axis_over(np.array([0.1, 1.0])).log
    assert not axis_over(np.array([0.1, 0.99])).log
    assert not axis_over(np.array([0.0, 1.0])).log


@pytest.mark.parametrize("values", [[0.0], [0.3, 0.3], [-1, 2], [0.01, 5]])
def test_an_axis_has_room_around_its_values(values):
    places = axis_over(np.array(values)).at(np.array(values))
    assert (places > 0).all() and (places < 1).all()


def test_a_curves_points_grow_upwards():
    unit = Axis(0, 1)
    curve = np.array([0, 1]), np.array([0, 1])
    chart = Chart("", "", "", "", unit, unit, curve)
    assert chart.points == f"0.0,{chart.HEIGHT:.1f} {chart.WIDTH:.1f},0.0"


@pytest.mark.parametrize("spread", [0.2, 3.0])  # linear and logarithmic
def test_bars_divide_exactly_at_the_threshold(spread):
    rng = np.random.default_rng(0)
    scores = np.exp(rng.normal(0, spread, 500)).astype(np.float32).astype(np.float64)
    threshold = float(scores[17])  # a score that ties with the threshold is at or above it
    drawn = histogram({"these": scores, "one": scores[17:18]}, threshold)
    these, one = drawn.groups
    assert drawn.axis.log == (spread == 3.0)
    assert these.above == (scores >= threshold).sum() and these.images == 500
    assert one.above == 1 and one.bars[0].above and one.bars[0].x == pytest.approx(drawn.place)
    for bar in these.bars:
        assert bar.above == (bar.x >= drawn.place - 1e-9)
        assert 0 < bar.height <= 1 and bar.x >= -1e-9 and bar.x + bar.width <= 1 + 1e-9
    assert max(bar.height for bar in these.bars) == 1
    assert sum(bar.height for bar in these.bars) * these.highest == pytest.approx(500)


def test_equal_scores_and_a_threshold_beyond_them_are_drawn():
    drawn = histogram({"flat": np.full(3, 0.25)}, 0.25)
    assert [bar.above for bar in drawn.groups[0].bars] == [True]
    beyond = histogram({"flat": np.full(3, 0.25)}, 0.75)
    assert beyond.groups[0].above == 0 and 0 < beyond.place < 1
