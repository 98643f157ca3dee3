"""Many runs into one table: every combination once, resumed after a kill, told apart, averaged."""

import csv
import fcntl
import json
import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from training_fixtures import IMAGE_SIZE, PLANES, normal_picture, write_picture, write_teacher

from training.__main__ import main
from training.benchmark import IDLE, METHOD, benchmark, method, read_rows, runs, setup
from training.errors import TrainingError
from training.flags import read_plan
from training.settings import Settings


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> dict[str, list[object]]:
    """A plan of two architectures on twelve pictures, three of them with a white square."""
    folder = tmp_path_factory.mktemp("part")
    rng = np.random.default_rng(0)
    for index in range(9):
        write_picture(folder / f"part/train/good/{index}.png", normal_picture(rng))
    for index in range(3):
        write_picture(folder / f"part/test/good/{index}.png", normal_picture(rng))
        broken, mask = normal_picture(rng), np.zeros(IMAGE_SIZE, np.uint8)
        broken[20:40, 30:60] = 255
        mask[20:40, 30:60] = 255
        write_picture(folder / f"part/test/square/{index}.png", broken)
        write_picture(folder / f"part/ground_truth/square/{index}_mask.png", mask)
    teacher = write_teacher(folder / "teacher.safetensors")
    return {
        "data": [str(folder / "part")],
        "architecture": ["rd4ad", "sk-rd4ad"],
        "seed": [1],
        "backbone": ["resnet18"],
        "teacher_weights": [str(teacher)],
        "embedding_planes": [PLANES],
        "image_size": [IMAGE_SIZE],
        "epochs": [1],
        "batch_size": [4],
        "device": ["cpu"],
    }


