"""Reverse distillation: a frozen teacher, a one-class bottleneck and a decoder that restores.

RD4AD: Deng & Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding", CVPR 2022.
SK-RD4AD: Park et al., "Skip-connected Reverse Distillation", CVPR Workshops (VAND) 2025; its skips
add the teacher's own deeper map to the next stage's input and have no parameters.

    image ─► Teacher ─► [E1, E2, E3] ─► OneClassEmbedding ─► z ─► Decoder ─► [D1, D2, D3]
                                                          skips: E3, E2 ──────┘

Feature lists run from shallow (stride 4) to deep (stride 16) on both sides.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.errors import TrainingError
from training.settings import BACKBONES, OTHER_BACKBONE, Blocks, Bottleneck, Settings, Skips

NOT_STATED = "not stated"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Border = Literal["half-sample", "whole-sample"]
STRIDES = (4, 8, 16)  # of the teacher's maps, shallow to deep


class Teacher(nn.Module):
    """A CNN's maps at strides 4, 8 and 16, frozen: stays in eval mode whatever `train` says.

    Raises TrainingError for a name that timm doesn't know and a network without such maps.
    """

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str) -> None:
        super().__init__()
        indices = _stages(backbone)
        try:
            # A "getter" leaves out what follows the last map and keeps timm's names of the rest.
            self.network = timm.create_model(
                backbone, features_only=True, feature_cls="getter", out_indices=indices
            )
            maps = self.network.eval()(torch.zeros(1, 3, 64, 64))
        except Exception as error:  # networks raise what they like where they can't
            raise TrainingError(f"backbone {backbone!r} can't give its maps: {error}") from error
        # Some round their maps' sizes in another way, or fix the image's.
        if (sides := [m.shape[-1] for m in maps]) != [64 // stride for stride in STRIDES]:
            raise TrainingError(
                f"backbone {backbone!r} has maps of sides {sides} for an image of 64; a teacher "
                f"needs {[64 // stride for stride in STRIDES]}"
            )
        self.channels: list[int] = self.network.feature_info.channels()
        mean, std = _statistics(backbone)
        self.register_buffer("mean", 255 * torch.tensor(mean), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that are used, by timm's names (for ResNets also torchvision's)."""
        state: dict[str, Tensor] = self.network.model.state_dict()
        return state

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """RGB images (B, H, W, 3), 0 to 255 -> (B, 3, H, W) as the teacher was trained on."""
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)

    @torch.no_grad()
    def forward(self, normalised: Tensor) -> list[Tensor]:
        """[E1 (B, C1, H/4, W/4), E2 (B, C2, H/8, W/8), E3 (B, C3, H/16, W/16)]."""
        features: list[Tensor] = self.network(normalised)
        return features


def architecture_of(backbone: str) -> str:
    """timm's name without the tag that says which weights: `resnet50` of `resnet50.a1_in1k`."""
    return backbone.split(".", 1)[0]


def _stages(backbone: str) -> tuple[int, ...]:
    """Which of a network's stages end with maps at strides 4, 8 and 16."""
    try:
        with torch.device("meta"):  # its description is wanted, not its weights
            model: Any = timm.create_model(backbone)
    except RuntimeError as error:  # timm's for an unknown name
        raise TrainingError(
            f"backbone {backbone!r} is none of {', '.join(BACKBONES)}, and timm "
            f"{timm.__version__} has no network of that name: {error}"
        ) from error
    reductions = [entry["reduction"] for entry in getattr(model, "feature_info", [])]
    if not set(STRIDES) <= set(reductions):
        raise TrainingError(
            f"backbone {backbone!r} has maps at strides {reductions or 'unknown'}; a teacher needs "
            f"{', '.join(map(str, STRIDES))}"
        )
    return tuple(max(i for i, r in enumerate(reductions) if r == stride) for stride in STRIDES)


