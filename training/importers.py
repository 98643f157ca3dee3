"""Checkpoints that the public codes wrote -> bundles, without training.

RD4AD, SK-RD4AD and DRD save {'bn': ..., 'decoder': ...} and leave the teacher out; anomalib's
Lightning checkpoint holds all three and says how it prepared the pictures.

    file ─► tensors by the code's names ─► our network, each accounted for ─► export's checks
"""

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.bundle import Bundle, Network
from training import data, datasets
from training.errors import TrainingError
from training.export import Origin, Scorer, new_version, write_bundle
from training.flags import image_size
from training.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NOT_STATED,
    AnomalyMap,
    Border,
    ReverseDistillation,
    TeacherWeights,
    differences,
    digest_of,
    load_teacher,
    shortened,
)
from training.precision import FloatType
from training.settings import BACKBONES, Bottleneck, ImportFormat, Skips

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Code:
    """What a public code's network is in ours."""

    architecture: str
    skips: Skips = "none"
    bottleneck: Bottleneck = "mff"
    refinement: bool = False
    border: Border = "half-sample"


CODES: dict[ImportFormat, Code] = {
    "rd4ad": Code("rd4ad"),
    "sk-rd4ad": Code("sk-rd4ad", skips="sk"),
    "drd": Code("drd", bottleneck="mfcf", refinement=True),
    "anomalib": Code("rd4ad", bottleneck="mff-narrow", border="whole-sample"),
}
# Where the codes' numbered convolutions stand in our bottlenecks.
FUSING: dict[Bottleneck, dict[str, int]] = {
    "mff": {"shallow.0": 1, "shallow.1": 2, "middle": 3},
    "mff-narrow": {"shallow.0": 1, "shallow.1": 2, "middle": 3},
    "mfcf": {"shallow": 1, "middle": 2, "deep": 3},
}
# Made by the codes and used by none of them; `memory` stands in RD4AD's earliest files.
LEFTOVER = re.compile(r"(conv4|bn4)\.|.*memory")
PUBLISHED_SIZE = (256, 256)


@dataclass(frozen=True)
class Preparation:
    """How a code prepared its pictures: (height, width), and mean and deviation of 0 to 1."""

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def import_checkpoint(
    path: Path,
    format: ImportFormat,
    backbone: str,
    models: Path,
    name: str,
    *,
    teacher_weights: str | None = None,
    teacher_licence: str = "",
    size: tuple[int, int] | None = None,
    normals: Path | None = None,
    version: int | None = None,
    weights: FloatType = "float32",
    precision: FloatType = "float32",
) -> Bundle:
    """Write `models/name/version` from a checkpoint of RD4AD, SK-RD4AD, DRD or anomalib.

    `size` is (height, width), by default the checkpoint's or the published 256 x 256. Without
    `normals`, a folder of pictures that were not trained on, the bundle has no threshold. Raises
    TrainingError for a file that is something else or would run code, for tensors that are missing,
    unknown, misshaped or not finite, by the code's own names, and as `write_bundle`.
    """
    target = new_version(models, name, version)
    if backbone not in BACKBONES:
        raise TrainingError(f"--backbone {backbone}: the public codes have {', '.join(BACKBONES)}")
    code, anomalib = CODES[format], format == "anomalib"
    if anomalib and teacher_weights:
        raise TrainingError("anomalib's checkpoint holds its teacher: leave --teacher-weights out")

    saved = _read(path, stand_ins=anomalib)
    tensors = _anomalib_tensors(path, saved) if anomalib else _official_tensors(path, saved)
    preparation = (
        _anomalib_preparation(path, saved["hyper_parameters"], backbone, size)
        if anomalib
        else Preparation(size or PUBLISHED_SIZE)
    )
    held_out, pixels = _held_out(normals, preparation.size)

    model = ReverseDistillation(backbone, code.skips, bottleneck=code.bottleneck).eval()
    _fill(model, tensors, _names(model, code, anomalib), path)
    if anomalib:
        model.teacher.mean.copy_(255 * torch.tensor(preparation.mean))
        model.teacher.std.copy_(255 * torch.tensor(preparation.std))
        digest = digest_of(model.teacher.weights)
        teacher = TeacherWeights(f"{path.name}: encoder", digest, teacher_licence or NOT_STATED)
    else:
        teacher = load_teacher(model.teacher, backbone, teacher_weights or "hub", teacher_licence)
    anomaly_map = AnomalyMap(preparation.size, border=code.border, refinement=code.refinement)
    origin = Origin(
        network=Network(
            architecture=code.architecture,
            backbone=backbone,
            skips=code.skips,
            bottleneck=code.bottleneck,
            refinement=code.refinement,
            border=code.border,
            consistency_rate=None,
            embedding_planes=model.embedding_planes,
        ),
        teacher=teacher,
        trained=[],  # which pictures these were, no checkpoint tells
        fingerprint=data.fingerprint(held_out.values()),
        training={"format": format, "checkpoint": path.name, "checkpoint_sha256": _sha256(path)},
        metrics={},
    )
    scorer = Scorer(model, anomaly_map).eval()
    return write_bundle(
        target, scorer, preparation.size, origin, held_out, pixels, weights, precision
    )


