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

# Colours at value / threshold = 0, 0.5, just below 1, 1, 1.5 and 2 (and beyond).
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


def render(
    kind: Render, anomaly_map: np.ndarray, threshold: float, pixels: np.ndarray | None
) -> bytes | None:
    """PNG of an anomaly map (h, w): heatmap at its size; overlay or mask at the image's size.

    `pixels` is the decoded image (H, W, 3), needed by overlay and mask.
    """
    if kind == "none":
        return None
    if kind == "heatmap":
        return heatmap(anomaly_map, threshold)
    assert pixels is not None
    if kind == "overlay":
        return overlay(anomaly_map, threshold, pixels)
    return mask(anomaly_map, threshold, (pixels.shape[0], pixels.shape[1]))


def levels(anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """Colour index uint8 (h, w): 128 and more exactly where the map reaches the threshold."""
    limit = np.float32(threshold)
    index = np.clip(anomaly_map * np.float32(128 / limit), 0, 255).astype(np.uint8)
    # Rounding must not move a pixel across the threshold.
    at_or_above = anomaly_map >= limit
    return np.where(at_or_above, np.maximum(index, 128), np.minimum(index, 127)).astype(np.uint8)


def heatmap(anomaly_map: np.ndarray, threshold: float) -> bytes:
    """A palette PNG: exact colours at a third of an RGB file's size and time."""
    image = Image.fromarray(levels(anomaly_map, threshold), "L")
    image.putpalette(LUT.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def overlay(anomaly_map: np.ndarray, threshold: float, pixels: np.ndarray) -> bytes:
    """The image with the heatmap over it, clear below half the threshold."""
    index = levels(_resized(anomaly_map, pixels.shape[:2], cv2.INTER_LINEAR), threshold)
    opacity = np.interp(np.arange(256), (64, 128, 192), (0.0, 0.4, 0.65)).astype(np.float32)
    alpha = opacity[index][..., None]
    blended = pixels * (1 - alpha) + LUT[index] * alpha
    return _png(np.rint(blended).astype(np.uint8)[..., ::-1])


def mask(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> bytes:
    """255 where the map is at or above the threshold, enlarged to `size` without smoothing."""
    at_or_above = (anomaly_map >= np.float32(threshold)).astype(np.uint8) * 255
    return _png(_resized(at_or_above, size, cv2.INTER_NEAREST))


def _resized(array: np.ndarray, size: tuple[int, ...], interpolation: int) -> np.ndarray:
    return np.asarray(cv2.resize(array, (size[1], size[0]), interpolation=interpolation))


def _png(pixels: np.ndarray) -> bytes:
    _, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return bytes(data)
