"""The rehearsal: a real service process, and answers over HTTP that are evaluate's."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import brightness_graph, picture
from training_fixtures import write_picture

from service.image import digest
from training.__main__ import main
from training.errors import TrainingError
from training.evaluate import Rate
from training.rehearsal import free_port, rehearse, serving, table

HELD_OUT = 9  # the finest rate that they promise is 10 %


@pytest.fixture
def labelled(tmp_path):
    """Held-out pictures up to a brightness of 0.2; three good ones and four spots to test."""
    root = tmp_path / "data"
    for i in range(HELD_OUT):
        write_picture(root / f"train/good/{i:03}.png", picture(0.12 + i * 0.01))
    for i, brightness in enumerate((0.1, 0.15, 0.4)):
        write_picture(root / f"test/good/{i}.png", picture(brightness))
    for i, brightness in enumerate((0.9, 0.8, 0.7, 0.18)):
        pixels = picture(0.1)
        pixels[20:30, 30:50] = round(255 * brightness)
        write_picture(root / f"test/spot/{i}.png", pixels)
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[20:30, 30:50] = 255
        write_picture(root / f"ground_truth/spot/{i}.png", mask)
    return root


@pytest.fixture
def bundle(write_bundle, labelled):
    """Its manifest names the nine pictures, with scores that are not theirs: 0.5."""
    files = sorted((labelled / "train" / "good").iterdir())
    digests = tuple(digest(file.read_bytes()) for file in files)
    return write_bundle(scores=(0.5,) * HELD_OUT, digests=digests)


def test_a_rehearsal_that_is_terminated_takes_its_service_along(bundle, labelled, tmp_path):
    for number in range(300):  # long enough to be ended in the middle
        write_picture(labelled / f"test/good/more{number}.png", picture(0.1))
    command = [sys.executable, "-m", "training", "rehearse", "--bundle", str(bundle.folder)]
    command += ["--data", str(labelled), "--device", "cpu"]
    rehearsal = subprocess.Popen(command, cwd=Path(__file__).parent.parent)

    def services() -> list[str]:
        listed = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout
        models = str(bundle.folder.parent.parent)
        return [line for line in listed.splitlines() if "service serve" in line and models in line]

    deadline = time.monotonic() + 120
    while not services():
        assert rehearsal.poll() is None and time.monotonic() < deadline, "no service started"
        time.sleep(0.02)
    rehearsal.terminate()

    # A shell says 130 of both: Python ends itself by SIGINT where the interrupt went through an
    # `exec` of text, as when an import makes a dataclass, although it was caught further out.
    assert rehearsal.wait(60) in (130, -signal.SIGINT)
    assert services() == []


def test_a_held_out_image_that_has_changed_is_named(bundle, labelled):
    write_picture(labelled / "train/good/003.png", picture(0.9))

    with pytest.raises(TrainingError, match=r"003.png: the held-out image .* has changed"):
        rehearse(bundle.folder, labelled, device="cpu")


def test_the_service_answers_over_http_as_evaluate_does(bundle, labelled, tmp_path, capsys):
    pictures, file = tmp_path / "pictures", tmp_path / "rehearsal.json"
    argv = ["rehearse", "--bundle", str(bundle.folder), "--data", str(labelled)]
    argv += ["--device", "cpu", "--pictures", str(pictures), "--json", str(file)]
    assert main(argv) == 0
    record = json.loads(file.read_text())
    assert record["auroc_difference"] == 0 and record["images_per_s"] > 0
    assert record["http"]["image"] == record["evaluation"]["image"]
    assert record["http"]["image"]["auroc"] == pytest.approx(11 / 12)

    # Calibrated over HTTP with the pictures themselves, so the threshold is not the manifest's.
    assert record["evaluation"]["decisions"]["threshold"] > 0.5
    threshold = record["calibration"]["threshold"]
    assert threshold == pytest.approx(0.2, abs=1e-3)
    assert record["calibration"]["samples"] == HELD_OUT
    assert record["calibration"]["achievable_fpr"] == pytest.approx(0.1)
    assert record["http"]["decisions"]["false_positives"]["count"] == 1
    assert record["http"]["decisions"]["kinds"]["spot"]["count"] == 3

    # Two of each kind, named by what the service decided.
    names = sorted(p.name for p in pictures.iterdir())
    assert names == [
        "good-0-normal.jpg",
        "good-1-normal.jpg",
        "spot-0-anomalous.jpg",
        "spot-1-anomalous.jpg",
    ]
    assert all(cv2.imread(str(pictures / name)).shape == (64, 96, 3) for name in names)
    printed = capsys.readouterr().out
    assert "over HTTP: image AUROC 0.9167" in printed and "false positives 1/3" in printed
    assert "spot  detected 3/4" in printed


def test_a_target_can_be_given_and_one_too_fine_is_the_services_refusal(bundle, labelled):
    found = rehearse(bundle.folder, labelled, target_fpr=0.2, device="cpu")
    assert found.calibration["achievable_fpr"] == pytest.approx(0.2)
    assert found.decisions.kinds["spot"] == Rate(3, 4)
    assert "promised false-positive rate 0.2" in table(found)
    with pytest.raises(TrainingError, match=r"calibration: HTTP 422.*at least 99"):
        rehearse(bundle.folder, labelled, target_fpr=0.01, device="cpu")


def test_an_imported_bundle_has_its_held_out_images_elsewhere(bundle, labelled, tmp_path, capsys):
    """Below the folder that --normals named; the labelled images need not lie there."""
    normals = tmp_path / "normals"
    shutil.move(labelled / "train", normals / "train")
    argv = ["rehearse", "--bundle", str(bundle.folder), "--data", str(labelled), "--device", "cpu"]
    assert main(argv) == 1
    assert "or --normals that, or the one it was imported with" in capsys.readouterr().err
    assert main([*argv, "--normals", str(normals)]) == 0
    assert "spot  detected 3/4" in capsys.readouterr().out


def test_a_target_of_zero_is_no_default(bundle, labelled):
    with pytest.raises(TrainingError, match="calibration: HTTP 422"):
        rehearse(bundle.folder, labelled, target_fpr=0.0, device="cpu")


def test_the_named_version_is_rehearsed_beside_a_newer_one(write_bundle, labelled):
    old = write_bundle(scores=(0.5,) * HELD_OUT)
    inverse = brightness_graph().replace(b"brightness", b"another123")
    write_bundle(version=2, graph=inverse, scores=(0.5,) * HELD_OUT)
    with serving(old.folder, "cpu") as client:
        answer = client.post(
            "/v1/inspect",
            content=(labelled / "test/good/0.png").read_bytes(),
            headers={"Content-Type": "image/png"},
        ).json()
    assert answer["model"]["version"] == 1 and answer["model"]["digest"] == old.digest


def test_a_service_that_does_not_start_is_an_error_in_its_own_words(bundle, write_bundle):
    """The rehearsed bundle is sound; its neighbour's graph was tampered with."""
    neighbour = write_bundle("neighbour")
    (neighbour.folder / "model.onnx").write_bytes(neighbour.read_graph() + b"\0")
    with (
        pytest.raises(TrainingError, match=r"(?s)the service failed.*neighbour.*SHA-256 is"),
        serving(bundle.folder, "cpu"),
    ):
        pytest.fail("it must not become ready")


def test_a_tampered_bundle_is_refused_before_any_service_starts(bundle, labelled, capsys):
    changed = bundle.read_graph() + b"\0"
    (bundle.folder / "model.onnx").write_bytes(changed)
    argv = ["rehearse", "--bundle", str(bundle.folder), "--data", str(labelled)]
    assert main(argv) == 1
    assert f"SHA-256 is {digest(changed)}" in capsys.readouterr().err


def test_the_service_is_gone_after_the_rehearsal(bundle):
    with serving(bundle.folder, "cpu") as client:
        port = client.base_url.port
        assert client.get("/livez").status_code == 200
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