def _names(model: ReverseDistillation, code: Code, anomalib: bool) -> dict[str, str]:
    """Our tensors' names -> the code's, which are those of torchvision's residual blocks."""
    parts = {"bottleneck": "bn", "decoder": "decoder"}
    names = {}
    if anomalib:
        parts = {"bottleneck": "model.bottleneck", "decoder": "model.decoder"}
        for key in model.teacher.weights:
            names[f"teacher.network.model.{key}"] = f"model.encoder.feature_extractor.{key}"
    for key in model.trainable_state():
        part, rest = key.split(".", 1)
        names[key] = f"{parts[part]}.{_name_within(part, rest, FUSING[code.bottleneck])}"
    return names


def _name_within(part: str, name: str, fusing: dict[str, int]) -> str:
    for place, number in fusing.items():
        if found := re.fullmatch(rf"{place}\.([01])\.(\w+)", name):
            return f"{('conv', 'bn')[int(found[1])]}{number}.{found[2]}"
    name = name.replace("embed.", "bn_layer.")
    name = re.sub(r"^stage(\d)", lambda m: f"layer{4 - int(m[1])}", name)  # theirs: deepest first
    name = name.replace("shortcut", "downsample" if part == "bottleneck" else "upsample")
    # A body is conv, bn, relu, conv, bn, ...; theirs are numbered from 1.
    return re.sub(
        r"body\.(\d)", lambda m: f"{('conv', 'bn')[int(m[1]) % 3]}{int(m[1]) // 3 + 1}", name
    )


def _fill(
    model: ReverseDistillation, tensors: dict[str, Tensor], names: dict[str, str], path: Path
) -> None:
    """Load every tensor under our name; raises TrainingError unless each is accounted for."""
    ours = model.state_dict()
    wanted = {theirs: ours[key] for key, theirs in names.items()}
    problems = differences(wanted, tensors)
    if unknown := sorted(set(tensors) - set(wanted)):
        problems.append(f"unknown {shortened(unknown)}")
    if strange := sorted(key for key, value in tensors.items() if not _plain(key, value)):
        problems.append(f"no dense floating-point tensors {shortened(strange)}")
    # A file may name a tensor of any size: values are looked at where the size is as expected.
    if not problems:
        broken = sorted(key for key, value in tensors.items() if not _usable(key, value))
        problems += [f"not finite, or a negative variance {shortened(broken)}"] if broken else []
    if problems:
        raise TrainingError(
            f"{path}: {'; '.join(problems)}. Is it of another code or network than --format and "
            "--backbone say?"
        )
    known = {key: tensors[theirs] for key, theirs in names.items() if theirs in tensors}
    model.load_state_dict(known, strict=False)


def _plain(name: str, tensor: Tensor) -> bool:
    counter = name.endswith("num_batches_tracked")
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return dense and (counter or tensor.is_floating_point())


def _usable(name: str, tensor: Tensor) -> bool:
    negative = name.endswith("running_var") and bool((tensor < 0).any())
    return bool(torch.isfinite(tensor).all()) and not negative


