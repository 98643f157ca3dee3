"""To choose between recipes without a test image: held-out normals against defects drawn on them.

Scratches, stains, smears and foreign patches of random shape, place and strength, some too faint
to find. They stand in for defects nobody has yet, as in CutPaste (Li et al., CVPR 2021) and DRAEM
(Zavrtanik et al., ICCV 2021). A foreign patch resembles the pseudo-anomalies that DRD trains on, so
each kind has a figure of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from service.detector import Detector
from training.metrics import image_metrics, pixel_metrics

AT_MOST = 60  # normal images: what the maps of all that is drawn on them take stays below 1 GB
DRAWN_PER_KIND = 2  # of each normal image
ATTEMPTS = 10
VISIBLE = 4  # grey levels; pixels that change less belong to no mask


@dataclass(frozen=True)
class Validation:
    auroc: float  # drawn defects against the normal images, by image score
    aupro: float  # up to 0.3
    kinds: dict[str, float]  # the AUROC of each kind's images alone
    drawn: int


def validate(detector: Detector, normals: np.ndarray, seed: int = 0) -> Validation:
    """How well a graph finds drawn defects on normal images uint8 (N, H, W, 3) it never saw.

    On AT_MOST of them, chosen by seed, where there are more.
    """
    if len(normals) > AT_MOST:  # names sort by camera, shift or lot: the first are no sample
        chosen = np.random.default_rng(seed).permutation(len(normals))[:AT_MOST]
        normals = normals[np.sort(chosen)]
    drawn, masks = draw(normals, seed)
    images = np.concatenate([normals, drawn])
    predictions = [
        p for start in range(0, len(images), 8) for p in detector.run(images[start : start + 8])
    ]
    scores = np.array([p.score for p in predictions])
    anomalous = np.arange(len(images)) >= len(normals)
    kinds = {}
    for index, kind in enumerate(KINDS):
        either = ~anomalous | ((np.arange(len(images)) - len(normals)) % len(KINDS) == index)
        kinds[kind.__name__.strip("_")] = image_metrics(scores[either], anomalous[either]).auroc
    maps = np.stack([p.anomaly_map for p in predictions])
    masks = np.concatenate([np.zeros((len(normals), *masks.shape[1:]), bool), masks])
    return Validation(
        auroc=image_metrics(scores, anomalous).auroc,
        aupro=pixel_metrics(maps, masks).aupro,
        kinds=kinds,
        drawn=len(drawn),
    )


def draw(normals: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (M, H, W, 3), masks bool (M, H, W)): every kind on every normal image."""
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for index, normal in enumerate(normals):
        for defect in KINDS * DRAWN_PER_KIND:
            # Another image, where there is one.
            step = 1 + rng.integers(max(1, len(normals) - 1))
            other = normals[(index + step) % len(normals)]
            image, mask = _visible(rng, defect, normal, other)
            images.append(image)
            masks.append(mask)
    return np.stack(images), np.stack(masks)


Defect = Callable[[Generator, np.ndarray, np.ndarray], np.ndarray]


def _visible(
    rng: Generator, defect: Defect, normal: np.ndarray, other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drawn until it shows; a smear of what has no texture never does: a scratch in its place."""
    for attempt in range(10 * ATTEMPTS):
        kind = defect if attempt < ATTEMPTS else _scratch
        image = kind(rng, normal.astype(np.float32), other.astype(np.float32))
        image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        changed = np.abs(image.astype(np.int16) - normal).max(axis=2) >= VISIBLE
        if changed.sum() >= 4:
            break
    # One region a defect: what lies between changed pixels belongs to it.
    closed = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    return image, closed > 0


def _scratch(rng: Generator, image: np.ndarray, _: np.ndarray) -> np.ndarray:
    """A bent line, lighter or darker than what it crosses."""
    height, width = image.shape[:2]
    start = rng.uniform(0.1, 0.9, 2) * (width, height)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.15, 24))
    step = rng.uniform(0.05, 0.4) * min(height, width) / 24
    path = start + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1) * step, axis=0)
    line = np.zeros((height, width), np.uint8)
    thickness = int(rng.integers(1, 4))
    cv2.polylines(line, [(path * 16).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, 4)
    return np.asarray(image + _strength(rng) * (line / np.float32(255))[..., None])


def _stain(rng: Generator, image: np.ndarray, _: np.ndarray) -> np.ndarray:
    """A soft blob that is tinted lighter or darker."""
    tint = _strength(rng) * rng.uniform(0.6, 1, 3).astype(np.float32)
    if (image[..., :1] == image).all():  # from a grey camera
        tint = tint[:1]
    return np.asarray(image + tint * _blob(rng, image.shape[:2], softness=0.02))


def _smear(rng: Generator, image: np.ndarray, _: np.ndarray) -> np.ndarray:
    """A blob whose texture is wiped out."""
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.01, 0.04) * min(image.shape[:2]))
    return np.asarray(image + _blob(rng, image.shape[:2], softness=0.005) * (blurred - image))


def _patch(rng: Generator, image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A blob of another normal image, turned over and moved."""
    foreign = np.roll(other[::-1, ::-1], rng.integers(0, other.shape[:2]), (0, 1))
    alpha = np.float32(rng.uniform(0.3, 1))
    return np.asarray(
        image + alpha * _blob(rng, image.shape[:2], softness=0.005) * (foreign - image)
    )


KINDS: list[Defect] = [_scratch, _stain, _smear, _patch]


def _strength(rng: Generator) -> np.float32:
    """Grey levels, up or down: from hardly visible to glaring, faint ones as often as strong."""
    return np.float32(np.exp(rng.uniform(np.log(8), np.log(120))) * rng.choice([-1, 1]))


def _blob(rng: Generator, size: tuple[int, int], softness: float) -> np.ndarray:
    """(H, W, 1) coverage of an irregular ellipse a thirtieth to a fifth of the image across."""
    height, width = size
    shorter = min(size)
    centre = rng.uniform(0.1, 0.9, 2) * (width, height)
    radius = rng.uniform(1 / 60, 1 / 10) * shorter
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    harmonics = sum(
        rng.normal(0, 0.25 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
        for k in range(2, 6)
    )
    radii = radius * np.maximum(0.3, 1 + harmonics)
    stretch, turn = rng.uniform(1, 2), rng.uniform(0, np.pi)
    outline = np.stack([radii * stretch * np.cos(angles), radii / stretch * np.sin(angles)])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    corners = (((rotation @ outline).T + centre) * 16).astype(np.int32)
    blob = np.zeros(size, np.uint8)
    cv2.fillPoly(blob, [corners], 255, cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(blob.astype(np.float32) / 255, (0, 0), max(0.5, softness * shorter))
    return np.asarray(soft[..., None])
