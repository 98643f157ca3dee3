"""Drawn defects: what a recipe is chosen by when no test image may be looked at."""

import numpy as np
import pytest
from conftest import SIZE, brightness_graph

from service.detector import Detector
from training.validation import AT_MOST, DRAWN_PER_KIND, KINDS, draw, validate


def normals(count: int = 4) -> np.ndarray:
    """Grey pictures with a grain, light enough for the smallest change to show."""
    rng = np.random.default_rng(0)
    return rng.integers(80, 120, (count, *SIZE, 3), np.uint8)


def test_masks_are_where_the_pictures_changed():
    drawn, masks = draw(normals(), seed=1)
    assert len(drawn) == len(masks) == 4 * len(KINDS) * DRAWN_PER_KIND
    originals = np.repeat(normals(), len(KINDS) * DRAWN_PER_KIND, axis=0)
    changed = np.abs(drawn.astype(int) - originals).max(axis=3) >= 4
    assert not changed[~masks].any() and changed[masks].mean() > 0.8
    assert all(mask.any() and not mask.all() for mask in masks)


def test_a_seed_repeats_the_drawing_and_another_one_does_not():
    first, again, other = (draw(normals(), seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_pictures_without_texture_get_defects_that_show(level):
    drawn, masks = draw(np.full((2, *SIZE, 3), level, np.uint8), seed=3)
    assert all(mask.sum() >= 4 for mask in masks) and drawn.dtype == np.uint8


def test_defects_differ_in_strength_from_faint_to_glaring():
    drawn, masks = draw(normals(8), seed=0)
    originals = np.repeat(normals(8), len(KINDS) * DRAWN_PER_KIND, axis=0)
    changes = np.abs(drawn.astype(int) - originals).max(axis=(1, 2, 3))
    assert changes.min() < 20 and changes.max() > 80


def test_validation_ranks_a_graph_that_sees_the_defects_above_one_that_does_not(brightness):
    """The brightness graph sees what is light on a dark picture; of its own noise it is blind."""
    dark = np.full((6, *SIZE, 3), 20, np.uint8)
    sharp = validate(Detector(brightness, SIZE, "cpu"), dark)
    grain = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), np.uint8)
    blind = validate(Detector(brightness, SIZE, "cpu"), grain)
    assert sharp.drawn == blind.drawn == 6 * len(KINDS) * DRAWN_PER_KIND
    assert sharp.auroc > 0.7 > blind.auroc
    assert set(sharp.kinds) == {"scratch", "stain", "smear", "patch"}
    # All kinds are equally many, so that the whole is their mean.
    assert sharp.auroc == pytest.approx(np.mean(list(sharp.kinds.values())))
    assert sharp.aupro > blind.aupro


def test_of_many_normals_a_sample_is_taken_and_not_the_first_ones(brightness):
    """Named by camera or shift: of the last ones the first would tell nothing."""
    levels = np.repeat(np.uint8([20, 250]), AT_MOST)
    many = np.broadcast_to(levels[:, None, None, None], (2 * AT_MOST, *SIZE, 3)).copy()
    found = validate(Detector(brightness, SIZE, "cpu"), many)
    assert found.drawn == AT_MOST * len(KINDS) * DRAWN_PER_KIND
    first = validate(Detector(brightness, SIZE, "cpu"), many[:AT_MOST])
    assert found.auroc < first.auroc - 0.1  # half of the sample outshines what is drawn on dark


@pytest.fixture(scope="module")
def brightness() -> bytes:
    return brightness_graph()
