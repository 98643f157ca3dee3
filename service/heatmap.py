"""Anomaly map -> picture, on a scale fixed by the threshold.

Cold colours lie below the threshold and warm ones at or above it, in every picture of a model, so
a good part looks calm and the warm area is exactly the mask. Never min-max per image, which would
paint a hot spot on every good part.
"""

import io
from typing import Literal

import cv2
import numpy as np
from PIL import Image

Render = Literal["none", "heatmap", "overlay", "mask"]

# Below the threshold colours run linearly; above it logarithmically, so that a strong defect still
# has a visible peak. Stops at value / threshold = 0, 0.5, just below 1, 1, 2.8 and 8 (and beyond).
_DOUBLINGS = 3
_STOPS = (0, 64, 127, 128, 192, 255)
_COLOURS = (
    (8, 12, 40),
    (20, 60, 120),
    (70, 150, 170),
    (255, 215, 60),
    (245, 110, 25),
    (180, 0, 30),
)
LUT = np.stack(
    [np.interp(np.arange(256), _STOPS, channel) for channel in zip(*_COLOURS, strict=True)], axis=1
).astype(np.uint8)  # (256, 3)
_OPACITY = np.interp(np.arange(256), (64, 128, 255), (0.0, 0.3, 0.5)).astype(np.float32)
_STRIP = 256  # rows


def levels(anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """Colour index uint8 (h, w): 128 and more exactly where the map reaches the threshold."""
    limit = np.float32(threshold)
    relative = np.maximum(anomaly_map / limit, 0)
    cold = np.minimum(128 * relative, 127)
    warm = 128 + np.minimum(127 / _DOUBLINGS * np.log2(np.maximum(relative, 1)), 127)
    # Compared as the decision is: rounding must not move a pixel across the threshold.
    return np.where(anomaly_map >= limit, warm, cold).astype(np.uint8)


def heatmap(anomaly_map: np.ndarray, threshold: float) -> bytes:
    """A palette PNG: exact colours at a third of an RGB file's size and time."""
    image = Image.fromarray(levels(anomaly_map, threshold), "L")
    image.putpalette(LUT.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def overlay(anomaly_map: np.ndarray, threshold: float, pixels: np.ndarray) -> bytes:
    """The image (H, W, 3) with the heatmap over it, clear below half the threshold.

    Smooth between the map's places, yet warm exactly where `enlarged_mask` is true.
    """
    size = (pixels.shape[0], pixels.shape[1])
    smooth = cv2.resize(anomaly_map, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    at_or_above = enlarged_mask(anomaly_map, threshold, size)
    blended = np.empty_like(pixels)
    for top in range(0, size[0], _STRIP):  # float copies of a strip, never of 50 megapixels
        rows = slice(top, top + _STRIP)
        index = levels(np.asarray(smooth[rows]), threshold)
        index = np.where(at_or_above[rows], np.maximum(index, 128), np.minimum(index, 127))
        alpha = _OPACITY[index][..., None]
        strip = pixels[rows] * (1 - alpha) + LUT[index] * alpha
        blended[rows] = np.rint(strip).astype(np.uint8)[..., ::-1]
    return _png(blended)


def mask(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> bytes:
    """255 where the map is at or above the threshold, at `size` = (height, width)."""
    return _png(enlarged_mask(anomaly_map, threshold, size).astype(np.uint8) * 255)


def enlarged_mask(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> np.ndarray:
    """map >= threshold as boolean (H, W): enlarged without smoothing; where the image is smaller
    than the map, a pixel is true if any place under it is, so that no defect vanishes."""
    at_or_above = anomaly_map >= np.float32(threshold)
    height, width = (max(pair) for pair in zip(at_or_above.shape, size, strict=True))
    rows = np.arange(height) * at_or_above.shape[0] // height
    columns = np.arange(width) * at_or_above.shape[1] // width
    enlarged = np.asarray(at_or_above[rows][:, columns])
    if enlarged.shape == size:
        return enlarged
    share = cv2.resize(
        enlarged.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_AREA
    )
    return np.asarray(share > 0)


def _png(pixels: np.ndarray) -> bytes:
    _, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return bytes(data)
