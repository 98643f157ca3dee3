"""The only way in for pixels: encoded bytes -> RGB (H, W, 3) -> the model's size.

Training, evaluation, calibration and inspection all call `decode_to`, so a score depends on the
picture alone and not on who looked at it. EXIF orientation is applied, alpha is dropped, gray is
repeated, 16 bits are scaled to 8 by dropping the low byte.
"""

import hashlib
import io
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, UnidentifiedImageError

from service.errors import InvalidImage, TooLarge, UnsupportedFormat

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 50_000_000

# libjpeg's reduced sizes. IMREAD_REDUCED_COLOR_* would bring IMREAD_COLOR_BGR's bit along.
_REDUCED = {
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
}

_BILINEAR = ResizeOptions(ResizeAlg.convolution(FilterType.bilinear))

# Refusals are reported by us, with names; OpenCV and Pillow would also log each.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# Requests are what runs in parallel; threads within one would only get in each other's way.
cv2.setNumThreads(1)
# Our own limit is checked before any decoding; Pillow's would only warn, and later.
Image.MAX_IMAGE_PIXELS = None
# What Pillow has to say of damaged metadata. For good, as to catch warnings is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Readers of every format are imported now, not while the first request waits.
Image.init()
# In this order: Pillow's own is the alphabet's.
_TRIED = tuple(dict.fromkeys((*FORMATS, *Image.ID)))


@dataclass(frozen=True)
class Header:
    format: str
    width: int  # as stored, before EXIF orientation
    height: int
    mode: str


def read_header(data: bytes) -> Header:
    """The format, by magic bytes, and the size of an encoded image, without decoding it.

    Raises InvalidImage for no image at all and UnsupportedFormat for formats that are not read.
    """
    if not data:
        raise InvalidImage("the image is empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_TRIED) as image:
            # A multi-picture file is a JPEG with more behind it: cameras write them as .jpg.
            name = "JPEG" if image.format == "MPO" else image.format or ""
            header = Header(name, image.width, image.height, image.mode)
    except UnidentifiedImageError:
        raise InvalidImage(
            f"the {len(data)} bytes are not an image in {', '.join(FORMATS)} (by content, "
            "whatever the name or Content-Type says)"
        ) from None
    except (OSError, ValueError, SyntaxError, MemoryError, OverflowError, ArithmeticError) as error:
        raise InvalidImage(f"the image's header is damaged: {error}") from None
    if header.format not in FORMATS:
        raise UnsupportedFormat(f"format {header.format} is not read; use {', '.join(FORMATS)}")
    return header


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """RGB uint8 (H, W, 3) of an encoded image; of several frames, the first.

    Raises InvalidImage, UnsupportedFormat or TooLarge (the header says more than `max_pixels`).
    Holds no lock of Python's while decoding.
    """
    return _decode(data, _readable_header(data, max_pixels))


def decode_to(
    data: bytes, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int]]:
    """RGB uint8 (h, w, 3) at `size` = (height, width), and the (height, width) it had.

    A JPEG of at least four times `size` is decoded at 1/2, 1/4 or 1/8, by leaving high frequencies
    out of its cosine transform. The last halving or more is always `resize`'s: its filter decides
    how sharp the result is, and scores follow sharpness. Raises as `decode`.
    """
    header = _readable_header(data, max_pixels)
    stored = (header.height, header.width)
    factor = _reduction(stored, size) if header.format == "JPEG" else 1
    pixels = _decode(data, header, factor)
    if factor == 1:
        return resize(pixels, size), (pixels.shape[0], pixels.shape[1])
    turned = pixels.shape[:2] != _reduced(stored, factor)  # by EXIF
    original = stored[::-1] if turned else stored
    if turned and factor > _reduction(original, size):
        pixels = _decode(data, header)
    return resize(pixels, size), original


def _readable_header(data: bytes, max_pixels: int) -> Header:
    header = read_header(data)
    if header.width * header.height > max_pixels:
        raise TooLarge(
            f"the image has {header.width}x{header.height} = {header.width * header.height} "
            f"pixels; the limit is {max_pixels}"
        )
    if header.mode == "F" or (header.mode == "I" and header.format == "TIFF"):
        raise UnsupportedFormat(
            f"{header.format} with 32-bit samples has no defined white; store 8 or 16 bits"
        )
    return header


def _reduction(stored: tuple[int, int], size: tuple[int, int]) -> int:
    """The largest of 8, 4 and 2 that leaves at least twice `size`, else 1."""
    height, width = stored[0] // 2, stored[1] // 2
    for factor in _REDUCED:
        reduced = _reduced(stored, factor)
        # Different sides that round to the same would hide whether the image was turned.
        told_apart = stored[0] == stored[1] or reduced[0] != reduced[1]
        if told_apart and height >= factor * size[0] and width >= factor * size[1]:
            return factor
    return 1


def _reduced(stored: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-stored[0] // factor), -(-stored[1] // factor)


def _decode(data: bytes, header: Header, factor: int = 1) -> np.ndarray:
    try:
        pixels = cv2.imdecode(
            np.frombuffer(data, np.uint8), _REDUCED.get(factor, cv2.IMREAD_COLOR_RGB)
        )
    except cv2.error:
        pixels = None
    if pixels is None:
        raise InvalidImage(
            f"the {header.format} of {header.width}x{header.height} is truncated or damaged"
        )
    return np.asarray(pixels, np.uint8)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """RGB uint8 (h, w, 3) at `size` = (height, width): antialiased bilinear, aspect not kept.

    Pillow's filter but for the last rounding (a level at most), several times as fast.
    """
    height, width = size
    if pixels.shape[:2] == (height, width):
        return pixels
    given = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
    resized = ImageData(width, height, PixelType.U8x3)
    Resizer().resize(given, resized, _BILINEAR)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(height, width, 3)


def encode(pixels: np.ndarray) -> bytes:
    """PNG of RGB uint8 (H, W, 3): `decode` gives the very same pixels back."""
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert done
    return data.tobytes()


def read(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """RGB uint8 (H, W, 3) of an image file; an error of `decode` or OSError."""
    return decode(path.read_bytes(), max_pixels)


def digest(data: bytes) -> str:
    """SHA-256 of encoded bytes, in hexadecimal: how images and graphs are named in records."""
    return hashlib.sha256(data).hexdigest()


def is_image_name(name: str | os.PathLike[str]) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not Path(name).name.startswith(".")
