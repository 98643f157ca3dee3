"""The measurement of int8: what is quantised, on what it is calibrated, and what is compared."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from training_fixtures import IMAGE_SIZE, normal_picture, run_settings, write_picture

from bench.quantisation import FLOAT, INT8, NOT_DECODER, NOT_FIRST, PATHS, main, quantised, ratios
from bench.quantisation import trained_on as pictures_of
from service import image
from service.detector import Detector
from training.errors import TrainingError
from training.export import export
from training.train import train


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Trained on a data set in MVTec AD's layout."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for part, count in (("train/good", 8), ("test/good", 3), ("test/dark", 3)):
        for number in range(count):
            picture = normal_picture(rng) // (2 if part == "test/dark" else 1)
            write_picture(folder / "set" / part / f"{number}.png", picture)
    settings = run_settings(folder, 8, data=str(folder / "set"))
    train(settings)
    return export(Path(settings.models), "part")


@pytest.fixture(scope="module")
def data(bundle):
    return bundle.folder.parents[2] / "set"


@pytest.mark.parametrize("which, left_out", [(INT8, 0), (NOT_FIRST, 1), (NOT_DECODER, 9)])
def test_convolutions_read_int8_but_for_those_left_out(bundle, data, which, left_out):
    graph = quantised(bundle.read_graph(), which, pictures_of(bundle, data, 2))
    nodes = onnx.load_model_from_string(graph).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    whole = [node for node in convolutions if made_by.get(node.input[1]) != "DequantizeLinear"]
    assert len(convolutions) == 32 and len(whole) == left_out
    pictures = pictures_of(bundle, data, 3)
    exact = Detector(bundle.read_graph(), IMAGE_SIZE, "cpu").run(pictures)
    for ours, theirs in zip(Detector(graph, IMAGE_SIZE, "cpu").run(pictures), exact, strict=True):
        assert ours.score != theirs.score
        assert ours.score == pytest.approx(theirs.score, rel=0.2)


def test_it_is_calibrated_on_pictures_that_were_trained_on(bundle, data, tmp_path):
    pictures = pictures_of(bundle, data, 99)
    held_out = {held.file for held in bundle.manifest.data.held_out}
    assert len(pictures) == len(bundle.manifest.data.trained) == 8 - len(held_out)
    for name in held_out:
        other = image.resize(image.read(data / name), IMAGE_SIZE)
        assert not any((other == picture).all() for picture in pictures)
    write_picture(tmp_path / "new.png", normal_picture(np.random.default_rng(9)))
    with pytest.raises(TrainingError, match="holds no picture that .* was trained on"):
        pictures_of(bundle, tmp_path, 1)


def test_paths_are_compared_within_a_round_with_the_fastest_float_one():
    """A machine that is three times as slow in the second round changes no ratio."""
    taken = [[2.0, 6.0, 2.0], [1.0, 3.0, 1.0], [0.5, 1.5, 0.25]]
    assert ratios(taken, [0, 1]) == [[0.5, 0.5, 0.5], [1, 1, 1], [2, 2, 4]]


def test_the_command_measures_every_path(bundle, data, capsys):
    pytest.importorskip("openvino")
    argv = ["--bundle", str(bundle.folder), "--data", str(data), "--threads", "1"]
    assert main([*argv, "--pictures", "2", "--rounds", "1", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].split(", ")[-1] for line in lines[2:8]] == [d for _, d in PATHS]
    assert "| +0.0000 | 0.0% |" in lines[2]  # float32's own change
    assert [graph for graph, _ in PATHS].count(FLOAT) == 2
    assert "2 pictures to calibrate on" in lines[-1] and "6 tested" in lines[-1]
