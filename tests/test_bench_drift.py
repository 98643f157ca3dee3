"""The simulation of drift: which pictures, how they are changed, and what is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from training_fixtures import normal_picture, run_settings, write_picture

from bench import drift
from bench.drift import CHANGES, SimpleJumper, inspect, lamp, main, measure, pictures
from service.calibration import Calibration
from service.drift import DriftTest
from training.errors import TrainingError
from training.export import export
from training.train import train


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Trained on a data set in MVTec AD's layout."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for part, count in (("train/good", 12), ("test/good", 5), ("test/dark", 3)):
        for number in range(count):
            picture = normal_picture(rng) // (2 if part == "test/dark" else 1)
            write_picture(folder / "set" / part / f"{number}.png", picture)
    settings = run_settings(folder, 12, data=str(folder / "set"))
    train(settings)
    return export(Path(settings.models), "part")


@pytest.fixture(scope="module")
def data(bundle):
    return bundle.folder.parents[2] / "set"


def test_pictures_are_the_normal_ones_that_were_not_trained_on(bundle, data, tmp_path):
    found = pictures(bundle, [data])

    held_out = {data / held.file for held in bundle.manifest.data.held_out}
    assert {path for path, calibrates in found.items() if calibrates} == held_out
    others = {path for path, calibrates in found.items() if not calibrates}
    assert others == set((data / "test" / "good").iterdir())
    known = data / "train" / "good"
    trained = next(path for path in sorted(known.iterdir()) if path not in held_out)
    (tmp_path / "copy.png").write_bytes(trained.read_bytes())
    with pytest.raises(TrainingError, match="holds no normal picture that is new"):
        pictures(bundle, [tmp_path])


def test_unchanged_pictures_score_as_they_did_when_the_bundle_was_made(bundle, data):
    scores = measure(bundle, [data], None, 1)

    held_out = {held.score for held in bundle.manifest.data.held_out}
    assert len(scores.unchanged) == len(held_out) + 5 and len(scores.fresh) == 5
    for expected in held_out:
        assert np.abs(scores.unchanged / expected - 1).min() < 1e-4
    for name, changed in scores.changed.items():
        assert changed.shape == scores.unchanged.shape, name
        assert (changed != scores.unchanged).any(), name


def test_changes_do_what_they_are_called():
    pixels = np.full((40, 60, 3), 100, np.uint8)
    pixels[:, 30:] = 200

    changed = {name: change(pixels) for name, change in CHANGES.items()}

    assert changed["8 % brighter"][0, [0, -1]].tolist() == [[108] * 3, [216] * 3]
    assert changed["25 % darker"][0, 0].tolist() == [75] * 3
    assert lamp((2.0, 1.0, 1.0), pixels)[0, -1].tolist() == [255, 200, 200]  # saturates
    warm = changed["new lamp, warmer (red + 5 %, blue - 5 %)"][0, 0]
    assert warm.tolist() == [105, 100, 95]
    side = changed["new lamp, from the side (- 8 % to + 8 %)"]
    assert side[0, 0].tolist() == [92] * 3 and side[0, -1].tolist() == [216] * 3
    edges = [int(np.ptp(changed[f"blur, sigma {n}"][0, 29:31])) for n in ("1 pixel", "2 pixels")]
    assert 100 > edges[0] > edges[1] > 0
    assert all(each.dtype == np.uint8 and each.shape == pixels.shape for each in changed.values())


def test_images_are_counted_as_inspected_though_only_normal_ones_enter():
    scores = np.random.default_rng(0).normal(1, 0.1, 999)
    calibration = Calibration("c", 0.01, scores)
    test = DriftTest(calibration, "id")
    stream = np.tile([9.0, 1.2], 100)  # every other image is anomalous

    found = inspect(test, calibration, stream)

    assert found == 2 * test.images and test.alarm
    assert inspect(DriftTest(calibration, "id"), calibration, stream[:4]) is None


def test_the_simple_jumper_is_a_sum_of_martingales():
    """Against its definition: capital by bet, and the sum over starts of growth since."""
    p_values = np.random.default_rng(0).random(30) ** 2
    jumper = SimpleJumper()
    capital, totals = [1 / 3] * 3, [1.0]

    for p_value in p_values:
        jumper.update(float(p_value))
        total = sum(capital)
        capital = [
            (0.99 * each + 0.01 * total / 3) * (1 + bet * (p_value - 0.5))
            for each, bet in zip(capital, (-1, 0, 1), strict=True)
        ]
        totals.append(sum(capital))

    expected = sum(totals[-1] / totals[start] for start in range(30))
    assert jumper.statistic == pytest.approx(expected)


def test_a_change_of_scores_is_noticed_sooner_the_larger_it_is():
    scores = np.random.default_rng(0).normal(1, 0.1, 400)
    changed = {"none": scores, "small": scores - 0.05, "large": scores - 0.2}
    pool = drift.Scores(scores, changed, scores)

    none, small, large = drift.delays(pool, samples=200, before=300, streams=10, seed=0)

    assert none.unnoticed >= 0.9 and none.median is None
    assert large.median and small.median and 2 * large.median < small.median
    assert (small.shift, large.shift) == pytest.approx((-0.5, -2), rel=0.05)


def test_fixed_ranks_give_false_alarms_and_online_ones_do_not():
    scores = np.random.default_rng(0).normal(1, 0.1, 400)

    found = drift.false_alarms(scores, samples=50, streams=10, images=3000, seed=0)

    assert found.alarms <= 2 < found.alarms_by_calibration_alone
    assert found.mean_run_length >= drift.SHORT - 4 * found.standard_error


def test_the_command_writes_tables_and_figures(bundle, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drift, "AFTER", 30)
    monkeypatch.setattr(drift, "SHORT", 20)
    argv = ["--bundle", str(bundle.folder), "--data", str(data), "--out", str(tmp_path)]

    assert main([*argv, "--streams", "2", "--images", "40", "--samples", "20", "30"]) == 0

    record = json.loads((tmp_path / "part.json").read_text())
    assert [row["samples"] for row in record["false_alarms"]] == [20, 30]
    assert len(record["delays"]) == 2 * 2 * len(CHANGES)
    assert [row["change"] for row in record["comparison"]] == list(CHANGES)
    text = (tmp_path / "part.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert f"{len(pictures(bundle, [data]))} pictures" in text.splitlines()[-1]
    assert "5 other pictures, each shown once" in text
    assert all(f"| {change} |" in text for change in CHANGES)
