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

from service.errors import InvalidParameter

Render = Literal["none", "heatmap", "overlay", "mask"]
MediaType = Literal["image/png", "image/jpeg"]
# What each can be had as; the first is the default.
MEDIA_TYPES: dict[Render, tuple[MediaType, ...]] = {
    "none": (),
    "heatmap": ("image/png",),
    "overlay": ("image/jpeg", "image/png"),
    "mask": ("image/png",),
}

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
_CLEAR = 64  # the highest colour index that an overlay leaves out
_OPACITY = np.interp(np.arange(256), (_CLEAR, 128, 255), (0.0, 0.3, 0.5))[:, None]  # (256, 1)
# By colour index, what an overlay multiplies the image with, in 255ths, and the BGR that it adds.
_KEEP = np.rint(255 * (1 - _OPACITY)).astype(np.uint8)
_ADD = np.rint(LUT[:, ::-1] * _OPACITY).astype(np.uint8)[:, None]  # as applyColorMap takes it
_STRIP = 64  # rows, so that a strip's arrays stay in the processor's cache
_JPEG_QUALITY = 90
_JPEG_SIDE = 65_500  # what libjpeg writes


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


def packed(anomaly_map: np.ndarray) -> bytes:
    """A map (h, w) to be kept, in half precision."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, map=anomaly_map.astype(np.float16))
    return buffer.getvalue()


def unpacked(data: bytes) -> np.ndarray:
    """The float32 map (h, w) that `packed` kept."""
    with np.load(io.BytesIO(data)) as kept:
        return np.asarray(kept["map"], np.float32)


def overlay(
    anomaly_map: np.ndarray,
    threshold: float,
    pixels: np.ndarray,
    media_type: MediaType = "image/jpeg",
) -> bytes:
    """The image (H, W, 3) with the heatmap over it, clear below half the threshold.

    Smooth between the map's places, yet warm exactly where `enlarged_mask` is true. A JPEG, which
    is made to look at; lossless as PNG in many times the time. Raises InvalidParameter for a JPEG
    that would be too large for the format.
    """
    size = (pixels.shape[0], pixels.shape[1])
    smooth = cv2.resize(levels(anomaly_map, threshold), size[::-1])
    at_or_above = enlarged_mask(anomaly_map, threshold, size)
    blended = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    for top in range(0, size[0], _STRIP):
        rows = slice(top, top + _STRIP)
        coldest = at_or_above[rows].view(np.uint8) * np.uint8(128)
        index = np.minimum(np.maximum(smooth[rows], coldest), coldest + np.uint8(127))
        if index.max() <= _CLEAR:
            continue
        keep = cv2.cvtColor(cv2.LUT(index, _KEEP), cv2.COLOR_GRAY2BGR)
        strip = cv2.multiply(blended[rows], keep, scale=1 / 255)
        cv2.add(strip, cv2.applyColorMap(index, _ADD), dst=blended[rows])
    if media_type == "image/png":
        return _encode(".png", blended, cv2.IMWRITE_PNG_COMPRESSION, 1)
    if max(size) > _JPEG_SIDE:
        raise InvalidParameter(
            f"render=overlay: a JPEG has at most {_JPEG_SIDE} pixels a side, the image has "
            f"{size[1]}x{size[0]}; Accept: image/png gives it, or ask for the mask"
        )
    return _encode(".jpg", blended, cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)


def mask(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> bytes:
    """White where the map is at or above the threshold, at `size` = (height, width): a PNG of one
    bit a pixel."""
    at_or_above = enlarged_mask(anomaly_map, threshold, size).view(np.uint8) * np.uint8(255)
    return _encode(".png", at_or_above, cv2.IMWRITE_PNG_BILEVEL, 1)


def enlarged_mask(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> np.ndarray:
    """map >= threshold as boolean (H, W): enlarged without smoothing; where the image is smaller
    than the map, a pixel is true if any place under it is, so that no defect vanishes."""
    at_or_above = anomaly_map >= np.float32(threshold)
    height, width = (max(pair) for pair in zip(at_or_above.shape, size, strict=True))
    rows = np.arange(height) * at_or_above.shape[0] // height
    columns = np.arange(width) * at_or_above.shape[1] // width
    enlarged = at_or_above.take(columns, axis=1).take(rows, axis=0)
    if enlarged.shape == size:
        return np.asarray(enlarged)
    share = cv2.resize(
        enlarged.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_AREA
    )
    return np.asarray(share > 0)


def _encode(suffix: str, pixels: np.ndarray, *parameters: int) -> bytes:
    _, data = cv2.imencode(suffix, pixels, parameters)
    return data.tobytes()
