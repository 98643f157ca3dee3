"""The measurement of training speed: all recipes compute the same, and the table is whole."""

import json

import numpy as np
import pytest
from training_fixtures import torch

from bench.training import OURS, PUBLISHED, RECIPES, WholeTeacher, main, rows
from training.model import Teacher

SMALL = ["--size", "64", "--batch-size", "2", "--rounds", "1", "--steps", "1", "--device", "cpu"]


def test_the_published_teacher_sees_what_ours_sees_and_has_gradients():
    whole, ours = WholeTeacher("resnet18"), Teacher("resnet18")
    whole.share(ours)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for theirs, mine in zip(whole(images), ours(images), strict=True):
        torch.testing.assert_close(theirs, mine)
        assert theirs.requires_grad and not mine.requires_grad


def test_the_command_measures_every_recipe(capsys, tmp_path):
    """It ends with 1 where a recipe's loss differs from the published one's."""
    file = tmp_path / "new" / "bench.json"
    assert main([*SMALL, "--json", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in printed[2:8]] == [r.name for r in RECIPES]
    record = json.loads(file.read_text())
    assert all(row["images_per_s"] > 0 for row in record["recipes"])
    assert record["settings"]["batch_size"] == 2


def test_recipes_are_compared_within_a_round():
    """A machine that is three times as slow in the second round changes no ratio."""
    seconds = [[1.0, 3.0, 1.0], *[[0.5, 1.5, 0.25]] * (len(RECIPES) - 1)]
    table = rows(seconds)
    assert RECIPES[0] == PUBLISHED and table[0]["times_as_fast"] == 1
    ours = table[RECIPES.index(OURS)]
    assert ours["images_per_s"] == pytest.approx(2)
    assert (ours["times_as_fast"], ours["least"], ours["most"]) == (2, 2, 4)
    assert np.isfinite([row["most"] for row in table]).all()