def _statistics(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pictures that timm's weights were trained on."""
    config = timm.get_pretrained_cfg(backbone)
    return (config.mean, config.std) if config else (IMAGENET_MEAN, IMAGENET_STD)


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def upsampling(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)


class Residual(nn.Module):
    """A ResNet block; the first of a stage halves the resolution, or doubles it in the decoder.

    `signed` leaves out the last ReLU, for maps that hold negative values.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: Blocks,
        *,
        resample: Literal["", "down", "up"] = "",
        signed: bool = False,
    ) -> None:
        super().__init__()
        self.signed = signed
        if blocks.bottleneck:
            width = outputs // blocks.expansion * blocks.width_factor
            self.body = nn.Sequential(
                convolution(inputs, width, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                self._spatial(width, width, resample),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                convolution(width, outputs, 1),
                nn.BatchNorm2d(outputs),
            )
        else:
            self.body = nn.Sequential(
                self._spatial(inputs, outputs, resample),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
                convolution(outputs, outputs, 3),
                nn.BatchNorm2d(outputs),
            )
        self.shortcut: nn.Module = nn.Identity()
        if resample == "down":
            self.shortcut = nn.Sequential(
                convolution(inputs, outputs, 1, stride=2), nn.BatchNorm2d(outputs)
            )
        elif resample == "up":
            self.shortcut = nn.Sequential(upsampling(inputs, outputs), nn.BatchNorm2d(outputs))

    @staticmethod
    def _spatial(inputs: int, outputs: int, resample: str) -> nn.Module:
        if resample == "up":
            return upsampling(inputs, outputs)
        return convolution(inputs, outputs, 3, stride=2 if resample == "down" else 1)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.body(x) + self.shortcut(x)
        return summed if self.signed else F.relu(summed)


def stage(
    inputs: int, outputs: int, count: int, blocks: Blocks, resample: Literal["down", "up"]
) -> nn.Sequential:
    """`count` blocks, the first of which resamples; in a decoder the last may be signed."""
    chain = [Residual(inputs, outputs, blocks, resample=resample)]
    chain += [Residual(outputs, outputs, blocks) for _ in range(count - 1)]
    chain[-1].signed = blocks.signed and resample == "up"
    return nn.Sequential(*chain)


def fusing(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class OneClassEmbedding(nn.Module):
    """OCBE (RD4AD, section 3.3): maps fused at stride 16 (MFF), embedded at stride 32 (OCE)."""

    def __init__(self, channels: list[int], blocks: Blocks, planes: int) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.shallow = nn.Sequential(fusing(c1, c2), fusing(c2, c3))
        self.middle = fusing(c2, c3)
        self.embed = stage(3 * c3, planes * blocks.expansion, blocks.embedding, blocks, "down")
        initialise(self)

    def forward(self, teacher_features: list[Tensor]) -> Tensor:
        e1, e2, e3 = teacher_features
        fused = torch.cat([self.shallow(e1), self.middle(e2), e3], dim=1)  # (B, 3 C3, H/16, W/16)
        embedded: Tensor = self.embed(fused)  # (B, planes * expansion, H/32, W/32)
        return embedded


class CascadedEmbedding(nn.Module):
    """DRD's bottleneck (Ge et al., Neurocomputing 624, 2025): MFCF fuses from shallow to deep."""

    def __init__(self, channels: list[int], blocks: Blocks, planes: int) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.shallow = fusing(c1, c2)
        self.middle = fusing(2 * c2, 2 * c3)
        self.deep = fusing(3 * c3, c3, stride=1)
        self.embed = stage(c3, planes * blocks.expansion, blocks.embedding, blocks, "down")
        initialise(self)

    def forward(self, teacher_features: list[Tensor]) -> Tensor:
        e1, e2, e3 = teacher_features
        fused = self.middle(torch.cat([self.shallow(e1), e2], dim=1))  # (B, 2 C3, H/16, W/16)
        fused = self.deep(torch.cat([fused, e3], dim=1))  # (B, C3, H/16, W/16)
        embedded: Tensor = self.embed(fused)  # (B, planes * expansion, H/32, W/32)
        return embedded


def embedding(
    kind: Bottleneck, channels: list[int], blocks: Blocks, planes: int
) -> OneClassEmbedding | CascadedEmbedding:
    if kind == "mfcf":
        return CascadedEmbedding(channels, blocks, planes)
    if kind == "mff-narrow":
        blocks = replace(blocks, width_factor=1, embedding=3 if blocks.bottleneck else 2)
    return OneClassEmbedding(channels, blocks, planes)


class Decoder(nn.Module):
    """The student: restores the teacher's maps, deepest first, from the embedding.

    skips: `none` (RD4AD); `sk` adds E3 and E2 to the input of the stage *after* the one that
    restores them (SK-RD4AD); `gated` weighs each addition with the cosine between the teacher's
    and the restored vector at that place, so that teacher features enter only where both agree.
    """

    def __init__(self, channels: list[int], blocks: Blocks, skips: Skips, planes: int) -> None:
        super().__init__()
        c1, c2, c3 = channels
        deep, middle, shallow = blocks.decoder
        self.skips = skips
        self.stage3 = stage(planes * blocks.expansion, c3, deep, blocks, "up")
        self.stage2 = stage(c3, c2, middle, blocks, "up")
        self.stage1 = stage(c2, c1, shallow, blocks, "up")
        initialise(self)

    def forward(self, embedded: Tensor, teacher_features: list[Tensor]) -> list[Tensor]:
        _, e2, e3 = teacher_features
        d3 = self.stage3(embedded)
        d2 = self.stage2(self._skip(d3, e3))
        d1 = self.stage1(self._skip(d2, e2))
        return [d1, d2, d3]  # compared with E before the skip: no way around the bottleneck for D3

    def _skip(self, restored: Tensor, teacher: Tensor) -> Tensor:
        if self.skips == "none":
            return restored
        if self.skips == "sk":
            return restored + teacher
        gate = F.cosine_similarity(restored.detach(), teacher, dim=1).unsqueeze(1)
        return restored + gate * teacher


def initialise(module: nn.Module) -> None:
    """He initialisation of the convolutions; transposed ones keep PyTorch's own, as published."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


class ReverseDistillation(nn.Module):
    """Teacher, bottleneck and decoder for uint8 images.

    `embedding_planes` is the width of the one-class embedding; by default twice the teacher's
    deepest map, which for ResNets is the published 512. Raises TrainingError for a backbone that
    can't teach.
    """

    def __init__(
        self,
        backbone: str,
        skips: Skips = "sk",
        embedding_planes: int | None = None,
        bottleneck: Bottleneck = "mff",
    ) -> None:
        super().__init__()
        blocks = BACKBONES.get(architecture_of(backbone), OTHER_BACKBONE)
        self.teacher = Teacher(backbone)
        channels = self.teacher.channels
        self.embedding_planes = embedding_planes or 2 * channels[-1] // blocks.expansion
        self.bottleneck = embedding(bottleneck, channels, blocks, self.embedding_planes)
        self.decoder = Decoder(channels, blocks, skips, self.embedding_planes)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(teacher_features, decoder_features) of RGB images (B, H, W, 3), 0 to 255."""
        teacher_features = self.teacher(self.teacher.normalise(images))
        return teacher_features, self.restore(teacher_features)

    def restore(self, teacher_features: list[Tensor]) -> list[Tensor]:
        """decoder_features: what the bottleneck lets the decoder know of the teacher's maps."""
        restored: list[Tensor] = self.decoder(self.bottleneck(teacher_features), teacher_features)
        return restored

    def trainable_state(self) -> dict[str, Tensor]:
        """Bottleneck's and decoder's tensors: all that training changes."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("teacher.")}


def from_settings(settings: Settings) -> ReverseDistillation:
    return ReverseDistillation(
        settings.backbone, settings.skips, settings.embedding_planes, settings.bottleneck
    )


@dataclass(frozen=True)
class TeacherWeights:
    """Where a teacher's weights came from, for the records."""

    origin: str
    sha256: str
    licence: str


def load_teacher(teacher: Teacher, backbone: str, source: str, licence: str = "") -> TeacherWeights:
    """Fill a teacher from timm's hub (`hub`: the torchvision ImageNet weights) or from a file.

    A file is .safetensors, or .pth read with weights_only, with timm's keys (a
    ResNet's are torchvision's); what comes after stride 16 is ignored. `licence` is recorded where
    the source states none. Raises TrainingError that names missing or misshaped keys.
    """
    if source == "hub":
        return _load_from_hub(teacher, backbone, licence)
    path = Path(source)
    state, metadata = _read_weights(path)
    _load_strictly(teacher, state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    stated = metadata.get("license", metadata.get("licence", ""))
    return TeacherWeights(path.name, sha256, stated or licence or NOT_STATED)


def _load_from_hub(teacher: Teacher, backbone: str, licence: str) -> TeacherWeights:
    name = f"{backbone}.tv_in1k" if backbone in BACKBONES else backbone
    try:
        pretrained: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub client raises many types with no common base
        shipped = " (models/teachers/ ships one)" if backbone == "resnet18" else ""
        raise TrainingError(
            f"the weights {name} can't be had from the hub: {error}. Behind a firewall, give a "
            f"file: --teacher-weights FILE{shipped}"
        ) from error
    state = pretrained.state_dict()
    _load_strictly(teacher, state, Path(name))
    stated = str(pretrained.pretrained_cfg.get("license") or "")
    return TeacherWeights(f"timm/{name}", digest_of(state), stated or licence or NOT_STATED)


def digest_of(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values, for weights that don't come as a file of their own."""
    sha256 = hashlib.sha256()
    for key in sorted(state):
        sha256.update(key.encode() + state[key].cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise TrainingError(f"teacher weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers and parsers raise what they like on foreign bytes
        # torch's own words advise to switch weights_only off: never, for a file from elsewhere.
        raise TrainingError(
            f"teacher weights {path}: neither .safetensors nor a .pth of plain tensors (a pickle "
            "that would run code is not read)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise TrainingError(f"teacher weights {path}: not a state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}, {}


def _load_strictly(teacher: Teacher, state: dict[str, Tensor], path: Path) -> None:
    wanted = teacher.weights
    if problems := differences(wanted, state):
        raise TrainingError(
            f"teacher weights {path}: {'; '.join(problems)}. Is it another network than --backbone "
            "says?"
        )
    known = {key: state[key] for key in wanted if key in state}
    teacher.network.model.load_state_dict(known, strict=False)


def differences(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """What given weights lack, or have in another shape, in words; counters may be missing."""
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(given) - optional)
    misshaped = sorted(
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in set(wanted) & set(given)
        if given[key].shape != wanted[key].shape
    )
    problems = [f"missing {shortened(missing)}"] if missing else []
    return problems + ([f"misshaped {shortened(misshaped)}"] if misshaped else [])


def shortened(names: list[str], count: int = 12) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class AnomalyMap(nn.Module):
    """Cosine distances of all scales, upsampled, summed and blurred; and the map's maximum.

    RD4AD's map is `gaussian_filter(sum_k bilinear(1 - cos(E_k, D_k)), sigma=4)`. Both operations
    are linear and separable, so each scale takes two products with constant matrices,
    A_h d A_w^T: the same result to float32's precision at a tenth of the cost, on any runtime.

    refinement: DRD's image score (Ge et al., 2025, and its code) is that of the scales' mean,
    scaled by 1 + the greatest distance on the scale whose upsampled distances vary least. Here it
    scales the whole map, so that the score stays the map's maximum.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        sigma: float = 4.0,
        *,
        border: Border = "half-sample",
        refinement: bool = False,
    ) -> None:
        super().__init__()
        self.refinement = refinement
        for axis, length in zip("hw", image_size, strict=True):
            blur = gaussian_matrix(length, sigma, border=border)
            for stride in STRIDES:
                upsample = bilinear_matrix(length // stride, length)  # (length, length / stride)
                self._constant(f"{axis}{stride}", blur @ upsample)
                if refinement:
                    self._constant(f"{axis}{stride}_mean", upsample.mean(0, keepdim=True))
                    self._constant(f"{axis}{stride}_gram", upsample.T @ upsample / length)

    def _constant(self, name: str, matrix: Tensor) -> None:
        self.register_buffer(name, matrix.float(), persistent=False)

    def forward(
        self, teacher_features: list[Tensor], decoder_features: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(anomaly_map (B, H, W), image_score (B,)), float32 whatever the features are."""
        pairs = zip(teacher_features, decoder_features, strict=True)
        distances = [cosine_distance(e.float(), d.float()) for e, d in pairs]
        anomaly_map = torch.stack(
            [self._sandwich(d, str(s)) for d, s in zip(distances, STRIDES, strict=True)]
        ).sum(0)
        if self.refinement:
            anomaly_map = anomaly_map * (self._certainty(distances) / len(STRIDES))
        return anomaly_map, anomaly_map.amax(dim=(1, 2))

    def _sandwich(self, distances: Tensor, name: str) -> Tensor:
        return self.get_buffer(f"h{name}") @ distances @ self.get_buffer(f"w{name}").T

    def _certainty(self, distances: list[Tensor]) -> Tensor:
        """DRD's factor (B, 1, 1): 1 + the maximum of the scale with the least variance."""
        variances = []
        for d, stride in zip(distances, STRIDES, strict=True):
            centred = d - self._sandwich(d, f"{stride}_mean")  # upsampling keeps constants
            # Mean square of the upsampled map without computing it: <d, U'U d W'W>.
            variances.append((centred * self._sandwich(centred, f"{stride}_gram")).sum((1, 2)))
        calmest = torch.stack(variances, 1).argmin(1, keepdim=True)  # (B, 1)
        maxima = torch.stack([d.amax(dim=(1, 2)) for d in distances], 1)  # (B, scales)
        return 1 + maxima.gather(1, calmest)[:, :, None]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine over channels, (B, C, h, w) -> (B, h, w); 1 where a vector is zero."""
    norms = torch.sqrt((a * a).sum(1) * (b * b).sum(1))
    return 1 - (a * b).sum(1) / norms.clamp_min(1e-8)


def gaussian_matrix(
    length: int, sigma: float, truncate: float = 4.0, border: Border = "half-sample"
) -> Tensor:
    """(length, length) float64 operator of a Gaussian blur with reflecting borders.

    `half-sample` (d c b a | a b c d) equals scipy.ndimage.gaussian_filter1d's mode reflect;
    `whole-sample` (d c b | a b c d) torch's reflect padding, as anomalib blurs.
    """
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    kernel /= kernel.sum()
    # The reflected axis repeats itself after this many places.
    period = 2 * length if border == "half-sample" else 2 * length - 2
    positions = (torch.arange(length)[:, None] + offsets).remainder(period)
    mirrored = (period - 1 if border == "half-sample" else period) - positions
    positions = torch.where(positions < length, positions, mirrored)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, positions, kernel.expand(length, -1))


def bilinear_matrix(inputs: int, outputs: int) -> Tensor:
    """(outputs, inputs) float64 operator equal to bilinear interpolation with align_corners."""
    positions = torch.arange(outputs, dtype=torch.float64) * (inputs - 1) / (outputs - 1)
    left = positions.long().clamp_max(inputs - 2)
    weight = positions - left
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    rows = torch.arange(outputs)
    matrix[rows, left] = 1 - weight
    matrix[rows, left + 1] += weight
    return matrix
