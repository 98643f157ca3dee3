"""Pictures as arrays, what is held out, and what a mask says."""

import logging
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from training_fixtures import normal_picture, write_normal_pictures, write_picture

from service import image
from training import data
from training.errors import TrainingError

# Loading


def test_every_format_and_size_is_loaded_as_the_service_would_see_it(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a.jpg": (50, 40), "b.png": (64, 96), "c.bmp": (200, 33), "d.tiff": (97, 300)}
    sizes["e.webp"] = (31, 31)
    paths = [write_picture(tmp_path / n, normal_picture(rng, s)) for n, s in sizes.items()]
    paths.append(write_picture(tmp_path / "f.png", normal_picture(rng)[..., 0]))
    loaded = data.load(paths, (64, 96), strict=True, what="pictures")
    assert loaded.paths == paths and loaded.failed == {}
    assert loaded.pixels.shape == (6, 64, 96, 3) and loaded.pixels.dtype == np.uint8
    for path, pixels, digest in zip(paths, loaded.pixels, loaded.digests, strict=True):
        assert (pixels == image.resize(image.read(path), (64, 96))).all()
        assert digest == image.digest(path.read_bytes())
    png = loaded.pixels[1]
    assert (png == cv2.imread(str(paths[1]))[..., ::-1]).all()  # RGB, untouched at its own size


def test_an_unreadable_file_is_named_and_skipped(tmp_path, caplog):
    good = write_normal_pictures(tmp_path, 2)
    bad = tmp_path / "0005.png"
    bad.write_bytes(good[0].read_bytes()[:100])
    empty = tmp_path / "001a.jpg"
    empty.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        loaded = data.load([good[0], bad, empty, good[1]], (64, 96), strict=False, what="images")
    assert loaded.paths == good and len(loaded.pixels) == len(loaded.digests) == 2
    assert set(loaded.failed) == {bad, empty}
    assert "0 bytes" in loaded.failed[empty]
    skipped = [r.getMessage() for r in caplog.records]
    assert len(skipped) == 2 and str(bad) in skipped[0] and str(empty) in skipped[1]


def test_under_strict_an_unreadable_file_is_an_error_that_names_it(tmp_path):
    good = write_normal_pictures(tmp_path, 2)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"bad\.png: .*not an image.*--strict"):
        data.load([*good, bad], (64, 96), strict=True, what="images")


def test_nothing_readable_at_all_is_an_error_even_without_strict(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match="none of the 1 normal images"):
        data.load([tmp_path / "bad.png"], (64, 96), strict=False, what="normal images")


# Holding out


@pytest.mark.parametrize(
    "count, held", [(3, 1), (10, 2), (99, 15), (100, 20), (133, 20), (134, 20), (762, 114)]
)
def test_fifteen_percent_are_held_out_and_at_least_20_of_100(count, held):
    trained, held_out = data.hold_out(count, 111)
    assert len(held_out) == held
    assert sorted(trained + held_out) == list(range(count))


def test_the_held_out_images_are_chosen_by_seed_and_from_everywhere():
    assert data.hold_out(100, 1) == data.hold_out(100, 1)
    chosen = [set(data.hold_out(100, seed)[1]) for seed in range(30)]
    assert len({frozenset(c) for c in chosen}) == 30
    assert len(set.union(*chosen)) > 90  # not one end of the folder


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_to_train_and_calibrate_are_refused(count):
    with pytest.raises(TrainingError, match=f"{count} normal images are too few: at least 3"):
        data.hold_out(count, 0)


def test_groups_stay_together_and_are_chosen_by_seed_from_everywhere():
    groups = [f"part {i // 7}" for i in range(210)]
    chosen = []
    for seed in range(30):
        trained, held_out = data.hold_out(210, seed, groups)
        assert sorted(trained + held_out) == list(range(210))
        assert 32 <= len(held_out) < 32 + 7
        assert not {groups[i] for i in trained} & {groups[i] for i in held_out}
        chosen.append(frozenset(groups[i] for i in held_out))
    assert data.hold_out(210, 3, groups) == data.hold_out(210, 3, groups)
    assert len(set(chosen)) == 30 and len(frozenset.union(*chosen)) == 30


def test_groups_of_one_are_no_groups():
    assert data.hold_out(50, 4, [f"{i:03}" for i in range(50)]) == data.hold_out(50, 4)


def test_no_large_group_is_held_out_where_smaller_ones_will_do():
    """A camera's whole session, say, beside short ones; where all are large, the smallest is."""
    for seed in range(10):
        groups = ["large"] * 900 + [f"small {i // 10}" for i in range(200)]
        assert 165 <= len(data.hold_out(1100, seed, groups)[1]) < 175
        assert len(data.hold_out(1000, seed, ["large"] * 900 + ["small"] * 100)[1]) == 100
        assert len(data.hold_out(1000, seed, ["large"] * 600 + ["small"] * 400)[1]) == 400