@pytest.fixture(scope="module")
def finished(grid, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    benchmark([grid], out)
    return out


def test_every_run_has_a_row_with_all_that_repeats_it(finished, grid):
    rows = read_rows(finished)
    assert [row["method"] for row in rows] == ["rd4ad, batch size 4", "sk-rd4ad, batch size 4"]
    for row in rows:
        assert 0 <= row["image_auroc"] <= 1 and 0 <= row["aupro"] <= 1
        assert row["trained"] == 8 and row["held_out"] == 1 and len(row["scores"]) == 6
        assert row["settings"]["seed"] == 1 and row["settings"]["data"] == grid["data"][0]
        assert row["seconds"] > 0 and row["hardware"] and row["software"] and row["ended"]
        assert len(row["teacher"]) == len(row["data_fingerprint"]) == 64


def test_nothing_but_rows_and_tables_is_left_unless_asked_for(finished):
    left = {path.name for path in finished.iterdir()}
    assert left == {"rows.jsonl", "table.csv", "table.md", "locks", "models"}
    assert not list((finished / "models").iterdir())


def test_a_second_start_runs_only_what_is_new(finished, grid):
    before = (finished / "rows.jsonl").read_text()
    benchmark([grid | {"seed": [1, 2], "architecture": ["rd4ad"]}], finished)
    after = (finished / "rows.jsonl").read_text()
    assert after.startswith(before)
    assert [row["settings"]["seed"] for row in read_rows(finished)] == [1, 1, 2]
    # Left as it was for the tests around this one.
    (finished / "rows.jsonl").write_text(before)


def test_a_row_that_a_kill_has_torn_is_run_again(finished, grid, tmp_path):
    lines = (finished / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text(f"{lines[0]}\n{lines[1][:50]}")
    benchmark([grid], tmp_path)
    old, new = read_rows(finished), read_rows(tmp_path)
    assert [row["id"] for row in new] == [row["id"] for row in old]
    # On the CPU in float32 a run repeats itself to the bit.
    assert new[1]["scores"] == old[1]["scores"]


def test_an_interrupted_run_is_gone_on_with(grid, tmp_path):
    """Its checkpoint is there and finished, its bundle half written, its row missing."""
    first = benchmark([grid | {"architecture": ["rd4ad"]}], tmp_path, keep=True)
    (row,) = read_rows(tmp_path)
    saved = tmp_path / "models" / row["id"] / "checkpoint" / "checkpoint.json"
    seconds = json.loads(saved.read_text())["seconds"]
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "models" / row["id"] / "1" / "manifest.json").unlink()
    again = benchmark([grid | {"architecture": ["rd4ad"]}], tmp_path, keep=True)
    assert read_rows(tmp_path)[0]["scores"] == row["scores"]
    assert read_rows(tmp_path)[0]["seconds"] == seconds == row["seconds"]
    assert again == first


def test_a_run_that_fails_is_named_and_the_others_go_on(grid, tmp_path):
    """A rate at which the loss is no number, beside one at which it is."""
    plan = grid | {"architecture": ["rd4ad"], "lr": [1e30, 0.005], "epochs": [2]}
    for _ in range(2):  # a second start meets the first's failure
        with pytest.raises(TrainingError, match="1 of 2 runs failed: rd4ad, .*lr 1e[+]30.*loss is"):
            benchmark([plan], tmp_path)
        (row,) = read_rows(tmp_path)
        assert row["settings"]["lr"] == 0.005


def test_a_teacher_that_is_not_there_is_told_before_anything_is_trained(grid, tmp_path):
    plan = grid | {"teacher_weights": [*grid["teacher_weights"], "nope.safetensors"]}
    with pytest.raises(TrainingError, match="teacher weights nope.safetensors: no such file"):
        benchmark([plan], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_without_labelled_images_are_refused_before_anything_is_trained(grid, tmp_path):
    (tmp_path / "plain").mkdir()
    write_picture(tmp_path / "plain" / "one.png", normal_picture(np.random.default_rng(0)))
    with pytest.raises(TrainingError, match="plain: needs labelled test images"):
        benchmark([grid | {"data": [*grid["data"], str(tmp_path / "plain")]}], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_process_is_at_is_left_to_it(grid, tmp_path):
    (settings,) = runs([grid | {"architecture": ["rd4ad"]}], tmp_path / "models")
    (tmp_path / "locks").mkdir()
    with (tmp_path / "locks" / settings.name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        benchmark([grid | {"architecture": ["rd4ad"]}], tmp_path)
    assert not read_rows(tmp_path)


def test_grids_are_multiplied_out_and_a_run_in_two_of_them_is_one(grid):
    first = grid | {"architecture": ["rd4ad", "drd"], "seed": [1, 2]}
    planned = list(runs([first, grid], Path("models")))
    assert [(s.architecture, s.seed) for s in planned] == [
        *(("rd4ad", 1), ("rd4ad", 2), ("drd", 1), ("drd", 2), ("sk-rd4ad", 1))
    ]
    assert len({s.name for s in planned}) == 5


def test_presets_come_first_and_what_a_plan_says_wins(grid):
    plain = {k: v for k, v in grid.items() if k != "batch_size"}
    (drd,) = runs([plain | {"architecture": ["drd"]}], Path("models"))
    assert (drd.bottleneck, drd.batch_size, drd.refinement) == ("mfcf", 4, True)
    assert method(drd) == "drd"
    (changed,) = runs(
        [plain | {"architecture": ["drd"], "skips": ["gated"], "refinement": [False]}],
        Path("models"),
    )
    assert method(changed) == "drd, skips gated, refinement off"


def test_a_runs_name_depends_on_what_can_change_its_result_alone(grid):
    def name(**changes: object) -> str:
        (settings,) = runs(
            [grid | {"architecture": ["rd4ad"]} | {k: [v] for k, v in changes.items()}],
            Path("models"),
        )
        return settings.name

    assert name() == name(save_every=3) == name(feature_cache="off")
    # Said or left to the default: the same run.
    assert name() == name(lr=Settings.lr)
    assert len({name(), name(seed=2), name(epochs=2), name(skips="sk"), name(data="x")}) == 5
    assert name(data="x") == name(data="./x/") == name(data="y/../x")


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "f" * 64},
        {"data_fingerprint": "f" * 64},
        *({"settings": s} for s in ({"group": "(.)"}, {"device": "cuda"}, {"epochs": 9})),
    ],
)
def test_only_seeds_are_averaged(finished, tmp_path, change):
    """Other pictures, weights or settings under the same names have a table of their own."""
    row = read_rows(finished)[0]
    settings = row["settings"] | change.get("settings", {})
    other = row | change | {"settings": settings, "image_auroc": 0.5}
    again = row | {"settings": row["settings"] | {"seed": 9}}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, (row, again, other))))
    lines = [x for x in benchmark([], tmp_path).splitlines() if x.startswith("| rd4ad")]
    assert sorted(line.split(" | ")[1] for line in lines) == ["1", "2"]
    # Two tables of the same data have no mean over data.
    assert "Mean of" not in (tmp_path / "table.md").read_text()


