"""What the decoder is trained to make small."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import pseudo
from training.distributed import mean
from training.model import ReverseDistillation
from training.settings import Loss, Settings

Features = list[Tensor]  # (B, C, h, w) of each scale, shallow to deep
# First and last dimension of (B, C, h, w) along which vectors are compared.
FLATTENED, PER_LOCATION, PER_CHANNEL = (1, 3), (1, 1), (2, 3)
SEGMENTATION_RATE = 0.1  # DRD's code


class Objective(nn.Module):
    """The loss of a batch, as a run's settings compose it; in float32 whatever the network is.

    Of several processes each computes a part of the batch, and all get the loss of the whole.
    """

    def __init__(self, model: ReverseDistillation, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(
        self, images: Tensor, e: Features, rng: np.random.Generator, part: slice = slice(None)
    ) -> Tensor:
        """Of a batch's images uint8 (B, H, W, 3) and the teacher's maps of `part` of them.

        Returns a scalar.
        """
        d = _float32(self.model.restore(e))
        loss = distillation_loss(e, d, self.settings.loss)
        if self.settings.consistency_rate:
            loss = loss + self.settings.consistency_rate * consistency_loss(e, d)
        if self.settings.pseudo_anomalies:
            loss = loss + self._pseudo_anomalies(images, e, rng, part)
        return loss

    def _pseudo_anomalies(
        self, images: Tensor, e: Features, rng: np.random.Generator, part: slice
    ) -> Tensor:
        """DRD's other half: restore the normal image's maps from a pseudo-anomalous one's."""
        teacher = self.model.teacher
        normal = teacher.normalise(images[part])
        # Drawn for the whole batch, so that it doesn't matter how many processes share it.
        pasted = teacher.normalise(pseudo.paste(images, rng)[part])
        pasted_e = pseudo.add_noise(_float32(teacher(pasted)), rng, len(images), part)
        pasted_d = _float32(self.model.restore(pasted_e))
        difference = 1 - F.cosine_similarity(pasted, normal, dim=1, eps=1e-8)
        segmentation = segmentation_loss(pasted_e, pasted_d, difference)
        return channel_loss(e, pasted_d) + SEGMENTATION_RATE * segmentation


def _float32(features: Features) -> Features:
    return [feature.float() for feature in features]


def distillation_loss(
    teacher_features: Features, decoder_features: Features, kind: Loss = "flattened"
) -> Tensor:
    """Sum over scales of 1 - cosine between what the teacher sees and the decoder restores.

    `flattened` compares each image's whole map as one vector: so does the published code of RD4AD
    (Deng & Li, CVPR 2022), whose paper's equation (2) averages over places (`per-location`).
    `dual` is per location plus per channel (DRD: Ge et al., Neurocomputing 624, 2025).
    """
    vectors = {
        "flattened": [FLATTENED],
        "per-location": [PER_LOCATION],
        "dual": [PER_LOCATION, PER_CHANNEL],
    }
    return _cosine_distances(teacher_features, decoder_features, vectors[kind])


def channel_loss(teacher_features: Features, decoder_features: Features) -> Tensor:
    """Sum over scales of the mean over images and channels of 1 - cosine over places (DRD)."""
    return _cosine_distances(teacher_features, decoder_features, [PER_CHANNEL])


def _cosine_distances(a: Features, b: Features, vectors: list[tuple[int, int]]) -> Tensor:
    """Sum over scales and kinds of vectors of the mean of 1 - cosine."""
    distances = [
        mean(1 - F.cosine_similarity(x.flatten(*axes), y.flatten(*axes), axes[0], eps=1e-8))
        for x, y in zip(a, b, strict=True)
        for axes in vectors
    ]
    return torch.stack(distances).sum()


def consistency_loss(teacher_features: Features, decoder_features: Features) -> Tensor:
    """Asks neighbouring scales to be restored equally well (SK-RD4AD's code; not in the paper).

    Sum over neighbours of |MSE at the deeper scale, upsampled to the shallower - MSE there|.
    """
    pairs = list(zip(teacher_features, decoder_features, strict=True))
    differences = []
    for (shallow_e, shallow_d), (deep_e, deep_d) in zip(pairs, pairs[1:], strict=False):
        size = shallow_e.shape[-2:]
        upsampled = _squared_error(_upsample(deep_e, size), _upsample(deep_d, size))
        differences.append((upsampled - _squared_error(shallow_e, shallow_d)).abs())
    return torch.stack(differences).sum()


def _squared_error(a: Tensor, b: Tensor) -> Tensor:
    return mean(F.mse_loss(a, b, reduction="none"))


def segmentation_loss(
    teacher_features: Features, decoder_features: Features, difference: Tensor
) -> Tensor:
    """Mean |anomaly map - difference (B, H, W)|: defects shall show where the image was changed.

    DRD's third term: the map is the mean over scales of the upsampled cosine distances of a
    pseudo-anomalous image, `difference` its cosine distance from the normal one over colours.
    """
    size = difference.shape[-2:]
    maps = [
        _upsample((1 - F.cosine_similarity(e, d, dim=1, eps=1e-8)).unsqueeze(1), size)
        for e, d in zip(teacher_features, decoder_features, strict=True)
    ]
    return mean((torch.stack(maps).mean(0).squeeze(1) - difference).abs())


def _upsample(features: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=True)
