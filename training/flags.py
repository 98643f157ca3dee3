"""The flags of a run's settings: one value each for `train`, several for `benchmark`."""

import argparse
import difflib
import tomllib
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from service.devices import Device, Precision
from training.errors import TrainingError
from training.settings import (
    ARCHITECTURES,
    BACKBONES,
    LAYOUTS,
    Bottleneck,
    FeatureCache,
    Loss,
    Schedule,
    Settings,
    Skips,
)


def image_size(sides: Sequence[int], what: str = "--image-size") -> tuple[int, int]:
    """(height, width) of one or two sides; each a multiple of 32, as the networks need."""
    if len(sides) > 2:
        raise TrainingError(f"{what} takes a height and a width, got {len(sides)} numbers")
    for side in sides:
        if side % 32 or not 32 <= side <= 4096:
            raise TrainingError(f"{what} {side}: must be a multiple of 32 from 32 to 4096")
    return sides[0], sides[-1]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value:g}")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value:g}")
    return value


DEFAULT = {field.name: field.default for field in fields(Settings)}
PRESET = "default: the architecture's"
# Flag -> what argparse wants to know of it, for one value.
FLAGS: dict[str, dict[str, Any]] = {
    "--group": {
        "metavar": "REGEX",
        "help": "images whose path's first match is equal stay together",
    },
    "--architecture": {"choices": ARCHITECTURES, "help": "default: sk-rd4ad"},
    "--skips": {"choices": get_args(Skips), "help": PRESET},
    "--bottleneck": {"choices": get_args(Bottleneck), "help": PRESET},
    "--loss": {"choices": get_args(Loss), "help": PRESET},
    "--consistency-rate": {"type": rate, "metavar": "RATE", "help": PRESET},
    "--pseudo-anomalies": {"action": BooleanOptionalAction, "help": PRESET},
    "--refinement": {"action": BooleanOptionalAction, "help": PRESET},
    "--backbone": {
        "metavar": "NAME",
        "help": f"{', '.join(BACKBONES)}, or another CNN of timm (default: {DEFAULT['backbone']})",
    },
    "--teacher-weights": {"metavar": "hub|FILE", "help": "ImageNet weights by timm, or a file"},
    "--teacher-licence": {"metavar": "TEXT", "help": "recorded where the weights state none"},
    "--embedding-planes": {
        "type": positive,
        "metavar": "N",
        "help": "default: twice the teacher's",
    },
    "--image-size": {
        "type": positive,
        "nargs": "+",
        "metavar": ("H", "W"),
        "help": "default: 256 256",
    },
    "--epochs": {"type": positive, "help": f"default: {DEFAULT['epochs']}"},
    "--batch-size": {"type": positive, "help": f"default: {DEFAULT['batch_size']}; DRD's: 4"},
    "--lr": {"type": positive_number, "help": f"default: {DEFAULT['lr']}"},
    "--schedule": {
        "choices": get_args(Schedule),
        "help": "of the learning rate; cosine ends at 0 (default: constant, as published)",
    },
    "--weight-decay": {"type": rate, "help": "default: 0; DRD's: 1e-5"},
    "--seed": {"type": natural, "help": f"default: {DEFAULT['seed']}"},
    "--device": {"choices": ("auto", "cuda", "cpu"), "help": "default: auto"},
    "--precision": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "help": "default: float32 on the CPU, bfloat16 on CUDA (float16 where it lacks that)",
    },
    "--feature-cache": {
        "choices": get_args(FeatureCache),
        "help": "where the teacher's features are kept once computed (default: auto, where they "
        "fit)",
    },
    "--feature-memory-gb": {
        "type": positive_number,
        "metavar": "GB",
        "help": "memory they may take (default: half of what is free)",
    },
    "--save-every": {
        "type": positive,
        "metavar": "EPOCHS",
        "help": f"default: {DEFAULT['save_every']}",
    },
    "--strict": {
        "action": "store_true",
        "help": "fail on an unreadable image instead of skipping it",
    },
}


def add_data(parser: argparse.ArgumentParser, what: str, *, required: bool = True) -> None:
    """The flags of every command that reads a data set."""
    add = parser.add_argument
    add("--data", type=Path, required=required, metavar="DIR", help=what)
    add("--category", metavar="NAME", help="which one, where DIR holds several")
    add("--layout", choices=LAYOUTS, help="how DIR is laid out (default: found by its folders)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a bundle is scored, as the service's settings of these names."""
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The settings of one run."""
    what = "a data set, or any folder of normal images (with --resume: if it was moved)"
    add_data(parser, what, required=False)
    parser.add_argument("--name", required=True, help="the model's name: a product or a view")
    parser.add_argument("--models", help="folder of all models (default: models)")
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)


def add_axes(parser: argparse.ArgumentParser) -> None:
    """The settings of many runs: every flag of a run, with one or several values."""
    axes: dict[str, dict[str, Any]] = {
        "--data": {"metavar": "DIR", "help": "folders of data sets"},
        "--category": {"metavar": "NAME", "help": "or `all` of a data set's"},
        "--layout": {"choices": LAYOUTS},
    }
    for flag, options in (axes | FLAGS).items():
        told = {k: v for k, v in options.items() if k in ("type", "choices", "metavar", "help")}
        if "action" in options:
            told |= {"type": _switch, "metavar": "on|off"}
        if flag == "--image-size":
            told |= {"type": _size, "metavar": "SIDE|HxW"}
        if isinstance(options.get("choices"), dict):
            told["choices"] = list(options["choices"])
        parser.add_argument(flag, nargs="+", default=argparse.SUPPRESS, **told)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text}")
    return text == "on"


def _size(text: str) -> tuple[int, int]:
    try:
        return image_size([positive(side) for side in text.split("x")])
    except TrainingError as error:  # argparse says which flag, and ends
        raise argparse.ArgumentTypeError(str(error)) from None


def read_plan(file: Path, given: dict[str, list[Any]]) -> list[dict[str, list[Any]]]:
    """Grids of a plan in TOML: settings by their flags' names, each a value or a list.

    Settings at the top hold for every [[grid]]; `given` holds for all and wins. Raises
    TrainingError for a file that can't be read, and for what no flag would accept.
    """
    try:
        common = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"plan {file}: {error}") from error
    grids = common.pop("grid", [{}])
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise TrainingError(f"plan {file}: write [[grid]] for each grid")
    # A key may be spelled as its flag is.
    common, *grids = (
        {name.replace("-", "_"): value for name, value in settings.items()}
        for settings in (common, *grids)
    )
    parser = _PlanParser(f"plan {file}", add_help=False, allow_abbrev=False)
    add_axes(parser)
    known = [action.dest for action in parser._actions]
    for name in {name for grid in (common, *grids) for name in grid if name not in known}:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise TrainingError(f"plan {file}: {name} is no setting of a run{hint}")
    return [vars(parser.parse_args(_words(common | grid))) | given for grid in grids]


class _PlanParser(argparse.ArgumentParser):
    """Ends with our error instead of a usage that speaks of flags nobody typed."""

    def error(self, message: str) -> NoReturn:
        raise TrainingError(f"{self.prog}: {message.removeprefix('argument --')}")


def _words(settings: dict[str, Any]) -> list[str]:
    """A plan's settings as a command line says them."""
    words = []
    for name, value in settings.items():
        words.append(f"--{name.replace('_', '-')}")
        for one in value if isinstance(value, list) else [value]:
            words.append({True: "on", False: "off"}[one] if isinstance(one, bool) else str(one))
    return words