def test_tables_give_the_mean_over_seeds_and_its_standard_error(finished, tmp_path):
    row = read_rows(finished)[0]
    rows = [
        row | {"settings": row["settings"] | {"seed": i}, "image_auroc": value, "aupro": None}
        for i, value in enumerate((0.8, 0.9, 0.7))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    markdown = benchmark([], tmp_path)
    assert "| rd4ad, batch size 4 | 3 | 0.800 ± 0.058 |" in markdown
    (told,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert float(told["image_auroc"]) == pytest.approx(0.8)
    assert float(told["image_auroc_standard_error"]) == pytest.approx(0.1 / 3**0.5)
    assert told["seeds"] == "3" and told["aupro"] == ""


def test_a_seed_counts_once_whatever_was_run_twice(finished, tmp_path):
    """By a path that is spelled in two ways, say: a second row says nothing of its own."""
    row = read_rows(finished)[0]
    rows = [row | {"id": f"run-{i}", "image_auroc": value} for i, value in enumerate((0.8, 0.9))]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    assert "| rd4ad, batch size 4 | 1 | 0.900 |" in benchmark([], tmp_path)


def test_every_setting_is_told_apart_by_some_part_of_a_table(finished):
    """Or a new setting's values would be averaged as if they were seeds."""
    row = read_rows(finished)[0]
    elsewhere = {"data", "layout", "category", "architecture", "seed"}
    elsewhere |= {"teacher_weights", "teacher_licence"}  # the row's digest tells
    for name in {field.name for field in fields(Settings)} - elsewhere - {*IDLE, *METHOD}:
        value = (32, 32) if name == "image_size" else "another"
        other = row | {"settings": row["settings"] | {name: value}}
        assert setup(other) != setup(row), name


def test_a_signal_stops_all_runs_also_in_the_last_step_of_one(grid, tmp_path):
    """The run is finished then, and saved; what is left is for the next start."""

    def interrupt(module, *_):
        if type(module).__name__ == "Objective":
            signal.raise_signal(signal.SIGTERM)

    plan = grid | {"batch_size": [16]}
    hook = torch.nn.modules.module.register_module_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            benchmark([plan], tmp_path)
    finally:
        hook.remove()
    assert not read_rows(tmp_path)
    (saved,) = (tmp_path / "models").glob("*/checkpoint/checkpoint.json")
    assert len(json.loads(saved.read_text())["losses"]) == 1
    benchmark([plan], tmp_path)
    assert len(read_rows(tmp_path)) == 2


def test_several_data_sets_have_a_mean_of_the_methods_that_all_of_them_have(finished, tmp_path):
    row = read_rows(finished)[0]
    rows = [
        row
        | {"data": place, "method": name, "image_auroc": value}
        | {"settings": row["settings"] | {"seed": seed}}
        for place, name, seed, value in [
            *(("one", "a", 1, 0.8), ("one", "a", 2, 0.9), ("two", "a", 1, 0.5)),
            *(("two", "a", 2, 0.7), ("two", "b", 1, 0.6)),
        ]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (mean,) = benchmark([], tmp_path).split("### ")[3:]
    assert mean.startswith("Mean of the 2 tables")
    # 0.85 ± 0.05 and 0.6 ± 0.1.
    assert "| a | 2 | 0.725 ± 0.056 |" in mean and "| b |" not in mean


def test_published_figures_stand_beside_those_of_the_same_category(finished, tmp_path):
    row = read_rows(finished)[0]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"data": "pcb1"}))
    published = benchmark([], tmp_path).split("### Published")[1]
    assert "| VisA pcb1 | sk-rd4ad |  | 0.996 | 0.937 | best epoch on the test set" in published
    assert "| VisA mean | sk-rd4ad |" in published and "MVTec" not in published
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert "Published" not in benchmark([], tmp_path)


