"""The bundles to measure with: they keep the contract, and their answers depend on the pixels."""

from functools import partial

import numpy as np
import pytest

from bench import graphs
from service.bundle import Bundle
from service.calibration import decide
from service.detector import Detector


def test_the_light_map_is_how_far_brightness_lies_from_its_blocks_mean():
    size = (64, 96)  # not square, so that swapped axes show
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    predictions = Detector(graphs.light_graph(size), size, "cpu", threads=1).run(images)
    gray = images.mean(axis=3) / 255
    blocks = gray.reshape(3, 8, graphs.BLOCK, 12, graphs.BLOCK)
    expected = np.abs(blocks - blocks.mean(axis=(2, 4), keepdims=True)).reshape(gray.shape)
    for prediction, anomaly_map in zip(predictions, expected, strict=True):
        np.testing.assert_allclose(prediction.anomaly_map, anomaly_map, atol=1e-6)
        assert prediction.score == pytest.approx(anomaly_map.max(), abs=1e-6)


def test_bundles_are_written_once(tmp_path, capsys):
    assert graphs.main(["--out", str(tmp_path)]) == 0
    folders = capsys.readouterr().out.split()
    light, resnet = (Bundle(tmp_path / name / name / "1") for name in ("light", "resnet18"))
    assert folders == [str(light.folder), str(resnet.folder)]
    assert resnet.digest == Bundle(graphs.DEMO).digest
    assert resnet.default_calibration().threshold > 0

    again, _ = graphs.write(tmp_path)
    assert again.manifest == light.manifest  # also the time when it was made


def test_a_copy_follows_a_graph_that_was_trained_anew(tmp_path, monkeypatch):
    before, after = (tmp_path / name / "1" for name in ("before", "after"))
    for folder, size in ((before, (64, 64)), (after, (32, 32))):
        graphs._made(folder, partial(graphs.light_graph, size), "none", 1.0)
    for demo in (before, after):
        monkeypatch.setattr(graphs, "DEMO", demo)
        copy = graphs.write(tmp_path / "models")[1]
        assert copy.name == "resnet18"
        assert copy.read_graph() == Bundle(demo).read_graph()


def test_the_light_bundle_calls_a_picture_normal_until_it_is_black_beside_white(tmp_path):
    light = graphs.write(tmp_path)[0]
    size = light.manifest.image_size
    gray, stark = np.full((2, *size, 3), 128, np.uint8)
    stark[:] = 0
    stark[0, 0] = 255  # alone in a block of black
    detector = Detector(light.read_graph(), size, "cpu", threads=1)
    threshold = light.default_calibration().threshold
    scores = [found.score for found in detector.run(np.stack([gray, stark]))]
    assert [decide(score, threshold) for score in scores] == ["normal", "anomalous"]
