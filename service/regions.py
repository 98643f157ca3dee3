"""Where an image is anomalous: connected areas of the mask, in the original image's pixels."""

from dataclasses import dataclass

import cv2
import numpy as np

MAX_REGIONS = 100
OUTLINE_TOLERANCE = 1.0  # pixels of the map by which an outline may cut a corner


@dataclass(frozen=True)
class Region:
    """One 8-connected area at or above the threshold."""

    x: int
    y: int
    width: int
    height: int
    area: int  # pixels
    peak_score: float
    peak_x: int
    peak_y: int
    contour: list[tuple[int, int]]  # (x, y) corners of the outline, through pixel centres


def find(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Region]:
    """Regions of a map (h, w) in an image of `size` = (height, width), highest peak first.

    At most MAX_REGIONS. Empty exactly where the image's decision is normal.
    """
    mask = (anomaly_map >= np.float32(threshold)).astype(np.uint8)
    if not mask.any():
        return []
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    scale = np.array([size[1] / mask.shape[1], size[0] / mask.shape[0]])  # x, y
    regions = [_region(anomaly_map, labels, i, stats[i], scale) for i in range(1, count)]
    return sorted(regions, key=lambda region: -region.peak_score)[:MAX_REGIONS]


def _region(
    anomaly_map: np.ndarray, labels: np.ndarray, label: int, stats: np.ndarray, scale: np.ndarray
) -> Region:
    left, top, width, height, area = (int(value) for value in stats)
    window = np.s_[top : top + height, left : left + width]
    inside = labels[window] == label
    values = np.where(inside, anomaly_map[window], -np.inf)
    peak_row, peak_column = np.unravel_index(int(values.argmax()), values.shape)
    x, y = np.floor(np.array([left, top]) * scale).astype(int)
    right, bottom = np.ceil(np.array([left + width, top + height]) * scale).astype(int)
    peak = (np.array([left + peak_column, top + peak_row]) + 0.5) * scale
    return Region(
        x=int(x),
        y=int(y),
        width=int(right - x),
        height=int(bottom - y),
        area=round(area * float(scale[0] * scale[1])),
        peak_score=float(values.max()),
        peak_x=int(peak[0]),
        peak_y=int(peak[1]),
        contour=_outline(inside, (left, top), scale),
    )


def _outline(
    inside: np.ndarray, corner: tuple[int, int], scale: np.ndarray
) -> list[tuple[int, int]]:
    outlines, _ = cv2.findContours(
        inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    corners = cv2.approxPolyDP(max(outlines, key=len), OUTLINE_TOLERANCE, closed=True)
    points = (corners.reshape(-1, 2) + corner + 0.5) * scale
    return [(int(px), int(py)) for px, py in points]
