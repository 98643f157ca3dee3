"""Folders of pictures: which files count, what is held out, and what a mask says."""

import logging

import cv2
import numpy as np
import pytest
from PIL import Image
from training_fixtures import normal_picture, write_normal_pictures, write_picture

from service import image
from training import data
from training.errors import TrainingError


def names(paths, root):
    return [p.relative_to(root).as_posix() for p in paths]


# Which files count


def test_mvtecs_layout_trains_on_train_good_alone(tmp_path):
    for name in ("train/good/b.png", "train/good/a.png", "train/bad/c.png", "test/good/d.png"):
        write_picture(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    assert names(data.normal_images(tmp_path), tmp_path) == ["train/good/a.png", "train/good/b.png"]


def test_any_other_folder_is_taken_whole_with_its_subfolders(tmp_path):
    for name in ("one.png", "line 2/two.png", "line 2/tray/three.png"):
        write_picture(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    expected = ["line 2/tray/three.png", "line 2/two.png", "one.png"]
    assert names(data.normal_images(tmp_path), tmp_path) == expected


def test_images_count_by_suffix_in_any_case_and_hidden_files_do_not(tmp_path):
    yes = ["a.jpg", "b.JPEG", "c.png", "d.Bmp", "e.tif", "f.TIFF", "g.webp"]
    no = [".a.jpg", "._c.png", "Thumbs.db", "notes.txt", "g.gif", "png", "h.png.json"]
    for name in yes + no:
        (tmp_path / name).write_bytes(b"whatever")
    (tmp_path / "folder.png").mkdir()
    assert names(data.find_images(tmp_path), tmp_path) == sorted(yes)


@pytest.mark.parametrize(
    "made, message",
    [
        (None, "no such folder"),
        ("data/notes/readme.txt", "data: no images"),
        ("data/train/bad/a.png", r"train/good: no images"),
        ("data/train/good/readme.txt", r"train/good: no images"),
        ("data/test/good/a.png", "no train/good"),
        ("data/ground_truth/hole/a.png", "no train/good"),
    ],
)
def test_a_folder_without_normal_images_is_an_error_that_names_it(tmp_path, made, message):
    if made:
        (tmp_path / made).parent.mkdir(parents=True)
        (tmp_path / made).write_bytes(b"")
    with pytest.raises(TrainingError, match=message) as caught:
        data.normal_images(tmp_path / "data")
    assert str(tmp_path / "data") in str(caught.value)


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


def test_a_fingerprint_is_of_the_set_of_files():
    assert data.fingerprint(["a", "b"]) == data.fingerprint(["b", "a"])
    assert data.fingerprint(["a", "b"]) != data.fingerprint(["a"]) != data.fingerprint(["ab"])


# Test images and masks


def labelled(root, *names):
    for name in names:
        write_picture(root / name, np.zeros((8, 8, 3), np.uint8))


def test_test_images_are_labelled_by_folder_and_find_their_masks(tmp_path):
    labelled(
        tmp_path,
        "test/good/000.png",
        "test/hole/000.png",
        "test/hole/001.jpg",
        "test/hole/002.bmp",
        "test/scratch/000.png",
        "ground_truth/hole/000_mask.png",
        "ground_truth/hole/001.png",
        "ground_truth/hole/002.bmp",
        "ground_truth/good/000.png",
    )
    found = {t.path.relative_to(tmp_path).as_posix(): t for t in data.test_images(tmp_path)}
    assert list(found) == sorted(found) and len(found) == 5
    masks = {n: t.mask and t.mask.relative_to(tmp_path).as_posix() for n, t in found.items()}
    assert masks == {
        "test/good/000.png": None,
        "test/hole/000.png": "ground_truth/hole/000_mask.png",
        "test/hole/001.jpg": "ground_truth/hole/001.png",
        "test/hole/002.bmp": "ground_truth/hole/002.bmp",
        "test/scratch/000.png": None,
    }
    assert [t.kind for t in found.values()] == ["good", "hole", "hole", "hole", "scratch"]
    assert [t.anomalous for t in found.values()] == [False, True, True, True, True]


@pytest.mark.parametrize(
    "made", [["train/good/a.png"], ["test/good/a.png"], ["test/hole/a.png"], ["test/a.png"]]
)
def test_a_test_folder_needs_normal_and_anomalous_images(tmp_path, made):
    labelled(tmp_path, *made)
    with pytest.raises(TrainingError, match="test/good"):
        data.test_images(tmp_path)


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
