"""How well scores and maps tell defects from normal parts.

Image metrics come from scikit-learn; pixel metrics are ours, exact, tie-safe and sorted once.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from training.errors import TrainingError

FPR_LIMIT = 0.3
STRICT_FPR_LIMIT = 0.05
PRO_THRESHOLDS = 200  # of `pro_per_image`


@dataclass(frozen=True)
class ImageMetrics:
    auroc: float
    average_precision: float
    f1_max: float
    f1_max_threshold: float
    f1_max_fpr: float  # share of normal images at or above that threshold


def image_metrics(scores: np.ndarray, anomalous: np.ndarray) -> ImageMetrics:
    """Of image scores (N,) and labels (N,).

    Raises TrainingError where one kind is missing or a score is not finite.
    """
    if anomalous.all() or not anomalous.any():
        raise TrainingError("image metrics need normal and anomalous images")
    _require_finite(scores, "image scores")
    precision, recall, thresholds = precision_recall_curve(anomalous, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())  # the last point has no threshold
    return ImageMetrics(
        auroc=float(roc_auc_score(anomalous, scores)),
        average_precision=float(average_precision_score(anomalous, scores)),
        f1_max=float(f1[best]),
        f1_max_threshold=float(thresholds[best]),
        f1_max_fpr=float(np.mean(scores[~anomalous] >= thresholds[best])),
    )


@dataclass(frozen=True)
class PixelMetrics:
    auroc: float
    average_precision: float
    aupro: float  # up to FPR_LIMIT
    aupro_005: float  # up to STRICT_FPR_LIMIT
    regions: int
    pro_per_image: float | None  # for comparison with the RD4AD family's papers only
    pro_left_out: int  # anomalous images for which that figure is undefined


def pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> PixelMetrics:
    """Of anomaly maps (N, h, w) and boolean masks (N, h, w), all images pooled.

    AUPRO is the area under the per-region overlap, averaged over all 8-connected regions of all
    images, against the false-positive rate over all normal pixels, up to a limit and divided by
    it (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 6.1.2). Pixels
    of equal score cross the threshold together; the curve is cut at the limit by linear
    interpolation. Average precision is scikit-learn's. `pro_per_image` pools nothing: see there.
    Raises TrainingError where one kind of pixel is missing or a map is not finite.
    """
    if masks.all() or not masks.any():
        raise TrainingError("pixel metrics need normal and defect pixels")
    _require_finite(maps, "anomaly maps")
    weights, regions = region_weights(masks)
    # Curves bend only at defect scores, so normal pixels need no more than their values sorted.
    normal, scores = np.sort(maps[~masks]), maps[masks]
    order = np.argsort(scores)[::-1]
    scores, weight = scores[order], weights[masks][order]
    # The last pixel of each run of equal scores.
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
    above = normal.size - np.searchsorted(normal, scores[ends], side="right")
    from_here = normal.size - np.searchsorted(normal, scores[ends], side="left")
    precision = (ends + 1) / (ends + 1 + from_here)
    recall = (ends + 1) / scores.size
    overlap = np.cumsum(weight)[ends] / regions
    # With falling threshold: level to the next defect score, then straight through its ties.
    fpr = np.stack([above, from_here], axis=1).ravel() / normal.size
    fpr = np.concatenate([[0], fpr, [1]])
    overlap = np.repeat(np.append(0, overlap), 2)
    per_image, left_out = pro_per_image(maps, masks)
    return PixelMetrics(
        auroc=float(np.trapezoid(np.repeat(np.append(0, recall), 2), fpr)),
        average_precision=float(np.diff(recall, prepend=0) @ precision),
        aupro=area_up_to(fpr, overlap, FPR_LIMIT),
        aupro_005=area_up_to(fpr, overlap, STRICT_FPR_LIMIT),
        regions=regions,
        pro_per_image=per_image,
        pro_left_out=left_out,
    )


def pro_per_image(maps: np.ndarray, masks: np.ndarray) -> tuple[float | None, int]:
    """(mean over the images that have a defect pixel, how many of them are left out).

    The protocol of the published code of RD4AD (Deng & Li, CVPR 2022) and its relatives, to set
    beside their tables and for nothing else: each image has thresholds and a false-positive rate
    of its own, so drift between images is hidden; normal images don't count; and scores that are
    transformed monotonously give another figure. An image is left out where the protocol gives
    none: no normal pixel, a constant map, or not two thresholds with a false-positive rate below
    FPR_LIMIT of which one has a false positive. The mean of none is None.
    """
    shown = masks.any(axis=(1, 2))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_pro_of_image, maps[shown], masks[shown]))
    kept = [pro for pro in found if pro is not None]
    return (float(np.mean(kept)) if kept else None), len(found) - len(kept)


def _pro_of_image(anomaly_map: np.ndarray, mask: np.ndarray) -> float | None:
    anomaly_map = anomaly_map.astype(np.float64)
    low, high = anomaly_map.min(), anomaly_map.max()
    if mask.all() or low == high:
        return None
    thresholds = np.arange(low, high, (high - low) / PRO_THRESHOLDS)  # ascending
    weights, regions = region_weights(mask[None])
    # Each pixel is above the first so many thresholds.
    passed = np.searchsorted(thresholds, anomaly_map.ravel()).reshape(mask.shape)
    fpr = _above(passed[~mask], None, thresholds.size) / (~mask).sum()
    overlap = _above(passed[mask], weights[0][mask], thresholds.size) / regions
    kept = fpr < FPR_LIMIT
    fpr, overlap = fpr[kept][::-1], overlap[kept][::-1]  # ascending
    if fpr.size < 2 or fpr[-1] == 0:
        return None
    # Divided by its own maximum and not by the limit; no point (0, 0): as published.
    return float(np.trapezoid(overlap, fpr / fpr[-1]))


def _above(passed: np.ndarray, weights: np.ndarray | None, thresholds: int) -> np.ndarray:
    """Number, or weight, of pixels above each threshold (thresholds,)."""
    counts = np.bincount(passed, weights, minlength=thresholds + 1)
    return counts[:0:-1].cumsum()[::-1]


def region_weights(masks: np.ndarray) -> tuple[np.ndarray, int]:
    """(1 / area of its region for each defect pixel, else 0 (N, h, w); number of regions)."""
    weights = np.zeros(masks.shape, np.float64)
    regions = 0
    for mask, weight in zip(masks, weights, strict=True):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        areas = np.bincount(labels.ravel(), minlength=count)
        weight[mask] = 1 / areas[labels[mask]]
        regions += count - 1
    return weights, regions


def area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area under a curve of ascending x from 0 to `limit`, divided by it."""
    inside = x <= limit
    at_limit = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[inside], at_limit), np.append(x[inside], limit)) / limit)


def _require_finite(values: np.ndarray, what: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise TrainingError(f"{what}: {finite.size - finite.sum()} of {finite.size} not finite")