def test_a_plan_has_grids_that_share_what_stands_at_its_top_and_flags_win(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'seed = [1, 2]\nbackbone = "resnet18"\n[[grid]]\ndata = "one"\nimage-size = [64, "64x96"]\n'
        '[[grid]]\ndata = ["two", "three"]\nrefinement = [true, false]\nepochs = 3\n'
    )
    first, second = read_plan(plan, {"epochs": [7]})
    assert first == {
        "seed": [1, 2],
        "backbone": ["resnet18"],
        "data": ["one"],
        "image_size": [(64, 64), (64, 96)],
        "epochs": [7],
    }
    assert second["refinement"] == [True, False] and second["epochs"] == [7]


@pytest.mark.parametrize(
    "text, words",
    [
        ("seed = ", "plan.toml: Expected|plan.toml: Invalid"),
        ("grid = 3", r"write \[\[grid\]\]"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(TrainingError, match=words):
        read_plan(tmp_path / "plan.toml", {})
    with pytest.raises(TrainingError, match="none.toml: .*No such file"):
        read_plan(tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    "text, words",
    [
        ("colour = 1", "colour is no setting of a run$"),
        ("consistency_rat = 1", "consistency_rat is no setting.*did you mean consistency_rate?"),
        ("[[grid]]\nimage_sizes = 64", "did you mean image_size?"),
        ("image_size = 100", "image-size: .*100: must be a multiple of 32"),
        ('skips = "most"', "most"),
        ("epochs = 0", "epochs: must be at least 1"),
    ],
)
def test_what_no_flag_accepts_no_plan_does(tmp_path, text, words):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(TrainingError, match=f"plan.toml: .*{words}"):
        read_plan(tmp_path / "plan.toml", {})


def test_the_command_line_spans_a_grid_and_all_categories_of_a_set(grid, tmp_path, capsys):
    """Both categories are the same pictures: two rows, told apart by their category."""
    root = tmp_path / "set"
    root.mkdir()
    for name in ("left", "right"):
        (root / name).symlink_to(grid["data"][0])
    words = ["benchmark", "--out", str(tmp_path / "out"), "--data", str(root), "--category", "all"]
    words += ["--backbone", "resnet18", "--teacher-weights", str(grid["teacher_weights"][0])]
    words += ["--image-size", "64x96", "--epochs", "1", "--batch-size", "4", "--refinement", "on"]
    words += ["--embedding-planes", str(PLANES), "--device", "cpu"]
    assert main(words) == 0
    assert [row["data"] for row in read_rows(tmp_path / "out")] == ["left", "right"]
    printed = capsys.readouterr().out
    assert "### left" in printed and "| sk-rd4ad, refinement on, batch size 4 | 1 |" in printed


def test_a_benchmark_without_data_is_refused(tmp_path, capsys):
    assert main(["benchmark", "--out", str(tmp_path), "--seed", "1"]) == 1
    assert "needs --data" in capsys.readouterr().err
