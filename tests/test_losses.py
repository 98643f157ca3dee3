"""Losses against hand-computed cases and slow versions."""

import numpy as np
import pytest
from training_fixtures import torch

from training.losses import consistency_loss, distillation_loss
from training.train import total_loss

SIZES = ((6, 8, 12), (10, 4, 6), (14, 2, 3))  # channels, height, width: not square, not of 256


def features(seed: int, batch: int = 3) -> list["torch.Tensor"]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *size, generator=generator) for size in SIZES]


def slow_distillation(teacher_features, decoder_features) -> float:
    total = 0.0
    for e, d in zip(teacher_features, decoder_features, strict=True):
        for u, v in zip(e.double().numpy(), d.double().numpy(), strict=True):
            cosine = (u * v).sum() / (np.sqrt((u * u).sum()) * np.sqrt((v * v).sum()))
            total += (1 - cosine) / len(e)
    return total


def slow_upsample(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with aligned corners, a pixel at a time."""
    result = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            y, z = i * (x.shape[2] - 1) / (height - 1), j * (x.shape[3] - 1) / (width - 1)
            top, left = min(int(y), x.shape[2] - 2), min(int(z), x.shape[3] - 2)
            a, b = y - top, z - left
            result[:, :, i, j] = (
                (1 - a) * (1 - b) * x[:, :, top, left]
                + (1 - a) * b * x[:, :, top, left + 1]
                + a * (1 - b) * x[:, :, top + 1, left]
                + a * b * x[:, :, top + 1, left + 1]
            )
    return result


def slow_consistency(teacher_features, decoder_features) -> float:
    pairs = [
        (e.double().numpy(), d.double().numpy())
        for e, d in zip(teacher_features, decoder_features, strict=True)
    ]
    total = 0.0
    for (e, d), (deep_e, deep_d) in zip(pairs, pairs[1:], strict=False):
        height, width = e.shape[2:]
        up = slow_upsample(deep_e, height, width) - slow_upsample(deep_d, height, width)
        total += abs((up**2).mean() - ((e - d) ** 2).mean())
    return total


def test_the_cosine_is_of_the_flattened_map_and_not_of_each_place():
    """Two places, (1, 0) against (0, 1) and (0, 3) against (0, 3): flattened 9 / 10; a mean over
    places would be 1 / 2."""
    e = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).reshape(1, 2, 1, 2)
    d = torch.tensor([[0.0, 0.0], [1.0, 3.0]]).reshape(1, 2, 1, 2)
    assert distillation_loss([e], [d]).item() == pytest.approx(0.1, abs=1e-6)


def test_images_are_averaged_and_scales_are_summed():
    """Image losses 0.1 and 0 at one scale, 1 and 1 at the other."""
    e = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).reshape(1, 2, 1, 2)
    d = torch.tensor([[0.0, 0.0], [1.0, 3.0]]).reshape(1, 2, 1, 2)
    first = (torch.cat([e, e]), torch.cat([d, 7 * e]))
    second = (torch.tensor([1.0, 0, 1, 0]).reshape(2, 2, 1, 1), torch.ones(2, 2, 1, 1))
    second[1][:, 0] = 0
    loss = distillation_loss([first[0], second[0]], [first[1], second[1]])
    assert loss.item() == pytest.approx(0.05 + 1, abs=1e-6)


def test_distillation_equals_the_slow_version():
    e, d = features(0), features(1)
    assert distillation_loss(e, d).item() == pytest.approx(slow_distillation(e, d), rel=1e-5)


def test_distillation_takes_channels_last_maps():
    e, d = features(0), features(1)
    strided = [x.to(memory_format=torch.channels_last) for x in d]
    assert distillation_loss(e, strided).item() == pytest.approx(distillation_loss(e, d).item())


def test_distillation_is_zero_for_a_scaled_copy_and_has_a_gradient_otherwise():
    e = features(0)
    assert distillation_loss(e, [3 * x for x in e]).item() == pytest.approx(0, abs=1e-6)
    d = [x.requires_grad_() for x in features(1)]
    distillation_loss(e, d).backward()
    assert all(x.grad.abs().sum() > 0 for x in d)


def test_consistency_equals_the_slow_version_at_sizes_of_the_features():
    """Six neighbouring channels differ, so each side is upsampled on its own."""
    e = [x[:, :6] for x in features(0)]
    d = [x[:, :6] for x in features(1)]
    assert consistency_loss(e, d).item() == pytest.approx(slow_consistency(e, d), rel=1e-5)
    e, d = features(2), features(3)
    assert consistency_loss(e, d).item() == pytest.approx(slow_consistency(e, d), rel=1e-5)


def test_consistency_is_zero_where_every_scale_errs_alike():
    e = features(0)
    assert consistency_loss(e, [x + 2 for x in e]).item() == pytest.approx(0, abs=1e-5)
    assert consistency_loss(e, [x + (2 if i else 3) for i, x in enumerate(e)]).item() == (
        pytest.approx(5, rel=1e-4)  # |4 - 9| between the first two, 0 between the others
    )


def test_the_total_is_distillation_plus_rate_times_consistency():
    e, d = features(0), features(1)
    parts = distillation_loss(e, d).item(), consistency_loss(e, d).item()
    assert total_loss(e, d, 0.0).item() == pytest.approx(parts[0])
    assert total_loss(e, d, 0.3).item() == pytest.approx(parts[0] + 0.3 * parts[1])


def test_the_total_is_computed_in_float32():
    e = [torch.full((2, 512, 8, 8), 60.0, dtype=torch.float16) for _ in range(3)]
    loss = total_loss(e, [x.clone() for x in e], 0.005)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0, abs=1e-4)
