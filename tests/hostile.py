"""Pictures as nobody should send them: of many kinds, and what a seeded mutator makes of them."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
from conftest import exif_of
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")


@cache
def seeds() -> dict[str, bytes]:
    """A small picture of every kind that cameras, tools and pranksters write."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    made = {}
    kinds = {
        "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
        "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
        "BMP": ("RGB", "L", "P", "1", "RGBA"),
        "TIFF": ("RGB", "RGBA", "L", "P", "1", "I;16", "I", "F", "CMYK", "LAB", "YCbCr"),
        "WEBP": ("RGB", "RGBA"),
    }
    for format, modes in kinds.items():
        for mode in modes:
            made[f"{format} {mode}"] = saved(converted(rgb, mode), format)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"):
        source = rgb.convert("1") if compression == "group4" else rgb
        made[f"TIFF {compression}"] = saved(source, "TIFF", compression=compression)
    made["JPEG progressive"] = saved(rgb, "JPEG", progressive=True)
    made["JPEG restart markers"] = saved(rgb, "JPEG", restart_marker_blocks=1)
    made["PNG interlaced"] = saved(rgb, "PNG", interlace=True)
    made["WEBP lossless"] = saved(rgb, "WEBP", lossless=True)
    frames = [rgb.rotate(90 * n) for n in range(3)]
    for format in ("PNG", "WEBP", "TIFF", "GIF"):
        made[f"{format} animated"] = saved(rgb, format, save_all=True, append_images=frames)
    for orientation in (0, 1, 6, 8, 9, 65535):
        made[f"JPEG orientation {orientation}"] = saved(rgb, "JPEG", exif=exif_of(orientation))
    made["JPEG with a zip behind"] = made["JPEG RGB"] + b"PK\x03\x04" + bytes(100)
    made["PNG with a script behind"] = made["PNG RGB"] + b"<script>alert(1)</script>"
    made["PNG of no pixels"] = png(0, 0)
    made["PNG of one pixel"] = png(1, 1)
    made["PNG of 400 megapixels"] = png(20_000, 20_000, bytes(400_000_000))
    made["PNG of 4 gigapixels"] = png(2**31 - 1, 2, bytes(100))
    made["nothing"] = b""
    return made


def converted(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        gray = np.asarray(picture.convert("L"), np.uint16) * 257
        return Image.fromarray(gray)
    if mode == "LAB":
        return Image.frombytes("LAB", picture.size, picture.tobytes())
    return picture.convert("RGBA").convert("LA") if mode == "LA" else picture.convert(mode)


def saved(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(width: int, height: int, pixels: bytes | None = None) -> bytes:
    """A black PNG whose header says so, whatever comes after it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    lines = zlib.compress(bytes((width + 1) * height) if pixels is None else pixels, 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    )


def mutations(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(what was done, bytes) of so many files."""
    rng = random.Random(seed)
    sources = [(name, data) for name, data in seeds().items() if data]
    for _ in range(count):
        name, data = rng.choice(sources)
        kinds = [rng.choice(MUTATIONS) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        mutated = bytearray(data[:200_000])
        for kind in kinds:
            kind(mutated, rng)
        yield f"{name}: {', '.join(kind.__name__ for kind in kinds)}", bytes(mutated)


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 3, 10, 100))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_in_head(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 4))):
        if data:
            data[rng.randrange(min(len(data), 64))] = rng.randrange(256)


def lie_of_size(data: bytearray, rng: random.Random) -> None:
    """An extreme number where a size may stand."""
    number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 20_000))
    packed = number.to_bytes(4, rng.choice(("big", "little")))
    width = rng.choice((2, 4))
    place = rng.randrange(max(1, min(len(data), 128)))
    data[place : place + width] = packed[-width:]


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 16, 512))]


def double(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.choice((1, 16, 512))]
    data[start:start] = part * rng.choice((1, 2, 50))


def insert_noise(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 16, 512)))


def wrong_magic(data: bytearray, rng: random.Random) -> None:
    other = rng.choice((b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*"))
    other = rng.choice(
        (other, b"RIFF\x10\0\0\0WEBP", b"GIF89a", b"%PDF-1.4", b"\0\0\0\x18ftypavif")
    )
    data[: len(other)] = other


def splice(data: bytearray, rng: random.Random) -> None:
    """The end of another kind's picture."""
    other = rng.choice(list(_SPLICED))
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other)) :]


_SPLICED = [saved(Image.new("RGB", (40, 30), "red"), format) for format in FORMATS]
MUTATIONS = (
    flip_bits,
    flip_in_head,
    lie_of_size,
    truncate,
    remove,
    double,
    insert_noise,
    wrong_magic,
    splice,
)
