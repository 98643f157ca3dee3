"""Pictures and masks -> arrays at the model's size, through the service's own decoding."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from service import image
from service.errors import ServiceError
from training.errors import TrainingError
from training.progress import progress

log = logging.getLogger(__name__)


def read_mask(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(mask as stored (H, W), mask at `size` = (height, width)), boolean.

    Every non-zero pixel of the file is defect; a pixel at `size` is defect where at least half of
    its area is. Raises TrainingError for an unreadable file.
    """
    content = np.frombuffer(path.read_bytes(), np.uint8)
    # Converted to 8-bit gray, small values of 16-bit and coloured masks would become 0.
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR
    pixels = cv2.imdecode(content, flags) if content.size else None
    if pixels is None:
        raise TrainingError(f"mask {path}: can't be decoded")
    stored = np.asarray((pixels > 0).any(axis=2))
    rows, columns = (_area_matrix(n, m) for n, m in zip(stored.shape, size, strict=True))
    share = rows @ stored @ columns.T
    return stored, np.asarray(share >= 0.5 - 1e-9)


def _area_matrix(inputs: int, outputs: int) -> np.ndarray:
    """(outputs, inputs): the share of each output cell's length that each input cell covers."""
    edges = np.arange(outputs + 1) * inputs / outputs
    cells = np.arange(inputs)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.asarray(overlap.clip(0) * outputs / inputs)


@dataclass(frozen=True)
class Images:
    """Decoded images at the model's size, kept in memory: 196 KB each at 256 x 256."""

    paths: list[Path]
    pixels: np.ndarray  # uint8 (N, h, w, 3)
    digests: list[str]  # SHA-256 of each file
    failed: dict[Path, str]

    def originals(self) -> list[int]:
        """For each image the index of the first with the same pixels: its own, or a copy's.

        Saving a picture anew changes the file and nothing else.
        """
        first: dict[str, int] = {}
        digests = (image.digest(pixels.tobytes()) for pixels in self.pixels)
        return [first.setdefault(digest, index) for index, digest in enumerate(digests)]

    def distinct(self) -> list[int]:
        """Indices of the images that are no copy of an earlier one, ascending."""
        return sorted(set(self.originals()))


def load(paths: list[Path], size: tuple[int, int], *, strict: bool, what: str) -> Images:
    """Decode and resize files with all cores; unreadable ones are named and skipped.

    Raises TrainingError under `strict`, or where nothing is left.
    """

    def load_one(path: Path) -> tuple[np.ndarray, str] | str:
        try:
            str(path).encode()  # a name that is no text can't stand in any record
            data = path.read_bytes()
            return image.decode_to(data, size)[0], image.digest(data)
        except UnicodeEncodeError:
            return "its name is not UTF-8"
        except (ServiceError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        results = list(
            progress(pool.map(load_one, paths), total=len(paths), description=f"reading {what}")
        )
    failed = {p: r for p, r in zip(paths, results, strict=True) if isinstance(r, str)}
    for path, reason in failed.items():
        if strict:
            raise TrainingError(f"{path}: {reason} (--strict)")
        log.warning("skipped %s: %s", path, reason)
    good = [(p, *r) for p, r in zip(paths, results, strict=True) if not isinstance(r, str)]
    if not good:
        raise TrainingError(f"none of the {len(paths)} {what} could be read")
    kept, pixels, digests = zip(*good, strict=True)
    return Images(list(kept), np.stack(pixels), list(digests), failed)


def hold_out(
    count: int, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out) of `count` normal images, chosen by seed.

    15 % are held out; at least 20 of 100 or more, so that a 5 % false-positive rate can be
    promised. Images of one group (by index, in order of appearance) stay together, so the number
    is a little more, or less where only large groups are left: none that leads beyond a quarter of
    the images is held out, unless all would. Raises TrainingError where fewer than 2 images would
    be left to train on.
    """
    held = max(1, round(0.15 * count))
    if count >= 100:
        held = max(held, 20)
    if count - held < 2:
        raise TrainingError(f"{count} normal images are too few: at least 3 are needed")
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index in range(count):
        members[index if groups is None else groups[index]].append(index)
    names = list(members)
    order = [members[names[i]] for i in np.random.default_rng(seed).permutation(len(names))]
    most = max(held, count // 4)
    held_out: list[int] = []
    for group in order:
        if len(held_out) < held and len(held_out) + len(group) <= most:
            held_out += group
    held_out = held_out or min(order, key=len)
    trained = sorted(set(range(count)) - set(held_out))
    if len(trained) < 2:
        raise TrainingError(
            f"{count} normal images in {len(names)} groups: holding {held} or more of them out in "
            f"whole groups leaves {len(trained)} to train on, and 2 are needed"
        )
    return trained, sorted(held_out)


def fingerprint(digests: Iterable[str]) -> str:
    """One SHA-256 for a set of files, whatever their names and order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
