"""Synthetic pictures: reproducible, alike, and with masks that say exactly where the defect is."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from training import datasets, synthetic
from training.errors import TrainingError

SIZE = 128


def drawn(index: int, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    return synthetic.draw(np.random.default_rng([0, index]), defect, SIZE)


def files(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def test_a_normal_picture_is_rgb_with_an_empty_mask():
    picture, mask = drawn(0)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    assert mask.shape == (SIZE, SIZE) and mask.dtype == bool and not mask.any()


@pytest.mark.parametrize("defect", [None, *synthetic.DEFECTS])
def test_the_same_seed_gives_the_same_bytes(defect):
    (first, first_mask), (second, second_mask) = drawn(3, defect), drawn(3, defect)
    assert first.tobytes() == second.tobytes()
    assert first_mask.tobytes() == second_mask.tobytes()


def test_normal_pictures_differ_but_only_modestly():
    pictures = np.stack([drawn(index)[0] for index in range(6)]).astype(np.float32)
    brightness = pictures.mean(axis=(1, 2, 3))
    assert all((pictures[0] != other).mean() > 0.5 for other in pictures[1:])
    assert np.ptp(brightness) < 0.15 * brightness.mean()


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("defect", synthetic.DEFECTS)
def test_the_mask_is_where_the_defect_changed_the_picture(defect, index):
    normal, (picture, mask) = drawn(index)[0], drawn(index, defect)
    difference = cv2.absdiff(normal, picture).max(axis=2)
    assert 0 < mask.mean() < 0.15
    assert difference[mask].mean() > synthetic.VISIBLE
    assert difference[~mask].max() < synthetic.VISIBLE


def test_a_defect_is_elsewhere_in_another_picture():
    masks = [drawn(index, "stain")[1] for index in range(3)]
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


def test_a_missing_hole_is_metal_where_the_belt_would_show():
    normal, (picture, mask) = drawn(1)[0], drawn(1, "missing_hole")
    darkest = normal[mask].sum(axis=1) <= np.quantile(normal[mask].sum(axis=1), 0.1)
    assert picture[mask][darkest].mean() > normal[mask][darkest].mean() + 40


def test_an_unknown_defect_is_refused_by_name():
    with pytest.raises(TrainingError, match="'rattle'.*scratch"):
        drawn(0, "rattle")


def test_a_data_set_has_the_layout_that_training_reads(tmp_path):
    folder = tmp_path / "flange"
    synthetic.write_dataset(folder, train=3, test_normal=2, test_per_defect=1, size=64)
    category = datasets.read(folder)
    assert [p.name for p in category.to_train_on()] == ["000.png", "001.png", "002.png"]
    tests = category.to_test_on()
    kinds = [t.kind for t in tests]
    assert kinds == sorted(["good", "good", *synthetic.DEFECTS])
    for test in tests:
        pixels = cv2.imread(str(test.path))
        assert pixels is not None and pixels.shape == (64, 64, 3)
        assert (test.mask is not None) == test.anomalous
        if test.mask is not None:
            values = np.unique(cv2.imread(str(test.mask), cv2.IMREAD_UNCHANGED))
            assert values.tolist() == [0, 255]
    assert len(files(folder)) == 3 + 2 + 2 * len(synthetic.DEFECTS)


def test_a_file_holds_the_picture_of_its_seed_split_and_index(tmp_path):
    synthetic.write_dataset(tmp_path, train=2, test_normal=1, test_per_defect=0, size=SIZE, seed=5)
    picture, _ = synthetic.draw(np.random.default_rng([5, 0, 1]), None, SIZE)
    stored = cv2.imread(str(tmp_path / "train/good/001.png"))
    assert (stored[..., ::-1] == picture).all()


def test_a_data_set_is_the_same_again_for_the_same_seed_only(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write_dataset(
            tmp_path / name, train=4, test_normal=2, test_per_defect=1, size=64, seed=seed
        )
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.startswith("train/"))
    assert len(set(first.values())) == len(first)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(TrainingError, match="not an empty folder"):
        synthetic.write_dataset(tmp_path, train=1, size=64)
    assert files(tmp_path) == {"mine.txt": b"keep"}
