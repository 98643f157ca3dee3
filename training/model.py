"""Reverse distillation: a frozen teacher, a one-class bottleneck and a decoder that restores.

RD4AD: Deng & Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding", CVPR 2022.
SK-RD4AD: Park et al., "Skip-connected Reverse Distillation", CVPR Workshops (VAND) 2025; its skips
add the teacher's own deeper map to the next stage's input and have no parameters.

    image ─► Teacher ─► [E1, E2, E3] ─► OneClassEmbedding ─► z ─► Decoder ─► [D1, D2, D3]
                                                          skips: E3, E2 ──────┘

Feature lists run from shallow (stride 4) to deep (stride 16) on both sides.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.errors import TrainingError
from training.settings import BACKBONES, Backbone, Skips

NOT_STATED = "not stated"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """ResNet stem and layer1 to layer3, frozen: stays in eval mode whatever `train` says."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.network = timm.create_model(
            backbone, pretrained=False, features_only=True, out_indices=(1, 2, 3)
        )
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """[E1 (B,C,H/4,W/4), E2 (B,2C,H/8,W/8), E3 (B,4C,H/16,W/16)] of normalised images."""
        features: list[Tensor] = self.network(images)
        return features


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def upsampling(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)


class Residual(nn.Module):
    """A ResNet block; the first of a stage halves the resolution, or doubles it in the decoder."""

    def __init__(
        self, inputs: int, planes: int, backbone: Backbone, *, resample: Literal["", "down", "up"]
    ) -> None:
        super().__init__()
        outputs = planes * backbone.expansion
        if backbone.bottleneck:
            width = planes * backbone.width_factor
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
                self._spatial(inputs, planes, resample),
                nn.BatchNorm2d(planes),
                nn.ReLU(inplace=True),
                convolution(planes, outputs, 3),
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
        return F.relu(self.body(x) + self.shortcut(x))


