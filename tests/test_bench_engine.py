"""Devices and precisions side by side: everything that runs, compared with ONNX Runtime."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import engine, pixels
from bench.turns import timed
from service.bundle import Bundle

DEMO = Path("models/demo/1")


def test_works_are_compared_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is three times as slow in the second round changes no ratio."""
    clock = [0.0]
    slowness = iter([1.0] * 4 + [1.0, 1.0, 3.0, 3.0, 1.0, 1.0])
    monkeypatch.setattr("bench.turns.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("bench.turns.TURN_S", 0.0)  # one call a turn

    def working(seconds: float):
        def work() -> None:
            clock[0] += seconds * next(slowness)

        return work

    found = timed({"slow": working(2.0), "fast": working(0.5)}, rounds=3)

    assert found["slow"].seconds == 2 and found["fast"].seconds == 0.5
    assert (found["fast"].times_as_fast, found["fast"].least, found["fast"].most) == (4, 4, 4)


def test_every_device_that_can_be_had_gives_nearly_the_same_scores(capsys, tmp_path: Path) -> None:
    assert engine.main(["--rounds", "1", "--threads", "1", "--out", str(tmp_path)]) == 0

    record = json.loads((tmp_path / "engine.json").read_text())
    engines = {row["engine"] for row in record["rows"]}
    assert "cpu float32" in engines
    for row in record["rows"]:
        assert row["seconds"] > 0 and row["least"] <= row["times_as_fast"] <= row["most"]
        if row["engine"] != "openvino itself":
            assert row["score_change"] <= {"float32": 1e-4}.get(row["engine"].split()[1], 1e-2)
    assert 0 < record["map_share"]["demo"] < 0.5
    assert (tmp_path / "engine.md").read_text() in capsys.readouterr().out + "\n"


def test_the_maps_nodes_are_those_from_the_first_product_on() -> None:
    import onnx

    model = onnx.load_model_from_string(Bundle(DEMO).read_graph())

    kinds = [node.op_type for node in engine._from_products(model)]

    assert kinds.count("MatMul") == 6 and kinds[-1] == "ReduceMax"
    assert "Conv" not in kinds and "Sqrt" not in kinds


def test_pixels_are_measured_beside_the_plain_way(capsys) -> None:
    works, difference = pixels.decoding((1632, 2448))
    pillow, whole, reduced = (work() for work in works.values())
    assert np.abs(pillow.astype(int) - whole).max() <= 1
    assert np.abs(whole.astype(int) - reduced).mean() == difference
    assert 0 < difference < 2
    for work in (pixels.pictures() | pixels.taking_in()).values():
        work()
