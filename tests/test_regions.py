"""Where an image is anomalous, in the original image's pixels."""

import numpy as np
from conftest import SIZE

from service import regions


def map_with(*boxes: tuple[int, int, int, int, float]) -> np.ndarray:
    """Zero but for (top, left, height, width, value) boxes."""
    anomaly_map = np.zeros(SIZE, np.float32)
    for top, left, height, width, value in boxes:
        anomaly_map[top : top + height, left : left + width] = value
    return anomaly_map


def test_a_normal_map_has_no_regions() -> None:
    assert regions.find(np.full(SIZE, 0.4, np.float32), 0.5, SIZE) == []


def test_a_region_has_its_box_area_and_peak() -> None:
    anomaly_map = map_with((20, 30, 10, 20, 0.6))
    anomaly_map[24, 41] = 0.9

    (region,) = regions.find(anomaly_map, 0.5, SIZE)

    assert (region.x, region.y, region.width, region.height) == (30, 20, 20, 10)
    assert region.area == 200
    assert (region.peak_x, region.peak_y) == (41, 24)
    assert region.peak_score == np.float32(0.9)


def test_coordinates_are_scaled_to_the_original_image() -> None:
    (region,) = regions.find(map_with((20, 30, 10, 20, 0.6)), 0.5, (2 * SIZE[0], 3 * SIZE[1]))

    assert (region.x, region.y, region.width, region.height) == (90, 40, 60, 20)
    assert region.area == 1200


def test_the_outline_lies_within_the_box_and_touches_its_sides() -> None:
    (region,) = regions.find(map_with((20, 30, 10, 20, 0.6)), 0.5, SIZE)

    xs, ys = zip(*region.contour, strict=True)
    assert (min(xs), max(xs), min(ys), max(ys)) == (30, 49, 20, 29)


def test_regions_come_highest_peak_first() -> None:
    anomaly_map = map_with((2, 2, 4, 4, 0.6), (40, 60, 4, 4, 0.9), (20, 20, 4, 4, 0.7))

    peaks = [region.peak_score for region in regions.find(anomaly_map, 0.5, SIZE)]

    assert peaks == sorted(peaks, reverse=True)
    assert len(peaks) == 3


def test_pixels_that_touch_at_a_corner_are_one_region() -> None:
    anomaly_map = map_with((10, 10, 2, 2, 0.6), (12, 12, 2, 2, 0.6))

    assert len(regions.find(anomaly_map, 0.5, SIZE)) == 1


def test_a_value_equal_to_the_threshold_is_in_the_region() -> None:
    (region,) = regions.find(map_with((10, 10, 1, 1, 0.5)), 0.5, SIZE)

    assert region.area == 1


def test_at_most_a_hundred_regions_are_listed() -> None:
    anomaly_map = np.zeros(SIZE, np.float32)
    anomaly_map[::4, ::4] = 0.6  # 16 x 24 lone pixels

    assert len(regions.find(anomaly_map, 0.5, SIZE)) == regions.MAX_REGIONS