def stage(
    inputs: int, planes: int, blocks: int, backbone: Backbone, resample: Literal["down", "up"]
) -> nn.Sequential:
    outputs = planes * backbone.expansion
    first = Residual(inputs, planes, backbone, resample=resample)
    rest = (Residual(outputs, planes, backbone, resample="") for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def downsampling(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, outputs, 3, stride=2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class OneClassEmbedding(nn.Module):
    """OCBE (RD4AD, section 3.3): `fuse` brings the teacher's maps to stride 16, `embed` to 32."""

    def __init__(self, backbone: Backbone, planes: int = 512) -> None:
        super().__init__()
        e = backbone.expansion
        self.shallow = nn.Sequential(downsampling(64 * e, 128 * e), downsampling(128 * e, 256 * e))
        self.middle = downsampling(128 * e, 256 * e)
        self.embed = stage(3 * 256 * e, planes, backbone.embedding_blocks, backbone, "down")
        initialise(self)

    def forward(self, teacher_features: list[Tensor]) -> Tensor:
        e1, e2, e3 = teacher_features
        fused = torch.cat([self.shallow(e1), self.middle(e2), e3], dim=1)  # (B, 768e, H/16, W/16)
        embedded: Tensor = self.embed(fused)  # (B, planes * e, H/32, W/32)
        return embedded


class Decoder(nn.Module):
    """The student: restores the teacher's maps, deepest first, from the embedding.

    skips: `none` (RD4AD); `sk` adds E3 and E2 to the input of the stage *after* the one that
    restores them (SK-RD4AD); `gated` weighs each addition with the cosine between the teacher's
    and the restored vector at that place, so that teacher features enter only where both agree.
    """

    def __init__(self, backbone: Backbone, skips: Skips, embedding_planes: int = 512) -> None:
        super().__init__()
        e = backbone.expansion
        deep, middle, shallow = backbone.decoder_blocks
        self.skips = skips
        self.stage3 = stage(embedding_planes * e, 256, deep, backbone, "up")
        self.stage2 = stage(256 * e, 128, middle, backbone, "up")
        self.stage1 = stage(128 * e, 64, shallow, backbone, "up")
        initialise(self)

    def forward(self, embedding: Tensor, teacher_features: list[Tensor]) -> list[Tensor]:
        _, e2, e3 = teacher_features
        d3 = self.stage3(embedding)
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

    `embedding_planes` is the width of the one-class embedding: 512 as published, fewer for a
    smaller graph.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, skips: Skips, embedding_planes: int = 512) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise TrainingError(f"backbone {backbone!r} is none of {', '.join(BACKBONES)}")
        shape = BACKBONES[backbone]
        self.teacher = Teacher(backbone)
        self.bottleneck = OneClassEmbedding(shape, embedding_planes)
        self.decoder = Decoder(shape, skips, embedding_planes)
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(teacher_features, decoder_features) of RGB images, uint8 (B, H, W, 3)."""
        normalised = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)  # (B, 3, H, W)
        teacher_features = self.teacher(normalised)
        decoder_features = self.decoder(self.bottleneck(teacher_features), teacher_features)
        return teacher_features, decoder_features

    def trainable_state(self) -> dict[str, Tensor]:
        """Bottleneck's and decoder's tensors: all that training changes."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("teacher.")}


@dataclass(frozen=True)
class TeacherWeights:
    """Where a teacher's weights came from, for the records."""

    origin: str
    sha256: str
    licence: str


def load_teacher(teacher: Teacher, backbone: str, source: str, licence: str = "") -> TeacherWeights:
    """Fill a teacher from timm's hub (`hub`: the torchvision ImageNet weights) or from a file.

    A file is .safetensors, or .pth read with weights_only, with torchvision's or timm's ResNet
    keys; layer4 and fc are ignored. `licence` is recorded where the source states none. Raises
    TrainingError that names missing or misshaped keys.
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
    name = f"{backbone}.tv_in1k"
    try:
        pretrained: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub client raises many types with no common base
        raise TrainingError(
            f"the weights {name} can't be had from the hub: {error}. Behind a firewall, give a "
            "file: --teacher-weights FILE (models/teachers/ ships one)"
        ) from error
    state = pretrained.state_dict()
    _load_strictly(teacher, state, Path(name))
    sha256 = hashlib.sha256()
    for key in sorted(state):
        sha256.update(key.encode() + state[key].cpu().contiguous().numpy().tobytes())
    stated = str(pretrained.pretrained_cfg.get("license") or "")
    return TeacherWeights(f"timm/{name}", sha256.hexdigest(), stated or licence or NOT_STATED)


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
    wanted = teacher.network.state_dict()
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(state) - optional)
    misshaped = sorted(
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in set(wanted) & set(state)
        if state[key].shape != wanted[key].shape
    )
    if missing or misshaped:
        problems = [f"missing {_shortened(missing)}"] if missing else []
        problems += [f"misshaped {_shortened(misshaped)}"] if misshaped else []
        raise TrainingError(
            f"teacher weights {path}: {'; '.join(problems)}. Is it another network than --backbone "
            "says?"
        )
    teacher.network.load_state_dict({k: state[k] for k in wanted if k in state}, strict=False)


def _shortened(names: list[str], count: int = 12) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class AnomalyMap(nn.Module):
    """Cosine distances of all scales, upsampled, summed and blurred; and the map's maximum.

    RD4AD's map is `gaussian_filter(sum_k bilinear(1 - cos(E_k, D_k)), sigma=4)`. Both operations
    are linear and separable, so each scale takes two products with constant matrices,
    A_h d A_w^T: the same result to float32's precision at a tenth of the cost, on any runtime.
    """

    def __init__(self, image_size: tuple[int, int], sigma: float = 4.0) -> None:
        super().__init__()
        self.strides = (4, 8, 16)
        for axis, length in zip("hw", image_size, strict=True):
            blur = gaussian_matrix(length, sigma)
            for stride in self.strides:
                operator = blur @ bilinear_matrix(length // stride, length)  # (length, length / s)
                self.register_buffer(f"{axis}{stride}", operator.float(), persistent=False)

    def forward(
        self, teacher_features: list[Tensor], decoder_features: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(anomaly_map (B, H, W), image_score (B,)), float32 whatever the features are."""
        maps = []
        for stride, e, d in zip(self.strides, teacher_features, decoder_features, strict=True):
            rows, columns = self.get_buffer(f"h{stride}"), self.get_buffer(f"w{stride}")
            maps.append(rows @ cosine_distance(e.float(), d.float()) @ columns.T)  # (B, H, W)
        anomaly_map = torch.stack(maps).sum(0)
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine over channels, (B, C, h, w) -> (B, h, w); 1 where a vector is zero."""
    norms = torch.sqrt((a * a).sum(1) * (b * b).sum(1))
    return 1 - (a * b).sum(1) / norms.clamp_min(1e-8)


def gaussian_matrix(length: int, sigma: float, truncate: float = 4.0) -> Tensor:
    """(length, length) float64 operator equal to scipy.ndimage.gaussian_filter1d, mode reflect."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    kernel /= kernel.sum()
    # Half-sample reflection (d c b a | a b c d | d c b a) has period 2 * length.
    positions = (torch.arange(length)[:, None] + offsets).remainder(2 * length)
    positions = torch.where(positions < length, positions, 2 * length - 1 - positions)
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