def _read(path: Path, *, stand_ins: bool) -> dict[str, Any]:
    if not path.is_file():
        raise TrainingError(f"{path}: no such file")
    try:
        allowed = _stand_ins(path) if stand_ins else nullcontext()
        with allowed:
            saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except TrainingError:
        raise
    except Exception as error:  # unpicklers and parsers raise what they like on foreign bytes
        # torch's own words advise to switch weights_only off: never, for a file from elsewhere.
        raise TrainingError(
            f"{path}: no checkpoint of plain tensors (a pickle that would run code is not read)"
        ) from error
    if not isinstance(saved, dict):
        raise TrainingError(f"{path}: no checkpoint: it holds a {type(saved).__name__}")
    return saved


def _official_tensors(path: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of {'bn': ..., 'decoder': ...}, under names that begin with these."""
    if "proj" in saved:
        raise TrainingError(
            f"{path}: `proj` is RD++'s projection between teacher and bottleneck; there is no such "
            "network here"
        )
    names = [str(key).removeprefix("module.") for key in saved]
    if any(name.startswith("layer1.") for name in names) and "conv1.weight" not in names:
        raise TrainingError(
            f"{path}: holds a decoder alone, as SK-RD4AD's --seg 1 saves it: the bottleneck that "
            "was trained with it is lost, and without it nothing can be inspected"
        )
    if set(saved) != {"bn", "decoder"}:
        found = shortened([str(key) for key in saved]) or "nothing"
        raise TrainingError(f"{path}: must hold `bn` and `decoder`, holds {found}")
    return {
        name: tensor
        for part in ("bn", "decoder")
        for name, tensor in _state(path, part, saved[part], drop=part == "bn").items()
    }


def _state(path: Path, prefix: str, state: Any, *, drop: bool) -> dict[str, Tensor]:
    """A state dict under `prefix`, without DataParallel's `module.` and without leftovers."""
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise TrainingError(f"{path}: {prefix} is no state dict of tensors")
    names = {key: str(key).removeprefix("module.") for key in state}
    if len(set(names.values())) < len(names):
        raise TrainingError(f"{path}: {prefix} has tensors twice, with and without `module.`")
    return {
        f"{prefix}.{name}": state[key]
        for key, name in names.items()
        if not (drop and LEFTOVER.match(name))
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ANOMALIB_LAYERS = ("layer1", "layer2", "layer3")
# What a genuine checkpoint names beside tensors: its enum of map modes, and, where a size was
# chosen, its pre-processor with all that hangs on it, the whole Lightning module included.
ANOMALIB_GLOBALS = re.compile(
    r"(anomalib|lightning|timm|torchmetrics|torchvision|torch\.nn\.modules)\.|builtins\.getattr$"
)
ATTRIBUTE_DICT = "lightning.fabric.utilities.data.AttributeDict"


class _Inert:
    """Keeps what a pickle hands to a class or function of that name, and does nothing with it."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "_Inert":
        inert = super().__new__(cls)
        inert.arguments, inert.state = arguments, {}
        return inert

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_ins(path: Path) -> torch.serialization.safe_globals:
    """Lets torch.load's weights_only read anomalib's checkpoint, and run nothing of it.

    weights_only refuses every name but tensors'. The names that the file has are listed without
    unpickling, and each of a library that belongs there is given an empty class of ours: nothing
    is imported, and `builtins.getattr` is as inert as the rest. Raises TrainingError for others.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if strangers := sorted(name for name in names if not ANOMALIB_GLOBALS.match(name)):
        raise TrainingError(
            f"{path}: names {shortened(strangers)}, which no checkpoint of anomalib does: not read"
        )
    classes: dict[str, type] = {n: type(n.rsplit(".", 1)[-1], (_Inert,), {}) for n in names}
    if ATTRIBUTE_DICT in classes:
        classes[ATTRIBUTE_DICT] = OrderedDict  # a dict too, and only dicts may be given items
    return torch.serialization.safe_globals([(stand_in, n) for n, stand_in in classes.items()])


def _anomalib_tensors(path: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The network's tensors; what lies beside `model.` (thresholds, metrics) is not the network."""
    if not isinstance(saved.get("state_dict"), dict) or not isinstance(
        saved.get("hyper_parameters"), dict
    ):
        raise TrainingError(
            f"{path}: lacks state_dict or hyper_parameters: no Lightning checkpoint of anomalib"
        )
    parts: dict[str, dict[str, Any]] = {}
    for key, value in saved["state_dict"].items():
        if str(key).startswith("model."):
            part, _, name = str(key).removeprefix("model.").partition(".")
            parts.setdefault(part, {})[name] = value
    return {
        name: tensor
        for part, state in parts.items()
        for name, tensor in _state(path, f"model.{part}", state, drop=part == "bottleneck").items()
    }


def _anomalib_preparation(
    path: Path, settings: dict[str, Any], backbone: str, size: tuple[int, int] | None
) -> Preparation:
    """How anomalib prepared its pictures; raises TrainingError for settings not reproduced here."""
    if settings.get("backbone", backbone) != backbone:
        raise TrainingError(f"{path}: its backbone is {settings['backbone']}, not {backbone}")
    layers = settings.get("layers", ANOMALIB_LAYERS)
    if not isinstance(layers, list | tuple) or tuple(layers) != ANOMALIB_LAYERS:
        raise TrainingError(f"{path}: layers {layers} are not {ANOMALIB_LAYERS}")
    mode = settings.get("anomaly_map_mode", "add")
    if isinstance(mode, _Inert):
        mode = mode.arguments[-1] if mode.arguments else None  # the enum's value
    if str(mode).lower() != "add":
        raise TrainingError(
            f"{path}: anomaly_map_mode {mode!r}: maps are added here, never multiplied"
        )
    pre_processor = settings.get("pre_processor", True)
    if pre_processor is True:
        return Preparation(size or PUBLISHED_SIZE)
    try:
        transform = pre_processor.state["_modules"]["transform"]
        steps = transform.state.get("transforms", [transform])
        states = {type(step).__name__: step.state for step in steps}
        if len(states) < len(steps):
            raise TypeError("a step twice")
    except (AttributeError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: its pre_processor can't be read: {error!r}") from error
    return _prepared(path, states, size)


def _prepared(
    path: Path, steps: dict[str, dict[str, Any]], size: tuple[int, int] | None
) -> Preparation:
    """What torchvision's steps, by the names of their classes, do to a picture."""
    normalise = steps.get("Normalize", {"mean": [0.0] * 3, "std": [1.0] * 3})
    sides = steps.get("Resize", {}).get("size", ())
    sides = [sides] if isinstance(sides, int) else sides  # the shorter side, aspect kept
    others = sorted(set(steps) - {"Resize", "Normalize"})
    if size is None:
        if others or len(sides) != 2:
            raise TrainingError(
                f"{path}: its pictures went through {', '.join(steps)} (Resize to {list(sides)}); "
                "the service resizes to a height and a width alone. To import it for that, give "
                "--image-size H W"
            )
        size = image_size(sides, f"{path}: image size")
    elif others or tuple(sides) != size:
        log.warning(
            "%s was trained on pictures after %s (Resize to %s), and is imported for %d x %d",
            *(path, ", ".join(steps), list(sides), *size),
        )
    return Preparation(size, tuple(normalise["mean"]), tuple(normalise["std"]))


def _held_out(folder: Path | None, size: tuple[int, int]) -> tuple[dict[str, str], np.ndarray]:
    """SHA-256 by name below `folder`, and pixels (N, h, w, 3), of normal pictures that differ."""
    if folder is None:
        return {}, np.empty((0, *size, 3), np.uint8)
    try:
        pictures = datasets.read(folder) if len(datasets.categories(folder)) == 1 else None
        paths = pictures.to_train_on() if pictures and pictures.layout == "folder" else None
    except TrainingError as error:
        raise TrainingError(f"--normals: {error}") from None
    if paths is None:
        raise TrainingError(
            f"--normals: {folder} is a data set; give a folder of normal pictures alone, of which "
            "none was trained on"
        )
    loaded = data.load(paths, size, strict=False, what="normal images")
    kept = loaded.distinct()  # a copy is no second sample
    names = {str(loaded.paths[i].relative_to(folder)): loaded.digests[i] for i in kept}
    return names, loaded.pixels[kept]
