"""Pseudo-anomalies: normal images with a piece of themselves laid over another place.

DRD (Ge et al., Neurocomputing 624, 2025), as its code makes them: one side length for a batch,
large, middling or small; a fifth of what the piece covers shines through, so that the place is
brighter than its surroundings.
"""

import numpy as np
import torch
from torch import Tensor

# Shortest and longest side in pixels of an image 256 wide, and how often.
SIDES = ((150, 200, 0.2), (64, 100, 0.3), (10, 32, 0.5))
COVERED = 0.2  # of the covered place shines through
FEATURE_NOISE = 0.1  # deviation of the noise on a pseudo-anomalous image's teacher features


def paste(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Pseudo-anomalous copies, float32, of images (B, H, W, 3) from 0 to 255; may exceed 255."""
    height, width = images.shape[1:3]
    side = _side(min(height, width), rng)
    originals = images.float()
    pasted = originals.clone()
    for original, copy in zip(originals, pasted, strict=True):
        (y, x), (v, u) = rng.integers(0, (height - side, width - side), (2, 2))
        place = slice(v, v + side), slice(u, u + side)
        copy[place] = original[y : y + side, x : x + side] + COVERED * original[place]
    return pasted


def _side(shorter: int, rng: np.random.Generator) -> int:
    shortest, longest, _ = SIDES[rng.choice(len(SIDES), p=[share for *_, share in SIDES])]
    return max(1, round(int(rng.integers(shortest, longest + 1)) * shorter / 256))


def add_noise(
    features: list[Tensor],
    rng: np.random.Generator,
    count: int | None = None,
    part: slice = slice(None),
) -> list[Tensor]:
    """The maps with Gaussian noise of deviation FEATURE_NOISE.

    Where they are those of a `part` of a batch of `count` images, the noise is the batch's there.
    """
    generator = torch.Generator(features[0].device).manual_seed(int(rng.integers(2**62)))
    noised = []
    for e in features:
        shape = (len(e) if count is None else count, *e.shape[1:])
        noise = torch.randn(shape, generator=generator, device=e.device)
        noised.append(e + FEATURE_NOISE * noise[part])
    return noised
