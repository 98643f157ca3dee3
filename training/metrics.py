"""How well scores and maps tell defects from normal parts.

Image metrics come from scikit-learn; AUPRO is ours, exact and tie-safe.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from training.errors import TrainingError

FPR_LIMIT = 0.3


@dataclass(frozen=True)
class ImageMetrics:
    auroc: float
    average_precision: float
    f1_max: float
    f1_max_threshold: float


def image_metrics(scores: np.ndarray, anomalous: np.ndarray) -> ImageMetrics:
    """Of image scores (N,) and labels (N,); raises TrainingError where one kind is missing."""
    if anomalous.all() or not anomalous.any():
        raise TrainingError("image metrics need normal and anomalous images")
    precision, recall, thresholds = precision_recall_curve(anomalous, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())  # the last point has no threshold
    return ImageMetrics(
        auroc=float(roc_auc_score(anomalous, scores)),
        average_precision=float(average_precision_score(anomalous, scores)),
        f1_max=float(f1[best]),
        f1_max_threshold=float(thresholds[best]),
    )


@dataclass(frozen=True)
class PixelMetrics:
    auroc: float
    aupro: float
    regions: int


def pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> PixelMetrics:
    """Pixel AUROC and AUPRO of anomaly maps (N, h, w) and boolean masks (N, h, w), one sort.

    AUPRO is the area under the per-region overlap, averaged over all 8-connected regions of all
    images, against the false-positive rate over all normal pixels, up to FPR_LIMIT and divided by
    it (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 6.1.2). Pixels
    of equal score cross the threshold together; the curve is cut at the limit by linear
    interpolation. Raises TrainingError where one kind of pixel is missing.
    """
    defect = masks.ravel()
    if defect.all() or not defect.any():
        raise TrainingError("pixel metrics need normal and defect pixels")
    weights, regions = region_weights(masks)
    order = np.argsort(maps.ravel())[::-1]
    scores = maps.ravel()[order]
    # The last pixel of each run of equal scores.
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
    defect, weights = defect[order], weights.ravel()[order]
    true_positives = np.cumsum(defect)[ends]
    fpr = _from_zero((ends + 1 - true_positives) / (scores.size - true_positives[-1]))
    tpr = _from_zero(true_positives / true_positives[-1])
    overlap = _from_zero(np.cumsum(weights)[ends] / regions)
    return PixelMetrics(
        auroc=float(np.trapezoid(tpr, fpr)),
        aupro=area_up_to(fpr, overlap, FPR_LIMIT),
        regions=regions,
    )


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


def _from_zero(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], values])
