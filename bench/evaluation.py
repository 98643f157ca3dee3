"""Time and memory of the pixel metrics, beside the loop of RD4AD's published evaluation.

    python -m bench.evaluation [--images 100] [--large 200] [--size 256]

Draws maps and masks, checks that both give the same per-image PRO, and prints a Markdown table.
All times are of one run on one machine; the ratio is what can be compared.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from scipy import ndimage

from training.metrics import pixel_metrics, pro_per_image

THRESHOLDS = 200
FPR_LIMIT = 0.3
REPEATS = 3  # of ours; the best counts, as a short time is easily disturbed


def draw(anomalous: int, normal: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps (N, size, size) that mostly see the one to four ellipses of their masks."""
    rng = np.random.default_rng(0)
    count = anomalous + normal
    masks = np.zeros((count, size, size), np.uint8)
    maps = np.empty((count, size, size), np.float32)
    for i, mask in enumerate(masks):
        for _ in range(rng.integers(1, 5) if i < anomalous else 0):
            middle = [int(v) for v in rng.integers(0, size, 2)]
            axes = [int(v) for v in rng.integers(max(1, size // 50), size // 10 + 2, 2)]
            cv2.ellipse(mask, middle, axes, float(rng.uniform(0, 180)), 0, 360, 1, cv2.FILLED)
        noise = rng.standard_normal((size, size), dtype=np.float32)
        signal = noise + mask * np.float32(rng.uniform(0.05, 0.5))
        maps[i] = cv2.GaussianBlur(signal, (0, 0), 4) + np.float32(rng.uniform(0, 0.05))
    return maps, masks.astype(bool)


def published_loop(anomaly_map: np.ndarray, mask: np.ndarray, *, label_once: bool = False) -> float:
    """One image's PRO in the published way: for each threshold, each region by itself.

    As published, the mask is inverted and its regions are labelled anew at every threshold, though
    neither ever changes; `label_once` labels once. The published code keeps a threshold's figures
    as a row appended to a pandas table, which copies it; a list is kinder.
    """
    drawn = mask.astype(int)
    flagged = np.zeros(mask.shape, bool)
    regions = _regions(drawn)
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    rows = []
    for threshold in np.arange(low, high, (high - low) / THRESHOLDS):
        flagged[anomaly_map <= threshold] = False
        flagged[anomaly_map > threshold] = True
        if not label_once:
            regions = _regions(drawn)
        overlaps = [flagged[ys, xs].sum() / ys.size for ys, xs in regions]
        normal = 1 - drawn
        false_positives = np.logical_and(normal, flagged).sum()
        rows.append((false_positives / normal.sum(), np.mean(overlaps)))
    fpr, overlap = np.array([row for row in rows if row[0] < FPR_LIMIT])[::-1].T
    return float(np.trapezoid(overlap, fpr / fpr.max()))


def _regions(drawn: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row and column of each pixel of each 8-connected region, from its bounding box."""
    labels, _ = ndimage.label(drawn, structure=np.ones((3, 3)))
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        ys, xs = np.nonzero(labels[rows, columns] == number)
        regions.append((ys + rows.start, xs + columns.start))
    return regions


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The best time of `repeats`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_memory_mb() -> float:
    """The most that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, else kB


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where the two ways disagree."""
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--images", type=int, default=100, help="anomalous images for both ways (default 100)")
    add("--large", type=int, default=200, help="images, half normal, for ours (default 200)")
    add("--size", type=int, default=256, help="height and width of a map (default 256)")
    arguments = parser.parse_args(argv)

    # Memory first: the peak is the whole process's and never falls.
    maps, masks = draw((arguments.large + 1) // 2, arguments.large // 2, arguments.size)
    before = peak_memory_mb()
    large = seconds(lambda: pixel_metrics(maps, masks), REPEATS)
    after = peak_memory_mb()

    maps, masks = draw(arguments.images, 0, arguments.size)
    pairs = list(zip(maps.astype(np.float64), masks, strict=True))  # float64 as published
    expected: list[float] = []
    loop = seconds(lambda: expected.extend(published_loop(*pair) for pair in pairs))
    loop_once = seconds(lambda: [published_loop(*pair, label_once=True) for pair in pairs])
    per_image = seconds(lambda: pro_per_image(maps, masks), REPEATS)
    everything = seconds(lambda: pixel_metrics(maps, masks), REPEATS)
    ours = pro_per_image(maps, masks)
    if ours[1] or abs(ours[0] or 0) - np.mean(expected) > 1e-9:
        print(f"per-image PRO {ours}, as published {np.mean(expected)}", file=sys.stderr)
        return 1

    print(f"| {arguments.size} x {arguments.size} | images | seconds | times as fast |")
    print("|---|---|---|---|")
    for what, took in (
        ("per-image PRO, the published loop", loop),
        ("the same, each mask labelled once", loop_once),
        ("per-image PRO, ours", per_image),
        ("all pixel metrics, ours", everything),
    ):
        print(f"| {what} | {arguments.images} | {took:.3g} | {loop / took:.3g} |")
    print(f"| all pixel metrics, ours, half of the images normal | {arguments.large} ", end="")
    print(f"| {large:.3g} | |")
    print(
        f"\nPeak memory at {arguments.large} images: {after:.0f} MB for the whole process, ", end=""
    )
    print(f"{before:.0f} MB before the metrics (Python, libraries, maps and masks).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
