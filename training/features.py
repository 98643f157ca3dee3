"""What the teacher sees in the training images: computed once, kept as float16."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import distributed
from training.errors import TrainingError
from training.model import STRIDES, Teacher
from training.progress import progress
from training.settings import FeatureCache

log = logging.getLogger(__name__)

CHUNK = 16  # images
FREE_SHARE = 0.5  # of a GPU's free memory and of a disk's free space that features may take


class TeacherFeatures:
    """The teacher's maps of images uint8 (N, H, W, 3) by index; nothing random precedes them.

    Kept in memory or in a file, which saves a fifth of a step (ResNet-18) or more, or computed
    each time (`store` None).
    """

    def __init__(
        self, teacher: Teacher, images: np.ndarray, device: torch.device, precision: torch.dtype
    ) -> None:
        self.teacher, self.images, self.device = teacher, images, device
        self.precision = precision
        self.store: list[Tensor] | None = None

    def __getitem__(self, indices: np.ndarray) -> list[Tensor]:
        """[E1, E2, E3] (B, C, h, w), float32 on the device, channels last."""
        if self.store is None:
            return self._compute(indices)
        chosen = torch.from_numpy(indices)
        rows = (kept.index_select(0, chosen.to(kept.device)) for kept in self.store)
        return [row.to(self.device).float().permute(0, 3, 1, 2) for row in rows]

    def _compute(self, indices: np.ndarray) -> list[Tensor]:
        images = torch.from_numpy(self.images[indices]).to(self.device)
        with torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        ):
            return [_rounded(e) for e in self.teacher(self.teacher.normalise(images))]

    def keep(self, store: list[Tensor]) -> None:
        """Fill float16 tensors (N, h, w, C) of every scale with the maps, and use them."""
        count = len(self.images)
        with progress(total=count, description="teacher features") as bar:
            for start in range(0, count, CHUNK):
                indices = np.arange(start, min(start + CHUNK, count))
                for kept, e in zip(store, self._compute(indices), strict=True):
                    halved = e.permute(0, 2, 3, 1).half()
                    if not torch.isfinite(halved).all():
                        raise TrainingError(
                            f"the teacher's features reach {float(e.abs().max()):.3g}, beyond "
                            f"float16's 65504: they can't be kept; use --feature-cache off"
                        )
                    kept[start : start + CHUNK] = halved
                bar.update(len(indices))
        self.store = store

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """(N, h, w, C) of every scale."""
        count, height, width, _ = self.images.shape
        return [
            (count, height // s, width // s, c)
            for s, c in zip(STRIDES, self.teacher.channels, strict=True)
        ]


def _rounded(e: Tensor) -> Tensor:
    """To float16's numbers, so that it makes no difference to a run where its features are kept."""
    halved = e.half()
    return torch.where(halved.isfinite(), halved.float(), e.float())


@contextlib.contextmanager
def teacher_features(
    teacher: Teacher,
    images: np.ndarray,
    device: torch.device,
    precision: torch.dtype,
    *,
    place: FeatureCache,
    memory_gb: float | None,
    folder: Path,
) -> Iterator[TeacherFeatures]:
    """Features of training images, kept where `place` says; nothing is left in `folder`.

    `auto`: on the GPU, else in up to `memory_gb` (by default half of what is free), else on
    disk, each where they fit. Each of several processes keeps all of them, since any image may come
    into its part of a batch; those on one machine share its memory and disk.

    Raises TrainingError where features are no float16 numbers, and for `memory` and `disk` where
    they don't fit.
    """
    features = TeacherFeatures(teacher, images, device, precision)
    size = 2 * sum(int(np.prod(shape)) for shape in features.shapes())
    sharing = distributed.count_here()
    budget = int(memory_gb * 1e9) if memory_gb else _free_memory() // 2 // sharing
    free_disk = int(FREE_SHARE * shutil.disk_usage(folder).free) // sharing
    chosen = choose_place(place, size, budget, free_disk, _free_on(device))
    log.info("teacher features: %.2f GB, kept %s", size / 1e9, _WHERE[chosen])
    try:
        if chosen != "off":
            features.keep(_allocate(chosen, features.shapes(), device, folder))
        yield features
    finally:
        features.store = None


_WHERE = {
    "device": "on the GPU",
    "memory": "in memory",
    "disk": "on disk",
    "off": "nowhere: computed at every step",
}


def choose_place(
    place: FeatureCache, size: int, budget: int, free_disk: int, free_on_device: int
) -> str:
    """Where features of `size` bytes go: device, memory, disk or off."""
    if place == "memory" and size > budget:
        raise TrainingError(
            f"teacher features take {size / 1e9:.2f} GB, the budget is {budget / 1e9:.2f} GB: "
            "raise --feature-memory-gb, or use --feature-cache disk"
        )
    if place == "disk" and size > free_disk:
        raise TrainingError(
            f"teacher features take {size / 1e9:.2f} GB, half of what the disk has free is "
            f"{free_disk / 1e9:.2f} GB: use --feature-cache off"
        )
    if place != "auto":
        return place
    if size <= FREE_SHARE * free_on_device:
        return "device"
    if size <= budget:
        return "memory"
    return "disk" if size <= free_disk else "off"


def _allocate(
    place: str, shapes: list[tuple[int, int, int, int]], device: torch.device, folder: Path
) -> list[Tensor]:
    if place == "device":
        return [torch.empty(shape, dtype=torch.float16, device=device) for shape in shapes]
    if place == "memory":
        return [torch.empty(shape, dtype=torch.float16) for shape in shapes]
    sizes = [int(np.prod(shape)) for shape in shapes]
    # Without a name: it goes with the process, however that ends.
    with tempfile.TemporaryFile(dir=folder) as file:
        mapped = np.memmap(file, np.float16, "w+", shape=(sum(sizes),))
    parts = np.split(mapped, np.cumsum(sizes)[:-1])
    return [torch.from_numpy(p.reshape(shape)) for p, shape in zip(parts, shapes, strict=True)]


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its container's if that is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        lines = dict(x.split(":") for x in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free, 0)


def _free_on(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
