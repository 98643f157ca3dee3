"""Pictures that can't disagree with the decision."""

import io

import cv2
import numpy as np
import pytest
from conftest import SIZE, picture
from PIL import Image

from service import heatmap
from service.errors import InvalidParameter

THRESHOLD = 0.7
MAP = np.linspace(0, 2, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def is_warm(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., 0].astype(int) > rgb[..., 2]


def test_warm_colours_are_exactly_the_pixels_at_or_above_the_threshold() -> None:
    rgb = pixels_of(heatmap.heatmap(MAP, THRESHOLD))

    assert rgb.shape == (*SIZE, 3)
    assert np.array_equal(is_warm(rgb), np.float32(THRESHOLD) <= MAP)


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_the_colour_changes_between_neighbouring_floats_at_the_threshold(step: int) -> None:
    limit = np.float32(THRESHOLD)
    value = limit if step == 0 else np.nextafter(limit, np.float32(10 * step), dtype=np.float32)

    index = heatmap.levels(np.full((2, 2), value, np.float32), THRESHOLD)

    assert (index >= 128).all() == (value >= limit)


def test_the_scale_is_fixed_by_the_threshold_and_not_by_the_image() -> None:
    calm = np.full(SIZE, 0.2, np.float32)
    loud = calm.copy()
    loud[5, 5] = 3.0

    alone = pixels_of(heatmap.heatmap(calm, THRESHOLD))
    beside = pixels_of(heatmap.heatmap(loud, THRESHOLD))

    assert np.array_equal(alone[20:], beside[20:])
    assert not is_warm(alone).any()


def test_a_stronger_anomaly_has_another_colour_up_to_eight_times_the_threshold() -> None:
    values = THRESHOLD * np.array([[1, 2, 4, 8, 16]], np.float32)

    one, two, four, eight, beyond = heatmap.levels(values, THRESHOLD)[0]

    assert one < two < four < eight == beyond == 255


def test_an_overlay_has_the_images_size_and_leaves_calm_places_alone() -> None:
    calm = np.full(SIZE, 0.2 * THRESHOLD, np.float32)
    photo = picture(0.5, (130, 200))

    rgb = pixels_of(heatmap.overlay(calm, THRESHOLD, photo, "image/png"))

    assert np.array_equal(rgb, photo)


def test_an_overlay_is_a_jpeg_unless_a_png_is_asked_for() -> None:
    photo = np.asarray(Image.fromarray(picture(0.5, (8, 12))).resize((192, 128)))

    jpeg = heatmap.overlay(MAP, THRESHOLD, photo)

    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
    exact = pixels_of(heatmap.overlay(MAP, THRESHOLD, photo, "image/png")).astype(int)
    assert np.abs(pixels_of(jpeg) - exact).mean() < 3


def test_an_overlay_colours_anomalous_places() -> None:
    loud = np.zeros(SIZE, np.float32)
    loud[:, 48:] = 2 * THRESHOLD
    photo = picture(0.5, (128, 192))

    rgb = pixels_of(heatmap.overlay(loud, THRESHOLD, photo, "image/png"))

    assert np.array_equal(rgb[:, :90], photo[:, :90])
    assert is_warm(rgb[:, 102:]).all()


def test_a_mask_is_white_exactly_at_or_above_the_threshold() -> None:
    png = heatmap.mask(MAP, THRESHOLD, (128, 192))

    assert Image.open(io.BytesIO(png)).mode == "1"
    mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert mask.shape == (128, 192)
    assert np.array_equal(mask[::2, ::2] == 255, np.float32(THRESHOLD) <= MAP)
    assert set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize("size", [(640, 960), (64, 96), (50, 70), (20, 300), (300, 20)])
@pytest.mark.parametrize("place", [(0, 0), (31, 47), (63, 95), (17, 80)])
def test_a_lone_peak_is_warm_and_in_the_mask_at_every_size(
    size: tuple[int, int], place: tuple[int, int]
) -> None:
    peak = np.full(SIZE, 0.5 * THRESHOLD, np.float32)
    peak[place] = np.float32(THRESHOLD)

    overlay = pixels_of(heatmap.overlay(peak, THRESHOLD, picture(0.5, size), "image/png"))
    mask = np.asarray(Image.open(io.BytesIO(heatmap.mask(peak, THRESHOLD, size))))

    assert mask.any()
    assert np.array_equal(is_warm(overlay), mask)


def test_an_image_too_large_for_a_jpeg_is_refused_with_the_limit() -> None:
    long = np.zeros((20, 66_000, 3), np.uint8)

    with pytest.raises(InvalidParameter, match="65500 pixels a side, the image has 66000x20"):
        heatmap.overlay(MAP, THRESHOLD, long)
    assert heatmap.overlay(MAP, THRESHOLD, long, "image/png")


def test_an_overlay_is_the_same_in_one_strip_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (700, 90, 3), np.uint8)

    strips = heatmap.overlay(MAP, THRESHOLD, photo, "image/png")
    monkeypatch.setattr(heatmap, "_STRIP", 10**6)
    whole = pixels_of(heatmap.overlay(MAP, THRESHOLD, photo, "image/png"))

    assert np.array_equal(pixels_of(strips), whole)
    smooth = cv2.resize(MAP, (90, 700), interpolation=cv2.INTER_LINEAR)
    cold = (smooth < 0.45 * THRESHOLD) & ~heatmap.enlarged_mask(MAP, THRESHOLD, (700, 90))
    assert cold.sum() > 1000
    assert np.array_equal(whole[cold], photo[cold])