def test_one_group_for_all_leaves_nothing_to_train_on_and_is_refused():
    with pytest.raises(TrainingError, match="20 normal images in 1 groups: .* leaves 0 to train"):
        data.hold_out(20, 0, ["same"] * 20)


def test_a_fingerprint_is_of_the_set_of_files():
    assert data.fingerprint(["a", "b"]) == data.fingerprint(["b", "a"])
    assert data.fingerprint(["a", "b"]) != data.fingerprint(["a"]) != data.fingerprint(["ab"])


# Masks


def read(tmp_path, mask: np.ndarray, size: tuple[int, int]):
    return data.read_mask(write_picture(tmp_path / "mask.png", mask), size)


def test_a_pixel_is_defect_where_at_least_half_of_its_area_is(tmp_path):
    mask = np.zeros((8, 12), np.uint8)
    mask[0, 0:2] = 255  # 2 of the 4 pixels below (0, 0)
    mask[0, 2] = 255  # 1 of 4
    mask[4:7, 8:10] = 255  # 4 of 4, then 2 of 4
    stored, small = read(tmp_path, mask, (4, 6))
    assert stored.dtype == small.dtype == bool and (stored == (mask > 0)).all()
    expected = np.zeros((4, 6), bool)
    expected[0, 0] = expected[2, 4] = expected[3, 4] = True
    assert (small == expected).all()


def slow_areas(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Share of each target pixel that is defect, on a grid fine enough to be exact."""
    fine = np.repeat(np.repeat(mask > 0, size[0], axis=0), size[1], axis=1)
    return fine.reshape(size[0], mask.shape[0], size[1], mask.shape[1]).mean(axis=(1, 3))


@pytest.mark.parametrize("size", [(7, 5), (20, 30), (7, 30), (20, 5), (9, 10), (18, 20)])
def test_the_half_area_rule_is_exact_also_where_the_size_grows_or_is_no_divisor(tmp_path, size):
    mask = (np.random.default_rng(0).random((9, 10)) < 0.5).astype(np.uint8) * 255
    _, resized = read(tmp_path, mask, size)
    assert resized.shape == size
    assert (resized == (slow_areas(mask, size) >= 0.5 - 1e-9)).all()


def test_a_line_thinner_than_half_a_pixel_vanishes_and_an_empty_mask_is_empty(tmp_path):
    mask = np.zeros((64, 96), np.uint8)
    stored, small = read(tmp_path, mask, (32, 32))
    assert not stored.any() and not small.any()
    mask[10] = 255
    stored, small = read(tmp_path, mask, (16, 16))
    assert stored.sum() == 96 and not small.any()


@pytest.mark.parametrize("kind", ["class index", "16 bit", "blue", "palette", "1 bit", "alpha"])
def test_every_non_zero_pixel_is_defect_however_the_mask_is_stored(tmp_path, kind):
    shape = np.zeros((4, 6), np.uint8)
    shape[1:3, 2:5] = 1
    path = tmp_path / "mask.png"
    if kind == "class index":
        Image.fromarray(shape * 3).save(path)
    elif kind == "16 bit":
        Image.fromarray(shape.astype(np.uint16) * 2).save(path)
    elif kind == "blue":
        Image.fromarray(np.stack([0 * shape, 0 * shape, shape], axis=2)).save(path)
    elif kind == "palette":
        picture = Image.fromarray(shape)
        picture.putpalette([0, 0, 0, 0, 0, 2])
        picture.save(path)
    elif kind == "1 bit":
        Image.fromarray(shape.astype(bool)).save(path)
    else:
        opaque = np.full_like(shape, 255)
        Image.fromarray(np.stack([255 * shape] * 3 + [opaque], axis=2)).save(path)
    stored, small = data.read_mask(path, (4, 6))
    assert (stored == (shape > 0)).all() and (small == stored).all()


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_an_unreadable_mask_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(TrainingError, match=r"mask\.png"):
        data.read_mask(tmp_path / "mask.png", (32, 32))


def test_a_picture_whose_name_is_no_text_is_named_and_left_out(tmp_path, caplog):
    write_picture(tmp_path / "good.png", np.zeros((8, 8, 3), np.uint8))
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xe9le.png"))
    shutil.copy(tmp_path / "good.png", strange)
    loaded = data.load([tmp_path / "good.png", strange], (32, 32), strict=False, what="images")
    assert loaded.paths == [tmp_path / "good.png"]
    assert loaded.failed == {strange: "its name is not UTF-8"}
    with pytest.raises(TrainingError, match="not UTF-8"):
        data.load([strange], (32, 32), strict=True, what="images")
