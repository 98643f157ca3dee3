"""Small teachers and small pictures for the tests of training, made where they are used."""

from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")  # the service's own tests run without it

from safetensors.torch import save_file  # noqa: E402

from training.model import Teacher  # noqa: E402
from training.settings import Settings  # noqa: E402

# Beside another busy process, two threads wait for each other at every layer: 30 times slower.
torch.set_num_threads(1)
IMAGE_SIZE = (64, 96)  # height, width: not square, so that swapped axes show
PLANES = 32


def randomise(module: "torch.nn.Module", seed: int) -> None:
    """He weights, and batch norm statistics that differ by channel as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, torch.nn.Conv2d):
                fan = child.weight[0].numel()
                child.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
            elif isinstance(child, torch.nn.BatchNorm2d):
                for tensor in (child.weight, child.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (child.bias, child.running_mean):
                    tensor.uniform_(-0.3, 0.3, generator=generator)


def write_teacher(path: Path, backbone: str = "resnet18", seed: int = 0) -> Path:
    """Random weights in the place of ImageNet's, which no test may download."""
    teacher = Teacher(backbone)
    randomise(teacher, seed)
    save_file(teacher.weights, path, metadata={"license": "CC0-1.0"})
    return path


def normal_picture(rng: np.random.Generator, size: tuple[int, int] = IMAGE_SIZE) -> np.ndarray:
    """Soft stripes with a little noise, RGB (h, w, 3)."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    stripes = 128 + 40 * np.sin((rows + 2 * columns) / 7 + rng.uniform(0, 0.5))
    noise = rng.normal(0, 4, (*size, 3))
    return np.clip(stripes[..., None] + [10, 0, -20] + noise, 0, 255).astype(np.uint8)


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    """RGB (h, w, 3) or gray (h, w) in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = pixels if pixels.ndim == 2 else pixels[..., ::-1]
    assert cv2.imwrite(str(path), stored)
    return path


def write_normal_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    rng = np.random.default_rng(seed)
    return [write_picture(folder / f"{i:03}.png", normal_picture(rng)) for i in range(count)]


def run_settings(folder: Path, pictures: int = 8, **changes: object) -> Settings:
    """Pictures and a teacher below `folder`, and a run of three steps an epoch on them."""
    if not (folder / "data").exists():
        write_normal_pictures(folder / "data", pictures)
        write_teacher(folder / "teacher.safetensors")
    settings: dict[str, object] = {
        "data": str(folder / "data"),
        "name": "part",
        "models": str(folder / "models"),
        "teacher_weights": str(folder / "teacher.safetensors"),
        "backbone": "resnet18",
        "embedding_planes": PLANES,
        "image_size": IMAGE_SIZE,
        "epochs": 1,
        "batch_size": 3,
        "device": "cpu",
    }
    return Settings(**settings | changes)  # type: ignore[arg-type]
