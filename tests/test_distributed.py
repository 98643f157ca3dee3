"""Three processes of a real torchrun: the same run as one, its interruption and its failure."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_fixtures import run_settings, torch

from training import checkpoint as checkpoints
from training.settings import ARCHITECTURES, Settings
from training.train import train

ROOT = Path(__file__).parent.parent
# One process and several round differently, and training lets that grow from step to step: so
# does a last bit changed in the first weights. Hence few and small steps.
LR = 0.00001
DRD = ARCHITECTURES["drd"] | {"architecture": "drd"}

# Starting takes a process far longer than such a run, so that the three do one after the other:
# [command line, what happens to the second process in its third step].
PROGRAM = """
import json, os, signal, sys
import torch
from training.__main__ import main
from training.errors import TrainingError

def interrupt(module, *_):
    global steps
    steps += type(module).__name__ == "Objective"
    if steps == 3 and os.environ["RANK"] == "1":
        if event == "signal":
            signal.raise_signal(signal.SIGTERM)
        if event == "error":
            raise TrainingError("this process alone has failed")

torch.nn.modules.module.register_module_forward_hook(interrupt)
for arguments, event in json.load(open(sys.argv[1])):
    steps = 0
    status = main(arguments)
    if os.environ["RANK"] == "0":
        print("status", status, flush=True)
sys.exit(status)
"""


def arguments(settings: Settings, *more: str) -> list[str]:
    return [
        *("train", "--device", "cpu", "--save-every", "1", "--architecture", settings.architecture),
        *("--data", settings.data, "--name", settings.name, "--models", settings.models),
        *("--teacher-weights", settings.teacher_weights, "--backbone", settings.backbone),
        *("--embedding-planes", str(settings.embedding_planes), "--lr", str(settings.lr)),
        *("--image-size", *(str(side) for side in settings.image_size)),
        *("--epochs", str(settings.epochs), "--batch-size", str(settings.batch_size), *more),
    ]


@dataclass
class Runs:
    """What the three processes were given, made and said."""

    stopped: Settings
    drd: Settings
    failed: Settings
    status: int
    output: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("processes")
    changes = {"models": str(folder / "many"), "lr": LR}
    # Eight pictures: batches of 5 and 3. Six: of 4 and 2, of which one process gets nothing.
    stopped = run_settings(folder / "a", 9, name="stopped", batch_size=5, epochs=2, **changes)
    drd = run_settings(folder / "b", 7, name="drd", **DRD | changes)
    failed = replace(stopped, name="failed")
    train(drd)  # its first epoch, by one process
    shutil.copytree(drd.models, folder / "one")
    plan = [
        (arguments(replace(drd, epochs=2), "--resume"), ""),
        (arguments(stopped), "signal"),
        (arguments(failed), "error"),
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
        + [str(folder / "program.py"), str(folder / "plan.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=180)[0]
    finally:
        process.terminate()  # torchrun ends its processes; killed, it would leave them behind
    yield Runs(stopped, drd, failed, process.returncode, output)


def assert_same_run(settings: Settings, expected: Settings) -> None:
    """The loss of every epoch to 1e-3, and nearly the weights, statistics and gradients."""
    one, other = (checkpoints.read(s.folder) for s in (expected, settings))
    assert one.step == other.step and one.trained == other.trained
    assert other.losses == pytest.approx(one.losses, abs=1e-3)
    tensors = load_file(expected.folder / one.state_file)
    others = load_file(settings.folder / other.state_file)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        distance = torch.linalg.vector_norm(tensor.float() - others[name].float())
        assert distance <= 0.05 * torch.linalg.vector_norm(tensor.float()), name


def test_a_signal_to_one_process_stops_all_after_the_same_step(runs):
    saved = checkpoints.read(runs.stopped.folder)
    assert saved.step == 3 and saved.steps_per_epoch == 2
    assert runs.output.count("stopped at epoch 1 of 2") == 1, runs.output
    assert runs.output.count("status 130") == 1


def test_what_several_processes_began_one_ends_as_if_alone(runs, tmp_path):
    """Batches of 5 and 3, the first of which three processes can't share equally."""
    alone = replace(runs.stopped, models=str(tmp_path / "alone"))
    train(alone)
    assert train(runs.stopped, resume=True).finished
    assert_same_run(runs.stopped, alone)


def test_what_one_process_began_several_end_as_if_alone_though_one_gets_no_image(runs, tmp_path):
    """DRD, whose pseudo-anomalies are drawn by chance."""
    assert runs.output.count("trained 2 epochs") == runs.output.count("status 0") == 1, runs.output
    alone = replace(runs.drd, models=str(tmp_path / "alone"), epochs=2)
    train(alone)
    assert_same_run(replace(runs.drd, epochs=2), alone)


def test_an_error_of_one_process_ends_all_and_is_told_once(runs):
    assert runs.status == 1
    assert runs.output.count("error: this process alone has failed") == 1, runs.output
    assert "RuntimeError" not in runs.output
    assert checkpoints.read(runs.failed.folder).step == 2


def test_only_one_process_speaks(runs):
    assert runs.output.count("training on 8 normal images, 1 held out") == 2, runs.output
