"""What can be trained, and how; free of torch, so that the command line answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Skips = Literal["none", "sk", "gated"]


@dataclass(frozen=True)
class Backbone:
    """What the bottleneck and decoder mirror of a ResNet."""

    bottleneck: bool  # Bottleneck blocks (expansion 4) or BasicBlocks (expansion 1)
    width_factor: int  # inner width of a Bottleneck over its planes
    embedding_blocks: int
    decoder_blocks: tuple[int, int, int]  # deepest stage first, as in the reference code

    @property
    def expansion(self) -> int:
        return 4 if self.bottleneck else 1


BACKBONES = {
    "resnet18": Backbone(False, 1, 2, (2, 2, 2)),
    "resnet34": Backbone(False, 1, 3, (3, 4, 6)),
    "resnet50": Backbone(True, 1, 3, (3, 4, 6)),
    "wide_resnet50_2": Backbone(True, 2, 3, (3, 4, 6)),
}

# Skips and consistency rate of each architecture.
ARCHITECTURES: dict[str, tuple[Skips, float]] = {"sk-rd4ad": ("sk", 0.005), "rd4ad": ("none", 0.0)}


@dataclass(frozen=True)
class Settings:
    """One training run; the defaults are SK-RD4AD's published ones."""

    data: str
    name: str
    models: str = "models"
    architecture: str = "sk-rd4ad"
    skips: str = "sk"
    consistency_rate: float = 0.005
    backbone: str = "wide_resnet50_2"
    teacher_weights: str = "hub"
    teacher_licence: str = ""  # for the records, where neither hub nor file states one
    embedding_planes: int = 512
    image_size: tuple[int, int] = (256, 256)  # height, width
    epochs: int = 200
    batch_size: int = 16
    lr: float = 0.005
    seed: int = 111
    device: str = "auto"
    precision: str = "auto"
    save_every: int = 10  # epochs
    strict: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.models) / self.name / "checkpoint"
