"""A training run on disk: `models/<name>/checkpoint/`, safetensors and JSON, no pickle.

teacher.safetensors       written once
state-<step>.safetensors  bottleneck, decoder and the optimizer's moments
checkpoint.json           everything else; names the state file, so replacing it is the commit
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from training import files
from training.errors import TrainingError
from training.model import ReverseDistillation, TeacherWeights
from training.settings import Settings

FORMAT = 2


@dataclass
class Checkpoint:
    """Where a run stands, beside its tensors."""

    settings: Settings
    teacher: TeacherWeights
    trained: dict[str, str]  # path below the data folder -> SHA-256
    held_out: dict[str, str]
    data_fingerprint: str
    copies: dict[str, str] = field(default_factory=dict)  # of trained images: the same pixels
    step: int = 0
    steps_per_epoch: int = 0
    losses: list[float] = field(default_factory=list)  # mean of each finished epoch
    loss_sum: float = 0.0  # of the epoch under way
    seconds: float = 0.0  # of training, teacher features included, over all its parts
    grad_scale: float | None = None  # float16 only
    state_file: str = ""

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs


def save_teacher(folder: Path, model: ReverseDistillation) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A kill from here to the first `save` must not leave an older run with this teacher.
    (folder / "checkpoint.json").unlink(missing_ok=True)
    _write_tensors(folder / "teacher.safetensors", model.teacher.state_dict())


def save(
    checkpoint: Checkpoint, model: ReverseDistillation, optimizer: torch.optim.Optimizer
) -> None:
    """Write the run's state; a kill at any moment leaves the previous state or this one."""
    folder = checkpoint.settings.folder
    checkpoint.state_file = f"state-{checkpoint.step:08d}.safetensors"
    moments = {
        f"optimizer.{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    weights = {f"model.{name}": value for name, value in model.trainable_state().items()}
    _write_tensors(folder / checkpoint.state_file, weights | moments)
    record = {"format": FORMAT} | asdict(checkpoint)
    files.replace(folder / "checkpoint.json", json.dumps(record, indent=2).encode())
    for state in folder.glob("state-*"):  # the previous one, and what a kill or a run before left
        if state.name != checkpoint.state_file:
            state.unlink(missing_ok=True)


def read(folder: Path) -> Checkpoint:
    """The record of a run; raises TrainingError where there is none or it can't be read."""
    path = folder / "checkpoint.json"
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        if record.pop("format") != FORMAT:
            raise TrainingError(f"{path}: format is not {FORMAT}")
        settings = record.pop("settings")
        settings["image_size"] = tuple(settings["image_size"])
        teacher = TeacherWeights(**record.pop("teacher"))
        return Checkpoint(settings=Settings(**settings), teacher=teacher, **record)
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such checkpoint; run `training train` first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not a checkpoint: {error}") from error


def load_weights(checkpoint: Checkpoint, folder: Path, model: ReverseDistillation) -> None:
    """Fill a model with the checkpoint's teacher, bottleneck and decoder."""
    model.teacher.load_state_dict(_read_tensors(folder / "teacher.safetensors"))
    state = _read_tensors(folder / checkpoint.state_file)
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    missing = set(model.trainable_state()) ^ set(weights)
    if missing:
        raise TrainingError(f"{folder / checkpoint.state_file}: keys differ: {sorted(missing)}")
    model.load_state_dict(weights, strict=False)


def load_optimizer(checkpoint: Checkpoint, folder: Path, optimizer: torch.optim.Optimizer) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _read_tensors(folder / checkpoint.state_file).items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingError(f"{path}: can't be read: {error}") from error


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    files.replace(path, safetensors.torch.save(contiguous))
