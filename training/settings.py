"""What can be trained, and how; free of torch, so that the command line answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Skips = Literal["none", "sk", "gated"]
# `mff-narrow` is anomalib's: inner Bottleneck width of a plain ResNet-50, two blocks for R34.
Bottleneck = Literal["mff", "mfcf", "mff-narrow"]
Loss = Literal["flattened", "per-location", "dual"]
Schedule = Literal["constant", "cosine"]
FeatureCache = Literal["auto", "memory", "disk", "off"]
ImportFormat = Literal["rd4ad", "sk-rd4ad", "drd", "anomalib"]


@dataclass(frozen=True)
class Blocks:
    """What bottleneck and decoder are built of, for a teacher."""

    bottleneck: bool  # Bottleneck blocks (expansion 4) or BasicBlocks (expansion 1)
    width_factor: int  # inner width of a Bottleneck over its planes
    embedding: int
    decoder: tuple[int, int, int]  # deepest stage first, as in the reference code
    signed: bool = False  # whether the teacher's maps hold negative values

    @property
    def expansion(self) -> int:
        return 4 if self.bottleneck else 1


BACKBONES = {
    "resnet18": Blocks(False, 1, 2, (2, 2, 2)),
    "resnet34": Blocks(False, 1, 3, (3, 4, 6)),
    "resnet50": Blocks(True, 1, 3, (3, 4, 6)),
    "wide_resnet50_2": Blocks(True, 2, 3, (3, 4, 6)),
}
# Of other CNNs some end their stages with ReLU and some don't: a signed decoder restores both.
OTHER_BACKBONE = Blocks(False, 1, 2, (2, 2, 2), signed=True)

# What each architecture sets of the settings below, where its flag is not given.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sk-rd4ad": {},
    "rd4ad": {"skips": "none", "consistency_rate": 0.0},
    "drd": {
        "skips": "none",
        "consistency_rate": 0.0,
        "bottleneck": "mfcf",
        "loss": "dual",
        "pseudo_anomalies": True,
        "refinement": True,
        "batch_size": 4,
        "weight_decay": 1e-5,
    },
}


# How a data set's folders are laid out: keys of `datasets.LAYOUTS`, and what finds out.
LAYOUTS = ("auto", "mvtec", "visa", "btad", "vad", "mtd", "mtd-random", "folder")


@dataclass(frozen=True)
class Settings:
    """One training run; the defaults are SK-RD4AD's published ones."""

    data: str
    name: str
    layout: str = "auto"
    category: str = ""  # where `data` holds several
    group: str = ""  # regular expression: normal images that share its match stay together
    models: str = "models"
    architecture: str = "sk-rd4ad"
    skips: Skips = "sk"
    bottleneck: Bottleneck = "mff"
    loss: Loss = "flattened"
    consistency_rate: float = 0.005
    pseudo_anomalies: bool = False
    refinement: bool = False
    backbone: str = "wide_resnet50_2"
    teacher_weights: str = "hub"
    teacher_licence: str = ""  # for the records, where neither hub nor file states one
    embedding_planes: int | None = None  # None: twice the teacher's deepest map
    image_size: tuple[int, int] = (256, 256)  # height, width
    epochs: int = 200
    batch_size: int = 16
    lr: float = 0.005
    schedule: Schedule = "constant"
    weight_decay: float = 0.0
    seed: int = 111
    device: str = "auto"
    precision: str = "auto"
    feature_cache: FeatureCache = "auto"
    feature_memory_gb: float | None = None  # None: half of what is free
    save_every: int = 10  # epochs
    strict: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.models) / self.name / "checkpoint"
