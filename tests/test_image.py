"""The one way in for pixels."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, exif_of
from PIL import Image

from service import image
from service.errors import InvalidImage, ServiceError, TooLarge, UnsupportedFormat

GRADIENT = np.stack(
    [
        np.tile(np.arange(0, 240, 5, dtype=np.uint8), (64, 1)),
        np.tile(np.arange(0, 192, 3, dtype=np.uint8)[:, None], (1, 48)),
        np.full((64, 48), 77, np.uint8),
    ],
    axis=2,
)  # (64, 48, 3)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_give_the_exact_rgb_pixels(format: str, options: dict) -> None:
    assert np.array_equal(image.decode(encoded(GRADIENT, format, **options)), GRADIENT)


def test_a_jpeg_gives_nearly_the_same_pixels() -> None:
    decoded = image.decode(encoded(GRADIENT, "JPEG", quality=98, subsampling=0))

    assert np.abs(decoded.astype(int) - GRADIENT).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    decoded = image.decode(encoded(GRADIENT, "PNG", exif=exif_of(orientation)))

    upright = {  # how EXIF 2.3 says to bring each one upright
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        6: np.rot90(GRADIENT, -1),
        7: GRADIENT[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(GRADIENT, 1),
    }[orientation]
    assert np.array_equal(decoded, upright)


def test_alpha_is_dropped_without_blending() -> None:
    with_alpha = np.dstack([GRADIENT, np.full((64, 48), 3, np.uint8)])

    assert np.array_equal(image.decode(encoded(with_alpha)), GRADIENT)


def test_gray_is_repeated() -> None:
    gray = GRADIENT[..., 0]

    assert np.array_equal(image.decode(encoded(gray)), np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_never_saturated(format: str) -> None:
    deep = (np.arange(64 * 48, dtype=np.uint32).reshape(64, 48) * 21).astype(np.uint16)

    decoded = image.decode(encoded(deep, format))

    assert np.array_equal(decoded, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_a_palette_png_gives_its_colours() -> None:
    indexed = Image.fromarray(GRADIENT).quantize(16)
    buffer = io.BytesIO()
    indexed.save(buffer, "PNG")

    assert np.array_equal(image.decode(buffer.getvalue()), np.asarray(indexed.convert("RGB")))


def test_a_cmyk_jpeg_is_converted() -> None:
    buffer = io.BytesIO()
    Image.fromarray(GRADIENT).convert("CMYK").save(buffer, "JPEG", quality=98)

    decoded = image.decode(buffer.getvalue())

    assert np.abs(decoded.astype(int) - GRADIENT).mean() < 4


def test_a_multi_picture_jpeg_of_a_camera_is_a_jpeg() -> None:
    buffer = io.BytesIO()
    first, second = Image.fromarray(GRADIENT), Image.fromarray(GRADIENT[::-1].copy())
    first.save(buffer, "MPO", save_all=True, append_images=[second], quality=98)

    assert image.read_header(buffer.getvalue()).format == "JPEG"
    assert np.abs(image.decode(buffer.getvalue()).astype(int) - GRADIENT).mean() < 4


def test_floating_point_pixels_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedFormat, match="TIFF with 32-bit samples"):
        image.decode(encoded(np.ones((8, 8), np.float32), "TIFF"))


def test_the_content_decides_the_format_and_others_are_refused() -> None:
    with pytest.raises(InvalidImage, match="bytes are not an image"):
        image.decode(b"GIF was here, or so it says")


def test_a_gif_is_refused_as_a_format_that_is_not_read() -> None:
    with pytest.raises(UnsupportedFormat, match="GIF"):
        image.decode(encoded(GRADIENT[..., 0], "GIF"))


def test_no_bytes_are_refused() -> None:
    with pytest.raises(InvalidImage, match="0 bytes"):
        image.decode(b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused_and_never_half_gray(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    whole = encoded(noise, format)

    with pytest.raises(InvalidImage):
        image.decode(whole[: int(len(whole) * share)])


def test_too_many_pixels_are_refused_by_the_header_alone() -> None:
    with pytest.raises(TooLarge, match="64 = 3072 pixels; the limit is 3000"):
        image.decode(encoded(GRADIENT), max_pixels=3000)


def test_a_decompression_bomb_is_refused_without_being_decoded() -> None:
    row = b"\0" * (20_000 // 8 + 1)
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(row * 20_000, 9)),
            (b"IEND", b""),
        )
    )
    assert len(bomb) < 60_000

    with pytest.raises(TooLarge, match="20000x20000 = 400000000 pixels"):
        image.decode(bomb)


def test_resize_is_antialiased() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel on, one off: without antialiasing all black or all white

    small = image.resize(stripes, (64, 64))

    assert small.shape == (64, 64, 3)
    assert np.abs(small[8:-8, 8:-8].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("stored", [(512, 512), (300, 280), (777, 513), (40, 60), (1200, 1920)])
def test_resize_is_pillows_to_the_last_rounding(stored: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*stored, 3), np.uint8)

    resized = image.resize(pixels, (64, 96))

    pillows = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR)
    assert np.abs(resized.astype(int) - np.asarray(pillows)).max() <= 1


def test_resize_takes_height_before_width() -> None:
    assert image.resize(GRADIENT, (32, 96)).shape == (32, 96, 3)


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    assert image.resize(GRADIENT, (64, 48)) is GRADIENT


SMOOTH = np.asarray(  # (300, 420, 3), smooth enough for an eighth of it to show all
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)).resize(
        (420, 300), Image.Resampling.BICUBIC
    )
)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_other_formats_are_decoded_whole_and_resized(format: str) -> None:
    pixels, size = image.decode_to(encoded(SMOOTH, format), (32, 64))

    assert size == (300, 420)
    assert np.array_equal(pixels, image.resize(SMOOTH, (32, 64)))


@pytest.mark.parametrize(
    "size", [(16, 16), (32, 32), (64, 96), (75, 105), (76, 105), (300, 420), (512, 512)]
)
def test_a_jpeg_at_reduced_scale_is_nearly_the_whole_one_resized(size: tuple[int, int]) -> None:
    data = encoded(SMOOTH, "JPEG", quality=95)

    pixels, original = image.decode_to(data, size)

    assert original == (300, 420)
    assert pixels.shape == (*size, 3)
    whole = image.resize(image.decode(data), size).astype(int)
    assert np.abs(pixels - whole).mean() < 4  # shifted by a pixel: 5 and more


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each picture from here on that is decoded and is still to be resized."""
    shapes: list[tuple[int, ...]] = []
    resize = image.resize
    monkeypatch.setattr(
        image, "resize", lambda p, size: (shapes.append(p.shape), resize(p, size))[1]
    )
    return shapes


