"""Speed of a training step beside the recipe as published, ingredient by ingredient.

    OMP_NUM_THREADS=1 taskset --cpu-list 0 python -m bench.training [--backbone resnet18] [--json F]

The published code of SK-RD4AD (and of RD4AD, but for the second loss) sends every image through the
whole teacher, layer4 too, with gradients that nobody uses, and evaluates the loss twice, each time
with its consistency term twice. Both ways train our bottleneck and decoder on the same drawn
images from memory, so that reading pictures, where ours differ most, is left out. The recipes take
turns in short blocks and are compared within each round, as other work on the machine slows all
alike; before that, all must give the same loss.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from training import files
from training.benchmark import hardware
from training.features import TeacherFeatures, teacher_features
from training.losses import Objective, consistency_loss, distillation_loss
from training.model import Teacher, from_settings
from training.settings import BACKBONES, Settings
from training.train import choose_device

IMAGES = 64
EPOCHS = 200  # published; what filling the cache is divided by
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of the loss; features are kept as float16


@dataclass(frozen=True)
class Recipe:
    name: str
    whole_teacher: bool = False  # with layer4 and gradients
    losses_twice: bool = False
    channels_last: bool = True
    kept: bool = True  # the teacher's features, from the first epoch on
    precision: str = "float32"


PUBLISHED = Recipe(
    "as published", whole_teacher=True, losses_twice=True, channels_last=False, kept=False
)
OURS = Recipe("+ features kept: the default on a CPU")
RECIPES = (
    PUBLISHED,
    replace(PUBLISHED, name="+ losses once", losses_twice=False),
    replace(OURS, name="+ teacher to layer3, no gradient", channels_last=False, kept=False),
    replace(OURS, name="+ channels_last", kept=False),
    OURS,
    replace(OURS, name="+ bfloat16: the default on CUDA", precision="bfloat16"),
)


class WholeTeacher(nn.Module):
    """torchvision's ResNet as the published code runs it: layer4 too, parameters with gradients."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.network = getattr(torchvision.models, backbone)()
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        e1 = net.layer1(x)
        e2 = net.layer2(e1)
        e3 = net.layer3(e2)
        net.layer4(e3)
        return [e1, e2, e3]

    def share(self, teacher: Teacher) -> None:
        """Give ours the same weights."""
        state, wanted = self.network.state_dict(), teacher.weights
        teacher.network.model.load_state_dict({key: state[key] for key in wanted})


@dataclass
class Trainee:
    """A network under training, as one memory format lays it out."""

    objective: Objective
    optimizer: torch.optim.Optimizer


class Bench:
    def __init__(self, settings: Settings, features: TeacherFeatures, whole: WholeTeacher) -> None:
        self.settings, self.features, self.whole = settings, features, whole
        self.device, self.images = features.device, features.images
        self.computed = TeacherFeatures(features.teacher, self.images, self.device, torch.float32)
        self.trainees = {last: self._trainee(last) for last in (False, True)}

    def _trainee(self, channels_last: bool) -> Trainee:
        torch.manual_seed(0)
        model = from_settings(self.settings).to(self.device).train()
        self.whole.share(model.teacher)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=self.settings.lr, betas=(0.5, 0.999))
        return Trainee(Objective(model, self.settings), optimizer)

    def loss(self, recipe: Recipe, indices: np.ndarray) -> Tensor:
        objective = self.trainees[recipe.channels_last].objective
        pixels = torch.from_numpy(self.images[indices]).to(self.device)
        precision = getattr(torch, recipe.precision)
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            if recipe.channels_last:
                kept = self.features if recipe.kept else self.computed
                return self._ours(objective, pixels, kept[indices])
            teacher = objective.model.teacher
            normalised = teacher.normalise(pixels).contiguous()
            if not recipe.whole_teacher:
                return self._ours(objective, pixels, teacher(normalised))
            e = self.whole(normalised)
            d = objective.model.restore(e)
            if not recipe.losses_twice:
                return self._published_loss(e, d)
            for _ in range(2):
                loss = self._published_loss(e, d)
                consistency_loss(e, d)
            return loss

    @staticmethod
    def _ours(objective: Objective, pixels: Tensor, e: list[Tensor]) -> Tensor:
        loss: Tensor = objective(pixels, e, np.random.default_rng(0))
        return loss

    def _published_loss(self, e: list[Tensor], d: list[Tensor]) -> Tensor:
        return distillation_loss(e, d) + self.settings.consistency_rate * consistency_loss(e, d)

    def step(self, recipe: Recipe, indices: np.ndarray) -> None:
        optimizer = self.trainees[recipe.channels_last].optimizer
        loss = self.loss(recipe, indices)
        optimizer.zero_grad()  # not the whole teacher's gradients: the published code lets them add
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # waits for a GPU


