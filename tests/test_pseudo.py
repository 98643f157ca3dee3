"""Pseudo-anomalies: what is pasted, where, how large, and that a seed repeats it."""

import numpy as np
from training_fixtures import torch

from training import pseudo


def pictures(count: int = 3, size: tuple[int, int] = (128, 192)) -> "torch.Tensor":
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def changed_box(original: "torch.Tensor", pasted: "torch.Tensor") -> tuple[slice, slice]:
    rows, columns = torch.nonzero((pasted != original).any(-1), as_tuple=True)
    return (
        slice(int(rows.min()), int(rows.max()) + 1),
        slice(int(columns.min()), int(columns.max()) + 1),
    )


def test_a_piece_of_the_same_image_lies_over_a_fifth_of_what_was_there():
    images = pictures(1, (128, 128)).float()
    pasted = pseudo.paste(images, np.random.default_rng(4))
    place = changed_box(images[0], pasted[0])
    piece = pasted[0][place] - 0.2 * images[0][place]
    side = piece.shape[0]
    assert piece.shape == (side, side, 3)
    windows = images[0].unfold(0, side, 1).unfold(1, side, 1).permute(0, 1, 3, 4, 2)
    assert (windows - piece).abs().amax(dim=(2, 3, 4)).min() < 1e-3


def test_sides_are_large_middling_or_small_and_alike_in_a_batch():
    images = pictures()
    sides = []
    for seed in range(40):
        pasted = pseudo.paste(images, np.random.default_rng(seed))
        boxes = [changed_box(*pair) for pair in zip(images, pasted, strict=True)]
        shapes = {(b[0].stop - b[0].start, b[1].stop - b[1].start) for b in boxes}
        assert len(shapes) == 1  # every image of the batch, square
        sides.append(shapes.pop()[0])
    # Half of 256: every third of DRD's sides halves as well.
    assert all(5 <= s <= 16 or 32 <= s <= 50 or 75 <= s <= 100 for s in sides)
    small, middling = sum(s <= 16 for s in sides), sum(32 <= s <= 50 for s in sides)
    assert small > middling > 0 and small + middling < len(sides)


def test_the_smallest_image_takes_a_piece():
    images = pictures(2, (32, 32))
    for seed in range(30):
        pasted = pseudo.paste(images, np.random.default_rng(seed))
        assert pasted.shape == images.shape and (pasted != images).any()


def test_images_are_left_as_they_were_and_a_seed_repeats_everything():
    images = pictures().float()
    before = images.clone()
    first = pseudo.paste(images, np.random.default_rng(1))
    assert torch.equal(images, before)
    assert torch.equal(first, pseudo.paste(images, np.random.default_rng(1)))
    assert not torch.equal(first, pseudo.paste(images, np.random.default_rng(2)))


def test_features_get_noise_of_a_tenth():
    features = [torch.ones(2, 8, 32, 48), torch.ones(2, 16, 16, 24)]
    noised = pseudo.add_noise(features, np.random.default_rng(0))
    for e, n in zip(features, noised, strict=True):
        assert abs((n - e).std().item() - 0.1) < 0.005 and abs((n - e).mean().item()) < 0.005
    again = pseudo.add_noise(features, np.random.default_rng(0))
    assert all(torch.equal(a, b) for a, b in zip(noised, again, strict=True))
