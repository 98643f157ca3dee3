"""What the decoder is trained to make small."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(teacher_features: list[Tensor], decoder_features: list[Tensor]) -> Tensor:
    """Sum over scales of the mean over images of 1 - cosine of the *flattened* maps.

    The published code of RD4AD (Deng & Li, CVPR 2022) flattens each image's map to one vector,
    where the paper's equation (2) averages over places; the flattened form is the one that gives
    the published figures.
    """
    losses = [
        (1 - F.cosine_similarity(e.flatten(1), d.flatten(1), dim=1, eps=1e-8)).mean()
        for e, d in zip(teacher_features, decoder_features, strict=True)
    ]
    return torch.stack(losses).sum()


def consistency_loss(teacher_features: list[Tensor], decoder_features: list[Tensor]) -> Tensor:
    """Asks neighbouring scales to be restored equally well (SK-RD4AD's code; not in the paper).

    Sum over neighbours of |MSE at the deeper scale, upsampled to the shallower - MSE there|.
    """
    pairs = list(zip(teacher_features, decoder_features, strict=True))
    differences = []
    for (shallow_e, shallow_d), (deep_e, deep_d) in zip(pairs, pairs[1:], strict=False):
        size = shallow_e.shape[-2:]
        upsampled = F.mse_loss(_upsample(deep_e, size), _upsample(deep_d, size))
        differences.append((upsampled - F.mse_loss(shallow_e, shallow_d)).abs())
    return torch.stack(differences).sum()


def _upsample(features: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=True)