def differences(bench: Bench, indices: np.ndarray) -> list[str]:
    """What is wrong with recipes whose loss isn't the published one, at the same weights."""
    expected = bench.loss(PUBLISHED, indices).item()
    losses = {recipe.name: (bench.loss(recipe, indices).item(), recipe) for recipe in RECIPES}
    return [
        f"{name}: loss {loss}, as published {expected}"
        for name, (loss, recipe) in losses.items()
        if not abs(loss / expected - 1) <= TOLERANCE[recipe.precision]
    ]


def clock(device: torch.device) -> Callable[[], float]:
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def measure(bench: Bench, batch_size: int, rounds: int, steps: int) -> list[list[float]]:
    """Seconds per image of every recipe in every round, after a step each to warm up."""
    rng = np.random.default_rng(0)
    now = clock(bench.device)
    seconds: list[list[float]] = [[] for _ in RECIPES]
    for number in range(rounds + 1):
        for recipe, taken in zip(RECIPES, seconds, strict=True):
            batches = [rng.permutation(IMAGES)[:batch_size] for _ in range(steps if number else 1)]
            began = now()
            for indices in batches:
                bench.step(recipe, indices)
            if number:
                taken.append((now() - began) / (steps * batch_size))
    return seconds


def rows(seconds: list[list[float]]) -> list[dict[str, Any]]:
    """Per recipe images/s and how many times as fast as published: the median over rounds."""
    found = []
    for recipe, taken in zip(RECIPES, seconds, strict=True):
        ratios = [first / s for first, s in zip(seconds[0], taken, strict=True)]
        found.append(
            asdict(recipe)
            | {
                "images_per_s": 1 / statistics.median(taken),
                "times_as_fast": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where a recipe computes something else."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="resnet18", help="default: resnet18")
    add("--size", type=int, default=256, help="height and width of an image (default: 256)")
    add("--batch-size", type=int, default=16, help=f"at most {IMAGES} (default: 16)")
    add("--rounds", type=int, default=5, help="turns of every recipe (default: 5)")
    add("--steps", type=int, default=2, help="steps in a turn (default: 2)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--json", type=Path, metavar="FILE", help="write everything here as well")
    arguments = parser.parse_args(argv)

    device = choose_device(arguments.device)
    size = (arguments.size, arguments.size)
    settings = Settings("drawn", "bench", backbone=arguments.backbone, image_size=size)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *size, 3), np.uint8)
    torch.manual_seed(0)
    whole = WholeTeacher(arguments.backbone).to(device)
    teacher = Teacher(arguments.backbone)
    whole.share(teacher)
    teacher.to(device).to(memory_format=torch.channels_last)
    now = clock(device)
    began = now()
    with (
        tempfile.TemporaryDirectory() as folder,
        teacher_features(
            teacher,
            images,
            device,
            torch.float32,
            place="auto",
            memory_gb=None,
            folder=Path(folder),
        ) as features,
    ):
        filling = (now() - began) / IMAGES
        bench = Bench(settings, features, whole)
        wrong = differences(bench, np.arange(arguments.batch_size))
        if wrong:
            print("\n".join(wrong), file=sys.stderr)
            return 1
        table = rows(measure(bench, arguments.batch_size, arguments.rounds, arguments.steps))

    print(
        f"| SK-RD4AD, {arguments.backbone}, {size[0]} x {size[1]}, batch {arguments.batch_size} ",
        end="",
    )
    print("| images/s | times as fast | least to most |")
    print("|---|---|---|---|")
    for row in table:
        print(f"| {row['name']} | {row['images_per_s']:.3g} | {row['times_as_fast']:.2f} ", end="")
        print(f"| {row['least']:.2f} to {row['most']:.2f} |")
    share = filling / EPOCHS * table[RECIPES.index(OURS)]["images_per_s"]
    time_of = "processor" if now is time.process_time else "wall"
    print(
        f"\n{hardware(device)}; torch {torch.__version__}; {date.today()}; {time_of} time, medians "
        f"of {arguments.rounds} rounds of {arguments.steps} steps. Not counted: features are "
        f"computed once, at {1 / filling:.3g} images/s, which adds {share:.2%} to {EPOCHS} epochs."
    )
    if arguments.json:
        record = {
            "settings": {k: v for k, v in vars(arguments).items() if k != "json"},
            "hardware": hardware(device),
            "torch": torch.__version__,
            "date": str(date.today()),
            "time": time_of,
            "features_s_per_image": filling,
            "recipes": table,
        }
        files.write_json(arguments.json, record, "--json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
