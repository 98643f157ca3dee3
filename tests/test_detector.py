"""The graph on a device: exact answers, one interface, and no silent fallback."""

import numpy as np
import pytest
from conftest import SIZE, added_to_map, brightness_graph, picture, spotted
from onnx import numpy_helper

from service.detector import Detector
from service.errors import BundleError, InferenceFailed, NoNumber


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(brightness_graph(), SIZE, "cpu", threads=1)


def test_every_image_of_a_batch_gets_its_own_score_and_map(detector: Detector) -> None:
    predictions = detector.run(np.stack([picture(0.2), spotted(0.8), picture(0.4)]))

    assert [p.score for p in predictions] == pytest.approx([51 / 255, 204 / 255, 102 / 255])
    assert all(p.anomaly_map.shape == SIZE for p in predictions)
    assert all(p.score == p.anomaly_map.max() for p in predictions)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_batch_size_gives_the_same_scores(detector: Detector, count: int) -> None:
    predictions = detector.run(np.stack([spotted(0.8)] * count))

    assert [p.score for p in predictions] == pytest.approx([204 / 255] * count)


@pytest.mark.parametrize("threads", [1, 2])
def test_aside_of_others_the_scores_are_the_same(threads: int) -> None:
    detector = Detector(brightness_graph(), SIZE, "cpu", threads)
    detector.warm_up(aside=True)

    (aside,), (found,) = (detector.run(spotted(0.8)[None], aside=each) for each in (True, False))

    assert aside.score == found.score and (aside.anomaly_map == found.anomaly_map).all()


def test_where_nothing_is_padded_a_batch_is_the_largest_size_that_waits(detector: Detector) -> None:
    assert detector.batch_sizes == (1, 2, 4, 8)
    assert [detector.batch_size(waiting) for waiting in (1, 2, 3, 5, 7, 8, 20)] == [
        1, 2, 2, 4, 4, 8, 8
    ]  # fmt: skip


def test_where_batches_are_padded_all_that_wait_are_a_batch(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector._session, "pads", True)
    assert [detector.batch_size(waiting) for waiting in (1, 3, 8, 20)] == [1, 3, 8, 8]


def test_it_says_what_it_runs_on(detector: Detector) -> None:
    assert detector.description == "CPUExecutionProvider in float32, batches of 1, 2, 4, 8"


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(BundleError, match="can't load the graph"):
        Detector(b"not onnx", SIZE, "cpu")


def test_a_graph_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(BundleError, match=r"\(N, 64, 96, 3\).*\(32, 32, 3\)"):
        Detector(brightness_graph((32, 32)), SIZE, "cpu")


def test_a_graph_with_other_outputs_is_refused() -> None:
    with pytest.raises(BundleError, match="outputs must be anomaly_map"):
        Detector(brightness_graph(output="heat"), SIZE, "cpu")


@pytest.mark.parametrize("no_number", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_no_number_anywhere_is_no_score_of_the_rest(no_number: float) -> None:
    """ONNX Runtime's own maximum leaves it out: the part would pass."""
    hole = np.zeros((1, *SIZE), np.float32)
    hole[0, 5, 7] = no_number
    spoiled = Detector(added_to_map(numpy_helper.from_array(hole, "hole")), SIZE, "cpu")

    with pytest.raises(NoNumber, match="no number"):
        spoiled.run(picture(0.4)[None])


def test_an_error_of_the_runtime_is_reported_and_the_next_batch_runs() -> None:
    fragile = Detector(brightness_graph(fragile=True), SIZE, "cpu")
    white = picture(1.0)

    with pytest.raises(InferenceFailed, match="CPUExecutionProvider: .*out of"):
        fragile.run(white[None])
    assert fragile.run(picture(0.4)[None])[0].score == pytest.approx(0.4)