def test_a_jpeg_of_four_times_the_size_is_decoded_at_half_and_a_smaller_one_whole(
    decoded: list[tuple[int, ...]],
) -> None:
    data = encoded(SMOOTH, "JPEG")

    for size in ((76, 105), (75, 105), (37, 52), (38, 52), (18, 26), (2, 2)):
        image.decode_to(data, size)

    assert [shape[:2] for shape in decoded] == [
        (300, 420), (150, 210), (75, 105), (150, 210), (38, 53), (38, 53)
    ]  # fmt: skip

    decoded.clear()
    image.decode_to(encoded(SMOOTH[:, :300], "JPEG"), (37, 37))
    assert decoded[0][:2] == (75, 75)


def test_a_turned_jpeg_is_decoded_anew_only_where_it_was_reduced_too_far(
    decoded: list[tuple[int, ...]],
) -> None:
    data = encoded(SMOOTH, "JPEG", exif=exif_of(6))  # 300 x 420 as stored

    for size in ((52, 37), (37, 37), (37, 52)):
        image.decode_to(data, size)

    assert [shape[:2] for shape in decoded] == [(210, 150), (105, 75), (420, 300)]


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_reduced_scale_leaves_sharpness_to_the_resize(side: int) -> None:
    """Texture as fine as pixels comes out about as strong as from the whole picture."""
    noise = np.random.default_rng(2).integers(0, 256, (side, side), np.uint8)
    data = encoded(np.repeat(noise[..., None], 3, axis=2), "JPEG", quality=95)

    reduced, _ = image.decode_to(data, (64, 64))

    whole = image.resize(image.decode(data), (64, 64))
    assert reduced.std() == pytest.approx(whole.std(), rel=0.2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [(300, 420), (299, 300), (300, 300), (420, 300)])
