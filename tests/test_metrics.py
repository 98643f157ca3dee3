"""Metrics against hand-computed cases and an implementation that tries every threshold."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from training.errors import TrainingError
from training.metrics import area_up_to, image_metrics, pixel_metrics, region_weights

EIGHT = np.ones((3, 3))


def slow_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Every distinct threshold, every region by itself, each image by itself."""
    labels = [ndimage.label(mask, structure=EIGHT) for mask in masks]
    fprs, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        flagged = maps >= threshold
        fprs.append((flagged & ~masks).sum() / (~masks).sum())
        of_regions = [
            (flags & (label == region)).sum() / (label == region).sum()
            for flags, (label, count) in zip(flagged, labels, strict=True)
            for region in range(1, count + 1)
        ]
        overlaps.append(float(np.mean(of_regions)))
    area = 0.0
    for x0, x1, y0, y1 in zip(fprs, fprs[1:], overlaps, overlaps[1:], strict=False):
        if x0 >= limit or x1 == x0:
            continue
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def random_case(seed: int, levels: int, images: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Maps of few distinct values, masks of several touching regions; the last image is good."""
    rng = np.random.default_rng(seed)
    masks = rng.random((images, 11, 17)) < 0.12
    masks[-1] = False
    maps = rng.integers(0, levels, masks.shape) + masks * rng.integers(0, levels // 2 + 1)
    return maps.astype(np.float32), masks


# Image metrics


def test_image_metrics_of_a_hand_computed_case():
    """Anomalous 0.9, 0.6, 0.4 against normal 0.7, 0.3, 0.2, 0.1.

    Of 12 pairs 10 are in order. Precision where recall grows: 1/1, 2/3, 3/4. F1 is best at 0.4:
    precision 3/4, recall 1.
    """
    scores = np.array([0.1, 0.9, 0.2, 0.6, 0.3, 0.4, 0.7])
    anomalous = np.array([0, 1, 0, 1, 0, 1, 0], bool)
    found = image_metrics(scores, anomalous)
    assert found.auroc == pytest.approx(10 / 12)
    assert found.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found.f1_max == pytest.approx(2 * 0.75 / 1.75)
    assert found.f1_max_threshold == 0.4


def test_ties_count_half_and_flag_together():
    """One tied pair of 2: AUROC 3/4. At the tie, precision is 2/3 and recall 1."""
    found = image_metrics(np.array([0.5, 0.5, 0.9, 0.1]), np.array([1, 0, 1, 0], bool))
    assert found.auroc == pytest.approx(3.5 / 4)
    assert found.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.f1_max == pytest.approx(0.8)  # both thresholds: 2*1*.5/1.5 < 2*(2/3)/(5/3)
    assert found.f1_max_threshold == 0.5


def test_separated_scores_are_perfect_and_reversed_ones_are_not():
    anomalous = np.array([0, 0, 1, 1], bool)
    found = image_metrics(np.array([1.0, 2, 3, 4]), anomalous)
    assert (found.auroc, found.average_precision, found.f1_max) == (1, 1, 1)
    assert found.f1_max_threshold == 3
    assert image_metrics(np.array([4.0, 3, 2, 1]), anomalous).auroc == 0


def test_f1_max_is_the_best_of_all_thresholds():
    rng = np.random.default_rng(1)
    anomalous = rng.random(60) < 0.4
    scores = np.round(rng.normal(anomalous, 1), 1)
    found = image_metrics(scores, anomalous)

    def f1(threshold):
        flagged = scores >= threshold
        return 2 * (flagged & anomalous).sum() / (flagged.sum() + anomalous.sum())

    assert found.f1_max == pytest.approx(max(f1(t) for t in scores))
    assert found.f1_max == pytest.approx(f1(found.f1_max_threshold))


@pytest.mark.parametrize("anomalous", [[True, True], [False, False]])
def test_image_metrics_need_both_kinds(anomalous):
    with pytest.raises(TrainingError, match="normal and anomalous"):
        image_metrics(np.array([0.1, 0.2]), np.array(anomalous))


# Pixel metrics


@pytest.mark.parametrize("levels", [3, 7, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_aupro_equals_the_version_that_tries_every_threshold(seed, levels):
    maps, masks = random_case(seed, levels)
    assert pixel_metrics(maps, masks).aupro == pytest.approx(slow_aupro(maps, masks), abs=1e-12)


@pytest.mark.parametrize("levels", [3, 1000])
def test_pixel_auroc_equals_scikit_learns_with_ties(levels):
    maps, masks = random_case(9, levels)
    expected = roc_auc_score(masks.ravel(), maps.ravel())
    assert pixel_metrics(maps, masks).auroc == pytest.approx(expected, abs=1e-12)


def test_the_order_of_pixels_of_equal_score_does_not_matter():
    maps, masks = random_case(2, 3)
    turned = pixel_metrics(maps[::-1, ::-1, ::-1], masks[::-1, ::-1, ::-1])
    assert turned.aupro == pytest.approx(pixel_metrics(maps, masks).aupro, abs=1e-12)


def test_a_perfect_map_has_aupro_one():
    _, masks = random_case(3, 3)
    found = pixel_metrics(masks.astype(np.float32), masks)
    assert found.aupro == pytest.approx(1) and found.auroc == pytest.approx(1)


def test_a_constant_map_has_the_diagonals_area():
    """Overlap equals the false-positive rate: (0.3 * 0.3 / 2) / 0.3."""
    _, masks = random_case(3, 3)
    found = pixel_metrics(np.zeros(masks.shape, np.float32), masks)
    assert found.aupro == pytest.approx(0.15) and found.auroc == pytest.approx(0.5)


def test_a_map_that_finds_all_normal_pixels_first_has_aupro_zero():
    _, masks = random_case(3, 3)
    assert pixel_metrics(-masks.astype(np.float32), masks).aupro == pytest.approx(0)


@pytest.mark.parametrize("found", ["large", "small"])
def test_a_small_region_counts_as_much_as_a_large_one(found):
    """One of two regions is found at once, the other never: overlap 1/2 all along, whichever."""
    masks = np.zeros((1, 20, 20), bool)
    masks[0, 2:12, 2:12] = True
    masks[0, 17, 17] = True
    maps = np.where(masks, -1.0, 0.0)
    maps[0, :14, :14][masks[0, :14, :14]] = 2 if found == "large" else -1
    maps[0, 17, 17] = 2 if found == "small" else -1
    assert pixel_metrics(maps, masks).aupro == pytest.approx(0.5)


def test_images_are_pooled_at_one_threshold():
    """Each image ranks its own pixels perfectly, but the good part of the second is hotter than
    the first's defect: found only after half of all normal pixels."""
    masks = np.zeros((2, 4, 8), bool)
    masks[:, 0, 0] = True
    maps = np.zeros((2, 4, 8))
    maps[0, 0, 0] = 1
    maps[1] = 5
    maps[1, 0, 0] = 9
    assert pixel_metrics(maps, masks).aupro == pytest.approx(0.5)


def test_normal_pixels_of_good_images_count_as_false_positives():
    masks = np.zeros((2, 4, 5), bool)
    masks[0, 0, 0] = True
    maps = np.zeros((2, 4, 5))
    maps[1] = 1  # 20 of 39 normal pixels are above the defect
    assert pixel_metrics(maps, masks).aupro == 0


def test_regions_join_over_corners_but_not_over_images():
    masks = np.zeros((2, 5, 6), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 2, 0] = True  # one, by corners
    masks[0, 4, 4:6] = True
    masks[1, 0, 0] = True
    weights, regions = region_weights(masks)
    assert regions == 3 and weights.sum() == pytest.approx(3)
    assert weights[0, 1, 1] == pytest.approx(1 / 3) and weights[0, 4, 5] == pytest.approx(1 / 2)
    assert weights[1, 0, 0] == 1 and not weights[~masks].any()


def test_the_curve_is_cut_at_the_limit_by_interpolation():
    """y = 2x to (0.2, 0.4), then a straight line to (1, 1): at 0.3 it is 0.475."""
    area = area_up_to(np.array([0, 0.2, 1]), np.array([0, 0.4, 1]), 0.3)
    assert area == pytest.approx((0.2 * 0.4 / 2 + 0.1 * (0.4 + 0.475) / 2) / 0.3)


@pytest.mark.parametrize("fill", [True, False])
def test_pixel_metrics_need_both_kinds_of_pixel(fill):
    with pytest.raises(TrainingError, match="normal and defect"):
        pixel_metrics(np.zeros((1, 4, 4)), np.full((1, 4, 4), fill))
