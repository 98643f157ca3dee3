"""Metrics against hand-computed cases, scikit-learn, and versions that try every threshold."""

from dataclasses import astuple

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from training.errors import TrainingError
from training.metrics import (
    area_up_to,
    image_metrics,
    pixel_metrics,
    pro_per_image,
    region_weights,
)

EIGHT = np.ones((3, 3))


def slow_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
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


def slow_image_pro(anomaly_map: np.ndarray, mask: np.ndarray) -> float:
    """The published protocol word for word; scikit-learn's `auc` takes the area."""
    anomaly_map = anomaly_map.astype(float)
    low, high = anomaly_map.min(), anomaly_map.max()
    labels, count = ndimage.label(mask, structure=EIGHT)
    fprs, overlaps = [], []
    for threshold in np.arange(low, high, (high - low) / 200):
        flagged = anomaly_map > threshold
        fpr = (flagged & ~mask).sum() / (~mask).sum()
        if fpr < 0.3:
            fprs.append(fpr)
            regions = [labels == region for region in range(1, count + 1)]
            overlaps.append(np.mean([(flagged & r).sum() / r.sum() for r in regions]))
    return float(auc(np.array(fprs) / max(fprs), overlaps))


def random_case(seed: int, levels: int, images: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Maps of few distinct values, masks of several touching regions; the last image is good."""
    rng = np.random.default_rng(seed)
    masks = rng.random((images, 11, 17)) < 0.12
    masks[-1] = False
    maps = rng.integers(0, levels, masks.shape) + masks * rng.integers(0, levels // 2 + 1)
    return maps.astype(np.float32), masks


def smooth_case(seed: int, images: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Maps as networks give them, hotter on blobs of any size that touch over corners."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.normal(size=(images, 40, 56)), (0, 1, 1))
    masks = blobs > np.quantile(blobs, 0.93)
    noise = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2))
    return (noise + 0.1 * masks + rng.random((images, 1, 1)) / 10).astype(np.float32), masks


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
    assert found.f1_max_fpr == 1 / 4  # 0.7 of the normal ones


def test_ties_count_half_and_flag_together():
    """One tied pair of 2: AUROC 3/4. At the tie, precision is 2/3 and recall 1."""
    found = image_metrics(np.array([0.5, 0.5, 0.9, 0.1]), np.array([1, 0, 1, 0], bool))
    assert found.auroc == pytest.approx(3.5 / 4)
    assert found.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.f1_max == pytest.approx(0.8)  # both thresholds: 2*1*.5/1.5 < 2*(2/3)/(5/3)
    assert found.f1_max_threshold == 0.5
    assert found.f1_max_fpr == 1 / 2  # the tied one is flagged


def test_separated_scores_are_perfect_and_reversed_ones_are_not():
    anomalous = np.array([0, 0, 1, 1], bool)
    found = image_metrics(np.array([1.0, 2, 3, 4]), anomalous)
    assert (found.auroc, found.average_precision, found.f1_max) == (1, 1, 1)
    assert found.f1_max_threshold == 3 and found.f1_max_fpr == 0
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


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_refused(score):
    with pytest.raises(TrainingError, match="image scores: 1 of 3 not finite"):
        image_metrics(np.array([0.1, score, 0.3]), np.array([True, False, True]))


# Pixel metrics, all images pooled


@pytest.mark.parametrize("levels", [3, 7, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_aupro_equals_the_version_that_tries_every_threshold(seed, levels):
    maps, masks = random_case(seed, levels)
    found = pixel_metrics(maps, masks)
    assert found.aupro == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)
    assert found.aupro_005 == pytest.approx(slow_aupro(maps, masks, 0.05), abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 7])
def test_aupro_of_smooth_maps_equals_the_version_that_tries_every_threshold(decimals):
    maps, masks = smooth_case(5, images=2)
    maps = maps[:, ::2, ::2].round(decimals)
    masks = masks[:, ::2, ::2]
    found = pixel_metrics(maps, masks)
    assert found.aupro == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)
    assert found.aupro_005 == pytest.approx(slow_aupro(maps, masks, 0.05), abs=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 1000, 10**6])
def test_pixel_auroc_and_average_precision_equal_scikit_learns_with_ties(levels):
    maps, masks = random_case(9, levels)
    found = pixel_metrics(maps, masks)
    flat = masks.ravel(), maps.ravel()
    assert found.auroc == pytest.approx(roc_auc_score(*flat), abs=1e-12)
    assert found.average_precision == pytest.approx(average_precision_score(*flat), abs=1e-12)


def test_pixel_metrics_of_a_hand_computed_case():
    """Defects 9, 5, 5 (one region of 1, one of 2 pixels) among normals 7, 5 and 17 zeros.

    With falling threshold (false positives of 19, overlap): 9: (0, 1/2), 7: (1, 1/2),
    5: (2, 1), 0: (19, 1). The limit 0.05 is at 0.95 of a false positive, 0.3 at 5.7.
    """
    masks = np.zeros((1, 2, 11), bool)
    masks[0, 0, 0] = masks[0, 0, 4] = masks[0, 1, 5] = True
    maps = np.zeros((1, 2, 11))
    maps[0, 0, 0], maps[0, 0, 4], maps[0, 1, 5], maps[0, 0, 8], maps[0, 1, 9] = 9, 5, 5, 7, 5
    found = pixel_metrics(maps, masks)
    assert found.regions == 2
    assert found.aupro_005 == pytest.approx(1 / 2)
    assert found.aupro == pytest.approx((1 / 2 + 3 / 4 + 3.7) / 5.7)
    assert found.average_precision == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 5)
    assert found.auroc == pytest.approx((1 * 1 / 3 + 1 * 2 / 3 + 17) / 19)


@pytest.mark.parametrize("transform", [lambda s: 8 * s - 3, np.exp, lambda s: np.sign(s) * s**2])
def test_a_monotone_transformation_of_the_scores_changes_no_pooled_figure(transform):
    maps, masks = random_case(4, 50)
    maps = maps.astype(float) / 10
    expected, found = pixel_metrics(maps, masks), pixel_metrics(transform(maps), masks)
    assert (found.auroc, found.average_precision) == (expected.auroc, expected.average_precision)
    assert (found.aupro, found.aupro_005) == pytest.approx((expected.aupro, expected.aupro_005))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_order_of_images_and_of_pixels_of_equal_score_does_not_matter(axis):
    maps, masks = random_case(2, 4)
    turned = pixel_metrics(np.flip(maps, axis), np.flip(masks, axis))
    assert astuple(turned) == pytest.approx(astuple(pixel_metrics(maps, masks)), abs=1e-12)


def test_a_perfect_map_has_aupro_one():
    _, masks = random_case(3, 3)
    found = pixel_metrics(masks.astype(np.float32), masks)
    assert found.aupro == pytest.approx(1) and found.aupro_005 == pytest.approx(1)
    assert found.auroc == pytest.approx(1) and found.average_precision == pytest.approx(1)


def test_a_constant_map_has_the_diagonals_area():
    """Overlap equals the false-positive rate, so half the limit; precision is the share."""
    _, masks = random_case(3, 3)
    found = pixel_metrics(np.zeros(masks.shape, np.float32), masks)
    assert found.aupro == pytest.approx(0.15) and found.aupro_005 == pytest.approx(0.025)
    assert found.auroc == pytest.approx(0.5)
    assert found.average_precision == pytest.approx(masks.mean())


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


def test_a_map_that_is_not_finite_is_refused():
    maps, masks = random_case(0, 5)
    maps[1, 2, 3] = np.nan
    with pytest.raises(TrainingError, match="anomaly maps: 1 of 748 not finite"):
        pixel_metrics(maps, masks)


# The published protocol, per image


@pytest.mark.parametrize("seed", range(5))
def test_per_image_pro_equals_the_version_that_tries_every_threshold(seed):
    maps, masks = smooth_case(seed)
    expected = [slow_image_pro(*pair) for pair in zip(maps, masks, strict=True)]
    found, left_out = pro_per_image(maps, masks)
    assert found == pytest.approx(np.mean(expected), abs=1e-12) and left_out == 0


@pytest.mark.parametrize("seed", range(4))
def test_per_image_pro_is_the_same_where_scores_equal_thresholds(seed):
    """Whole numbers from 0 to 200: every score lies on one of the thresholds, or is the highest."""
    maps, masks = random_case(seed, 200)
    maps[:, 0, 0], maps[:, 0, 1] = 0, 200
    maps = np.clip(maps, 0, 200)
    shown = masks.any(axis=(1, 2))
    expected = [slow_image_pro(*pair) for pair in zip(maps[shown], masks[shown], strict=True)]
    found, left_out = pro_per_image(maps, masks)
    assert found == pytest.approx(np.mean(expected), abs=1e-12) and left_out == 0


def test_per_image_pro_of_a_hand_computed_case():
    """Defects 180 and 50 of one region among normals 200, 60 and eight zeros; thresholds 0 to 199.

    (False-positive rate, overlap) above 180 to 199: (1/10, 0); above 60 to 179: (1/10, 1/2); above
    50 to 59: (2/10, 1/2); lower: (2/10, 1). Divided by its maximum the rate runs from 1/2 to 1,
    there the overlap is 1/2, and what lies left of the first threshold counts nothing.
    """
    maps = np.array([[[180, 50, 200, 60, 0, 0], [0, 0, 0, 0, 0, 0]]])
    masks = np.zeros(maps.shape, bool)
    masks[0, 0, :2] = True
    assert pro_per_image(maps, masks) == (pytest.approx(1 / 4), 0)


def test_per_image_pro_ignores_drift_between_images_and_the_pooled_figure_does_not():
    maps, masks = smooth_case(1)
    drifted = maps + np.array([0, 1, 2], np.float32)[:, None, None]
    before, after = pixel_metrics(maps, masks), pixel_metrics(drifted, masks)
    assert after.pro_per_image == pytest.approx(before.pro_per_image, abs=1e-4)
    assert after.aupro < before.aupro - 0.05


def test_per_image_pro_ignores_normal_images():
    maps, masks = smooth_case(2)
    more = np.concatenate([maps, maps + 5]), np.concatenate([masks, np.zeros_like(masks)])
    assert pro_per_image(*more) == pro_per_image(maps, masks)


def test_images_that_the_published_protocol_cannot_judge_are_counted_and_left_out():
    maps, masks = smooth_case(3, images=7)
    expected = pro_per_image(maps[:1], masks[:1])[0]
    masks[1] = True  # no normal pixel
    maps[2] = 0.5  # no threshold
    maps[3] = masks[3]  # no false positive
    maps[4] = ~masks[4]  # no threshold with fewer false positives than the limit
    maps[5] = 0  # one such threshold, and a point has no area
    maps[5, :10], maps[5, 10:20] = 200, 199
    masks[6] = False  # a normal image
    assert pro_per_image(maps, masks) == (pytest.approx(expected), 5)
    found = pixel_metrics(maps, masks)
    assert (found.pro_per_image, found.pro_left_out) == (pytest.approx(expected), 5)


def test_per_image_pro_of_no_image_is_none():
    _, masks = smooth_case(3)
    assert pro_per_image(masks.astype(float), masks) == (None, 3)
    assert pro_per_image(masks.astype(float), np.zeros_like(masks)) == (None, 0)
