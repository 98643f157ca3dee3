"""The teacher's features: the same wherever they are kept, and kept where they fit."""

from pathlib import Path

import numpy as np
import pytest
from training_fixtures import IMAGE_SIZE, randomise, torch

from training.errors import TrainingError
from training.features import choose_place, teacher_features
from training.model import Teacher

CPU = torch.device("cpu")
MAPS = Path("/proc/self/maps")  # a line for each file that the process has in its memory


def images(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *IMAGE_SIZE, 3), np.uint8)


def teacher(backbone: str = "resnet18") -> Teacher:
    built = Teacher(backbone)
    randomise(built, 0)
    return built


@pytest.mark.parametrize("place", ["memory", "disk", "off"])
def test_features_are_the_teachers_to_float16s_precision(tmp_path, place):
    chosen, pixels = teacher(), images()
    indices = np.array([17, 2, 2, 9])
    with teacher_features(
        chosen, pixels, CPU, torch.float32, place=place, memory_gb=None, folder=tmp_path
    ) as features:
        maps = features[indices]
    expected = chosen(chosen.normalise(torch.from_numpy(pixels[indices])))
    for e, kept in zip(expected, maps, strict=True):
        assert kept.shape == e.shape and kept.dtype == torch.float32
        torch.testing.assert_close(kept, e, rtol=1e-3, atol=1e-3)
        assert kept.is_contiguous(memory_format=torch.channels_last) or place == "off"


def test_the_teacher_runs_once_per_image_however_often_features_are_read(tmp_path):
    chosen, seen = teacher(), []
    chosen.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with teacher_features(
        chosen, images(), CPU, torch.float32, place="auto", memory_gb=None, folder=tmp_path
    ) as features:
        for _ in range(3):
            features[np.arange(20)]
    assert sum(seen) == 20


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux")
def test_a_file_of_features_takes_disk_space_without_a_name_that_could_be_left(tmp_path):
    with teacher_features(
        teacher(), images(), CPU, torch.float32, place="disk", memory_gb=None, folder=tmp_path
    ) as features:
        assert not list(tmp_path.iterdir())
        size = 2 * sum(int(np.prod(s)) for s in features.shapes())
        mapped = [line for line in MAPS.read_text().splitlines() if str(tmp_path) in line]
        first, last = (int(number, 16) for number in mapped[0].split()[0].split("-"))
        assert len(mapped) == 1 and size <= last - first < size + 4096


def test_features_beyond_float16_are_refused_with_the_way_out(tmp_path):
    chosen = teacher()
    with torch.no_grad():
        chosen.weights["layer3.1.bn2.bias"].fill_(1e5)
    with (
        pytest.raises(TrainingError, match=r"reach 1e\+05, beyond float16's 65504.*off"),
        teacher_features(
            chosen, images(), CPU, torch.float32, place="memory", memory_gb=None, folder=tmp_path
        ),
    ):
        pass


@pytest.mark.parametrize(
    "size, free_on_device, expected",
    [(40, 100, "device"), (40, 0, "memory"), (60, 100, "disk"), (90, 100, "off")],
)
def test_features_go_where_they_fit(size, free_on_device, expected):
    assert choose_place("auto", size, 50, 80, free_on_device) == expected


@pytest.mark.parametrize("place, words", [("memory", "budget is"), ("disk", "disk has free")])
def test_a_place_that_is_too_small_is_refused_by_name(place, words):
    with pytest.raises(TrainingError, match=f"take 3.00 GB.*{words}"):
        choose_place(place, int(3e9), int(1e9), int(2e9), 0)
    assert choose_place("off", int(3e9), 0, 0, 0) == "off"


def test_where_features_are_kept_makes_no_difference(tmp_path):
    """All are rounded to float16, but for what float16 can't hold."""
    chosen, pixels, indices = teacher(), images(16), np.arange(16)
    with torch.no_grad():
        chosen.weights["layer3.1.bn2.weight"].mul_(100)
    maps = {}
    for place in ("memory", "disk", "off"):
        with teacher_features(
            chosen, pixels, CPU, torch.float32, place=place, memory_gb=None, folder=tmp_path
        ) as features:
            maps[place] = features[indices]
    for memory, disk, off in zip(*maps.values(), strict=True):
        assert torch.equal(memory, disk) and torch.equal(memory, off)


def test_what_float16_cannot_hold_is_used_as_it_is_when_nothing_is_kept(tmp_path):
    chosen = teacher()
    with torch.no_grad():
        chosen.weights["layer3.1.bn2.bias"].fill_(1e5)
    with teacher_features(
        chosen, images(2), CPU, torch.float32, place="off", memory_gb=None, folder=tmp_path
    ) as features:
        assert 65504 < features[np.arange(2)][2].max() < float("inf")
