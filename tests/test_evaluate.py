"""Evaluation of a bundle whose answers are known: its map is the picture's brightness."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, picture
from scipy.stats import beta
from training_fixtures import write_picture

from service.image import digest
from training.__main__ import main
from training.errors import TrainingError
from training.evaluate import Rate, evaluate, table

THRESHOLD = 0.3  # just above: the highest of 99 held-out scores at a target of 1 %


def spot(brightness: float, rows=(20, 30), columns=(30, 50)) -> np.ndarray:
    pixels = picture(0.1)
    pixels[slice(*rows), slice(*columns)] = round(255 * brightness)
    return pixels


def mask(rows=(20, 30), columns=(30, 50), size: tuple[int, int] = SIZE) -> np.ndarray:
    drawn = np.zeros(size, np.uint8)
    drawn[slice(*rows), slice(*columns)] = 255
    return drawn


@pytest.fixture
def labelled(tmp_path):
    """Four normal pictures, one of them too bright; three spots, one too faint; two specks."""
    root = tmp_path / "data"
    for i, brightness in enumerate((0.1, 0.15, 0.2, 0.5)):
        write_picture(root / f"test/good/{i}.png", picture(brightness))
    for i, brightness in enumerate((0.9, 0.8, 0.25)):
        write_picture(root / f"test/spot/{i}.png", spot(brightness))
        write_picture(root / f"ground_truth/spot/{i}_mask.png", mask())
    for i in range(2):
        write_picture(root / f"test/speck/{i}.png", spot(0.7, (5, 7), (5, 7)))
        write_picture(root / f"ground_truth/speck/{i}.png", mask((5, 7), (5, 7)))
    return root


def test_decisions_and_metrics_are_exact(labelled, write_bundle):
    bundle = write_bundle()
    report = evaluate(bundle.folder, labelled, device="cpu")
    assert (report.bundle, report.digest, report.images) == ("part/1", bundle.digest, 9)
    made = report.decisions
    assert made.target_fpr == 0.01 and made.threshold == pytest.approx(THRESHOLD, rel=1e-4)
    assert made.false_positives == Rate(1, 4)
    assert made.kinds == {"spot": Rate(2, 3), "speck": Rate(2, 2)}
    assert made.detected == Rate(4, 5)
    # Of 5 x 4 pairs, the faint spot loses against the too bright normal picture.
    assert report.image.auroc == pytest.approx(19 / 20)
    assert report.kind_auroc["spot"] == pytest.approx(11 / 12)
    assert report.kind_auroc["speck"] == 1
    assert report.image.f1_max == pytest.approx(10 / 11)
    assert report.image.f1_max_threshold == pytest.approx(64 / 255)
    assert report.image.f1_max_fpr == 1 / 4
    assert report.scores["test/spot/0.png"] == pytest.approx(round(255 * 0.9) / 255)
    assert len(report.scores) == 9 and report.failed == {}


def test_pixel_metrics_pool_all_images(labelled, write_bundle):
    """Only the bright normal picture, 1 of 9, is above any defect: above the faint spot."""
    report = evaluate(write_bundle().folder, labelled, device="cpu")
    assert report.pixel.regions == 5 and report.masks.used == 5
    defects = 3 * 200 + 2 * 4
    normal = 9 * 64 * 96 - defects
    hot = 64 * 96 / normal
    assert report.pixel.auroc == pytest.approx(1 - hot * 200 / defects, abs=1e-9)
    # Overlap 4/5 until the false-positive rate of the bright picture, then 1.
    assert report.pixel.aupro == pytest.approx((hot * 0.8 + (0.3 - hot)) / 0.3, abs=1e-9)
    assert report.pixel.aupro_005 == pytest.approx(0.8, abs=1e-9)  # it is more than 5 %
    found = defects - 200
    expected = (found + 200 * defects / (defects + 64 * 96)) / defects
    assert report.pixel.average_precision == pytest.approx(expected, abs=1e-9)
    # In each image by itself, no normal pixel is ever above a defect.
    assert report.pixel.pro_per_image is None and report.pixel.pro_left_out == 5
    assert "per-image PRO undefined, 5 images left out" in table(report)


def test_the_published_per_image_figure_stands_beside_the_pooled_ones(labelled, write_bundle):
    """Of equal normal areas one is hotter than the defect, one cooler: see pro_per_image."""
    pixels = spot(0.8)
    pixels[50:60, 10:20], pixels[50:60, 50:60] = 230, 128
    write_picture(labelled / "test/spot/0.png", pixels)
    report = evaluate(write_bundle().folder, labelled, device="cpu")
    assert report.pixel.pro_per_image == pytest.approx(1 / 2) and report.pixel.pro_left_out == 4
    assert "per-image PRO 0.5000, 4 images left out" in table(report)


def test_masks_that_are_missing_empty_or_vanished_are_counted_and_left_out(labelled, write_bundle):
    (labelled / "ground_truth/spot/2_mask.png").unlink()  # the faint one
    write_picture(labelled / "ground_truth/spot/1_mask.png", mask((0, 0)))
    large = (10 * SIZE[0], 10 * SIZE[1])
    write_picture(labelled / "ground_truth/speck/0.png", mask((50, 52), (50, 52), large))
    report = evaluate(write_bundle().folder, labelled, device="cpu")
    assert report.masks.used == 2
    assert report.masks.missing == ["test/spot/2.png"]
    assert report.masks.empty == ["test/spot/1.png"]
    assert report.masks.vanished == ["test/speck/0.png"]
    assert report.pixel.regions == 2 and report.pixel.aupro == pytest.approx(1)
    assert report.images == 9 and report.decisions.kinds["spot"] == Rate(2, 3)
    assert "2 used, 1 missing, 1 empty, 1 vanished" in table(report)


def test_without_masks_there_are_no_pixel_metrics(labelled, write_bundle):
    for path in (labelled / "ground_truth").rglob("*.png"):
        path.unlink()
    report = evaluate(write_bundle().folder, labelled, device="cpu")
    assert report.pixel is None and len(report.masks.missing) == 5
    assert "no pixel metrics" in table(report)
    assert json.loads(json.dumps(report.as_dict()))["pixel"] is None


def test_pictures_and_masks_of_any_size_are_compared_at_the_maps_size(tmp_path, write_bundle):
    large = np.repeat(np.repeat(spot(0.9), 3, axis=0), 3, axis=1)
    write_picture(tmp_path / "data/test/spot/0.png", large)
    write_picture(tmp_path / "data/test/good/0.png", picture(0.1, (40, 50)))
    big_mask = np.repeat(np.repeat(mask(), 3, axis=0), 3, axis=1)
    write_picture(tmp_path / "data/ground_truth/spot/0.png", big_mask)
    report = evaluate(write_bundle().folder, tmp_path / "data", device="cpu")
    assert report.pixel.aupro > 0.99 and report.decisions.kinds["spot"] == Rate(1, 1)


def test_an_unreadable_picture_is_reported_or_an_error_under_strict(labelled, write_bundle):
    (labelled / "test/spot/0.png").write_bytes(b"no picture")
    folder = write_bundle().folder
    report = evaluate(folder, labelled, device="cpu")
    assert list(report.failed) == ["test/spot/0.png"] and report.images == 8
    assert report.decisions.kinds["spot"] == Rate(1, 2)
    assert "test/spot/0.png: the 10 bytes are not an image" in table(report)
    with pytest.raises(TrainingError, match="test/spot/0.png"):
        evaluate(folder, labelled, device="cpu", strict=True)


@pytest.mark.parametrize("count, total", [(0, 10), (1, 4), (5, 10), (10, 10), (3, 762)])
def test_a_rates_interval_is_clopper_and_pearsons(count, total):
    low = beta.ppf(0.025, count, total - count + 1) if count else 0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1
    assert Rate(count, total).interval() == pytest.approx((low, high), abs=1e-9)
    assert Rate(count, total).rate == count / total


def test_a_rates_interval_has_the_known_values():
    assert Rate(0, 10).interval() == pytest.approx((0, 0.3085), abs=1e-4)
    assert Rate(1, 4).interval() == pytest.approx((0.0063, 0.8059), abs=1e-4)
    assert str(Rate(1, 4)) == "1/4 = 0.250 [0.006, 0.806]"


def test_without_a_threshold_there_are_no_decisions_but_all_that_needs_none(
    labelled, write_bundle, capsys
):
    """As of a network imported without normal images."""
    bundle = write_bundle(scores=())
    report = evaluate(bundle.folder, labelled, device="cpu")
    assert report.decisions is None and report.as_dict()["decisions"] is None
    assert report.image.auroc == pytest.approx(19 / 20) and report.kind_auroc["speck"] == 1
    told = table(report)
    assert "no decisions" in told and "speck  AUROC 1.0000" in told and "detected" not in told
    argv = ["--bundle", str(bundle.folder), "--data", str(labelled)]
    assert main(["report", *argv]) == 1
    assert "has no threshold, and a report is about decisions" in capsys.readouterr().err
    assert main(["rehearse", *argv]) == 1
    assert "no held-out images to calibrate with" in capsys.readouterr().err


def test_the_command_line_prints_the_table_and_writes_all_of_the_report(
    labelled, write_bundle, tmp_path, capsys
):
    folder, file = write_bundle().folder, tmp_path / "reports/report.json"
    argv = ["evaluate", "--bundle", str(folder), "--data", str(labelled), "--device", "cpu"]
    assert main([*argv, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "false positives 1/4 = 0.250" in printed and "image AUROC 0.9500" in printed
    assert "spot   AUROC 0.9167   detected 2/3" in printed and "speck  AUROC 1.0000" in printed
    record = json.loads(file.read_text())
    expected = evaluate(folder, labelled, device="cpu").as_dict()
    assert record == json.loads(json.dumps(expected))
    decisions = record["decisions"]
    assert decisions["false_positives"]["interval_95"] == pytest.approx([0.0063, 0.8059], abs=1e-4)
    assert decisions["kinds"]["spot"]["rate"] == pytest.approx(2 / 3)
    assert record["masks"]["used"] == 5 and record["scores"]["test/good/3.png"] > 0.3


def test_a_folder_without_test_images_is_refused(write_bundle, tmp_path, capsys):
    folder = write_bundle().folder
    write_picture(tmp_path / "plain/a.png", picture())
    argv = ["evaluate", "--bundle", str(folder), "--data", str(tmp_path / "plain")]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert (
        "plain: needs labelled test images: test/good and test/<defect>" in error
        and "Traceback" not in error
    )


def test_a_category_is_chosen_by_flag_or_is_the_bundles_own(
    labelled, write_bundle, tmp_path, capsys
):
    folder = write_bundle().folder
    shutil.move(labelled, tmp_path / "set" / "bottle")
    shutil.copytree(tmp_path / "set" / "bottle", tmp_path / "set" / "cable")
    root = tmp_path / "set"
    with pytest.raises(TrainingError, match="needs --category; it holds bottle, cable"):
        evaluate(folder, root, device="cpu")
    argv = ["evaluate", "--bundle", str(folder), "--data", str(root), "--device", "cpu"]
    assert main([*argv, "--category", "cable"]) == 0
    report = evaluate(folder, root, layout="mvtec", category="cable", device="cpu")
    assert report.images == 9 and all(name.startswith("cable/test/") for name in report.scores)

    record_training(folder, layout="auto", category="bottle")
    report = evaluate(folder, root, device="cpu")
    assert all(name.startswith("bottle/test/") for name in report.scores)
    assert evaluate(folder, root / "cable", device="cpu").images == 9  # other data than its own
    capsys.readouterr()


def test_after_training_on_a_plain_folder_a_labelled_one_is_found_anew(labelled, write_bundle):
    folder = write_bundle().folder
    record_training(folder, layout="folder", category="")
    assert evaluate(folder, labelled, device="cpu").images == 9


def test_a_file_for_the_figures_that_cannot_be_written_is_refused_before_the_work(
    labelled, write_bundle, tmp_path, capsys, monkeypatch
):
    monkeypatch.delattr("training.evaluate.score_images")
    argv = ["--bundle", str(write_bundle().folder), "--data", str(labelled)]
    (tmp_path / "file").touch()
    for command in ("evaluate", "rehearse"):
        assert main([command, *argv, "--json", str(tmp_path)]) == 1
        assert "is a folder; name a file" in capsys.readouterr().err
        assert main([command, *argv, "--json", str(tmp_path / "file" / "json")]) == 1
        assert "--json" in (error := capsys.readouterr().err) and "can't be written" in error


def test_names_of_files_that_are_no_text_are_spelled_out(labelled, write_bundle, tmp_path):
    """In a strict locale, as most are; in a process of its own, whose output is a real stream."""
    odd = os.fsdecode(os.fsencode(labelled) + b"/test/good/\xff.png")
    (labelled / "test/good/0.png").rename(odd)
    command = [sys.executable, "-m", "training", "evaluate", "--data", str(labelled)]
    command += ["--bundle", str(write_bundle().folder), "--json", str(tmp_path / "all.json")]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=strict)
    assert done.returncode == 0, done.stderr
    assert r"unreadable: test/good/\udcff.png: its name is not UTF-8" in done.stdout
    assert json.loads((tmp_path / "all.json").read_text())["images"] == 8


def record_training(folder: Path, **settings: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["training"] |= settings
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_split_that_the_reader_draws_is_the_one_that_was_trained_on(tmp_path, write_bundle):
    folder, root = write_bundle().folder, tmp_path / "tiles"
    for frame in range(20):  # ten tiles of two exposures
        name = f"exp{1 + frame % 2}_num_{1000 * (frame // 2) + frame % 2}.jpg"
        write_picture(root / "MT_Free/Imgs" / name, picture(0.1))
    write_picture(root / "MT_Crack/Imgs/exp1_num_7.jpg", spot(0.9))
    by_tile = evaluate(folder, root, device="cpu")
    record_training(folder, layout="mtd-random")
    as_trained = evaluate(folder, root, device="cpu")
    assert len(as_trained.scores) == len(by_tile.scores) == 5
    assert as_trained.scores.keys() != by_tile.scores.keys()
    asked = evaluate(folder, root, layout="mtd", device="cpu")
    assert asked.scores.keys() == by_tile.scores.keys()


def test_test_images_that_were_trained_on_or_held_out_are_warned_of(labelled, write_bundle, caplog):
    folder = write_bundle().folder
    evaluate(folder, labelled, device="cpu")
    assert "flatter" not in caplog.text
    manifest = json.loads((folder / "manifest.json").read_text())
    digests = [digest((labelled / f"test/good/{i}.png").read_bytes()) for i in range(3)]
    manifest["data"]["trained"] = digests[:2]
    manifest["data"]["held_out"][0]["sha256"] = digests[2]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    evaluate(folder, labelled, device="cpu")
    assert "3 test images were trained on or held out: the figures flatter" in caplog.text


def test_a_bundle_whose_graph_was_changed_is_refused(labelled, write_bundle, capsys):
    folder = write_bundle().folder
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b" ")
    assert main(["evaluate", "--bundle", str(folder), "--data", str(labelled)]) == 1
    assert "SHA-256" in capsys.readouterr().err
