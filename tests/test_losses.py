"""Losses against hand-computed cases and slow versions."""

from dataclasses import replace

import numpy as np
import pytest
from training_fixtures import randomise, torch

from training import pseudo
from training.losses import (
    Objective,
    channel_loss,
    consistency_loss,
    distillation_loss,
    segmentation_loss,
)
from training.model import from_settings
from training.settings import ARCHITECTURES, Settings

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


def slow_cosine_distance(u: np.ndarray, v: np.ndarray) -> float:
    return 1 - (u * v).sum() / (np.sqrt((u * u).sum()) * np.sqrt((v * v).sum()))


def slow_per_location(e: "torch.Tensor", d: "torch.Tensor") -> float:
    e, d = e.double().numpy(), d.double().numpy()
    images, _, height, width = e.shape
    places = [(b, i, j) for b in range(images) for i in range(height) for j in range(width)]
    return np.mean([slow_cosine_distance(e[b, :, i, j], d[b, :, i, j]) for b, i, j in places])


def slow_per_channel(e: "torch.Tensor", d: "torch.Tensor") -> float:
    e, d = e.double().numpy(), d.double().numpy()
    channels = [(b, c) for b in range(e.shape[0]) for c in range(e.shape[1])]
    return np.mean([slow_cosine_distance(e[b, c], d[b, c]) for b, c in channels])


def test_every_kind_of_distillation_equals_its_slow_version():
    e, d = features(0), features(1)
    pairs = list(zip(e, d, strict=True))
    per_location = sum(slow_per_location(*pair) for pair in pairs)
    per_channel = sum(slow_per_channel(*pair) for pair in pairs)
    assert distillation_loss(e, d, "per-location").item() == pytest.approx(per_location, rel=1e-5)
    assert channel_loss(e, d).item() == pytest.approx(per_channel, rel=1e-5)
    dual = distillation_loss(e, d, "dual").item()
    assert dual == pytest.approx(per_location + per_channel, rel=1e-5)


def test_the_segmentation_loss_equals_the_slow_version():
    e, d = features(0), features(1)
    difference = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(2))
    maps = []
    for u, v in zip(e, d, strict=True):
        u, v = u.double().numpy(), v.double().numpy()
        distance = 1 - (u * v).sum(1) / np.sqrt((u * u).sum(1) * (v * v).sum(1))
        maps.append(slow_upsample(distance[:, None], 16, 24)[:, 0])
    expected = abs(np.mean(maps, axis=0) - difference.numpy()).mean()
    assert segmentation_loss(e, d, difference).item() == pytest.approx(expected, rel=1e-5)


def objective(**changes: object) -> Objective:
    settings = replace(Settings("data", "part", backbone="resnet18", embedding_planes=16))
    settings = replace(settings, **changes)  # type: ignore[arg-type]
    model = from_settings(settings)
    randomise(model, 0)
    return Objective(model.eval(), settings)


def pictures() -> "torch.Tensor":
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8, generator=generator)


def test_the_objective_is_distillation_plus_rate_times_consistency():
    loss = objective(consistency_rate=0.3)
    e, d = loss.model(pictures())
    expected = distillation_loss(e, d).item() + 0.3 * consistency_loss(e, d).item()
    assert loss(pictures(), e, np.random.default_rng(0)).item() == pytest.approx(expected)


def test_drds_objective_is_its_three_terms_on_the_same_pseudo_anomalies():
    drd = objective(**ARCHITECTURES["drd"])
    e, d = drd.model(pictures())
    teacher, rng = drd.model.teacher, np.random.default_rng(3)
    normal, pasted = (teacher.normalise(x) for x in (pictures(), pseudo.paste(pictures(), rng)))
    noised = pseudo.add_noise(teacher(pasted), rng)
    restored = drd.model.restore(noised)
    difference = 1 - torch.nn.functional.cosine_similarity(normal, pasted, dim=1)
    expected = (
        distillation_loss(e, d, "dual")
        + channel_loss(e, restored)
        + 0.1 * segmentation_loss(noised, restored, difference)
    )
    loss = drd(pictures(), e, np.random.default_rng(3))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in drd.model.bottleneck.parameters())


def test_the_objective_is_computed_in_float32_under_autocast():
    loss = objective(**ARCHITECTURES["drd"])
    with torch.autocast("cpu", torch.bfloat16):
        e = [x.float() for x in loss.model.teacher(loss.model.teacher.normalise(pictures()))]
        value = loss(pictures(), e, np.random.default_rng(0))
    assert value.dtype == torch.float32 and torch.isfinite(value)