@pytest.mark.parametrize("size", [(16, 80), (80, 16), (75, 75)])
def test_a_reduced_jpeg_is_turned_as_a_whole_one(
    orientation: int, stored: tuple[int, int], size: tuple[int, int]
) -> None:
    exif = exif_of(orientation)
    data = encoded(image.resize(SMOOTH, stored), "JPEG", quality=95, exif=exif)
    whole = image.decode(data)

    pixels, original = image.decode_to(data, size)

    assert original == whole.shape[:2]
    assert np.abs(pixels.astype(int) - image.resize(whole, size)).mean() < 3


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_whose_turn_its_reduced_size_would_hide_is_decoded_whole(orientation: int) -> None:
    stored = image.resize(SMOOTH, (127, 128))  # 32 x 32 at a quarter
    data = encoded(stored, "JPEG", exif=exif_of(orientation))

    _, original = image.decode_to(data, (15, 15))

    assert original == ((127, 128) if orientation == 1 else (128, 127))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_jpeg_is_refused_at_reduced_scale_too(share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    whole = encoded(noise, "JPEG")

    with pytest.raises(InvalidImage):
        image.decode_to(whole[: int(len(whole) * share)], (32, 32))


def test_too_many_pixels_are_refused_before_decoding_at_reduced_scale() -> None:
    with pytest.raises(TooLarge, match="the limit is 100000"):
        image.decode_to(encoded(SMOOTH, "JPEG"), (32, 32), max_pixels=100_000)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the image is empty: 0 bytes"),
        (
            b"GIF was here",
            "the 12 bytes are not an image in JPEG, PNG, BMP, TIFF, WEBP (by content, whatever the "
            "name or Content-Type says)",
        ),
        (encoded(GRADIENT, "GIF"), "format GIF is not read; use JPEG, PNG, BMP, TIFF, WEBP"),
        (encoded(GRADIENT)[:-60], "the PNG of 48x64 is truncated or damaged"),
        (
            encoded(np.ones((8, 8), np.int32), "TIFF"),
            "TIFF with 32-bit samples has no defined white; store 8 or 16 bits",
        ),
        (b"BM" + bytes(24), "the image's header is damaged: Unsupported BMP header type (0)"),
    ],
)
def test_a_refusal_says_what_came_and_what_is_read(data: bytes, says: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        image.decode(data)

    assert str(refusal.value) == says


def test_as_many_pixels_as_the_limit_are_read_and_one_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "part.png"
    path.write_bytes(encoded(GRADIENT))

    assert image.read(path, 64 * 48).shape == (64, 48, 3)
    with pytest.raises(TooLarge, match="48x64 = 3072 pixels; the limit is 3071"):
        image.read(path, 64 * 48 - 1)


def test_what_is_encoded_is_decoded_to_the_same_pixels() -> None:
    assert np.array_equal(image.decode(image.encode(SMOOTH)), SMOOTH)


def test_reading_a_file_is_decoding_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "part.png"
    path.write_bytes(encoded(GRADIENT))

    assert np.array_equal(image.read(path), GRADIENT)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("a.JPG", True), ("b.tiff", True), ("c.txt", False), (".d.png", False), ("e", False)],
)
def test_images_are_told_by_their_suffix_and_hidden_files_left_out(name: str, counts: bool) -> None:
    assert image.is_image_name(name) is counts
