"""Training runs: what is learnt, what is saved, and that an interruption changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_fixtures import (
    IMAGE_SIZE,
    PLANES,
    normal_picture,
    run_settings,
    torch,
    write_normal_pictures,
    write_picture,
)

from service import image
from training import checkpoint as checkpoints
from training import files
from training.__main__ import main
from training.errors import TrainingError
from training.export import export
from training.train import batch_slices, choose_device, choose_precision, steps, train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settings(tmp_path):
    """Seven pictures to train on in batches of 3, 3 and none (a last single one is left out)."""
    return run_settings(tmp_path)


def weights(settings: checkpoints.Settings) -> dict[str, "torch.Tensor"]:
    """Every tensor of the run's state: bottleneck, decoder and the optimizer's moments."""
    return load_file(settings.folder / checkpoints.read(settings.folder).state_file)


def same(a: dict[str, "torch.Tensor"], b: dict[str, "torch.Tensor"]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def arguments(settings: checkpoints.Settings, *more: str) -> list[str]:
    """The command line of a run."""
    return [
        *("train", "--data", settings.data, "--name", settings.name, "--models", settings.models),
        *("--teacher-weights", settings.teacher_weights, "--backbone", settings.backbone),
        *("--embedding-planes", str(settings.embedding_planes), "--device", "cpu"),
        *("--image-size", *(str(side) for side in settings.image_size)),
        *("--epochs", str(settings.epochs), "--batch-size", str(settings.batch_size)),
        *("--save-every", str(settings.save_every), *more),
    ]


# What is learnt


def test_the_loss_falls(settings):
    run = train(replace(settings, epochs=6, lr=0.002))
    assert run.finished and len(run.losses) == 6
    assert run.losses[-1] < 0.8 * run.losses[0]


@pytest.mark.parametrize("skips", ["none", "gated"])
def test_every_kind_of_skip_trains(settings, skips):
    run = train(replace(settings, skips=skips, consistency_rate=0.0))
    assert run.finished and np.isfinite(run.losses).all()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(settings, tmp_path):
    again = replace(settings, models=str(tmp_path / "again"))
    other = replace(settings, models=str(tmp_path / "other"), seed=112)
    for each in (settings, again, other):
        train(each)
    assert same(weights(settings), weights(again))
    key = "model.decoder.stage1.0.body.0.weight"
    assert not torch.equal(weights(settings)[key], weights(other)[key])


def test_the_teacher_is_the_files_and_is_not_trained(settings):
    run = train(settings)
    given = load_file(settings.teacher_weights)
    kept = load_file(settings.folder / "teacher.safetensors")
    assert same({k.removeprefix("network.model."): v for k, v in kept.items()}, given)
    assert run.teacher.sha256 == image.digest(Path(settings.teacher_weights).read_bytes())
    assert run.teacher.licence == "CC0-1.0"


def test_the_consistency_term_changes_what_is_learnt(settings, tmp_path):
    without = replace(settings, models=str(tmp_path / "without"), consistency_rate=0.0)
    train(settings)
    train(without)
    assert not same(weights(settings), weights(without))


def test_a_loss_that_is_no_number_is_an_error_and_is_not_saved(settings):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d.*lower --lr"):
        train(replace(settings, lr=1e30, epochs=5))
    assert all(torch.isfinite(v).all() for v in weights(settings).values())


# Batches


@pytest.mark.parametrize(
    "count, batch_size, sizes",
    [(7, 3, [3, 3]), (8, 3, [3, 3, 2]), (2, 16, [2]), (1, 16, [1]), (17, 16, [16]), (2, 1, [1, 1])],
)
def test_a_last_batch_of_one_image_is_left_out(count, batch_size, sizes):
    assert [s.stop - s.start for s in batch_slices(count, batch_size)] == sizes


def test_every_epoch_has_every_image_once_in_its_own_order(settings):
    batches = list(steps(8, replace(settings, epochs=3), 0))
    epochs = [np.concatenate(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("first", range(10))
def test_a_resumed_run_sees_the_batches_that_were_left(settings, first):
    settings = replace(settings, epochs=3)
    left = list(steps(8, settings, 0))[first:]
    for actual, expected in zip(steps(8, settings, first), left, strict=True):
        assert (actual == expected).all()


# Interruption


def interrupted(settings: checkpoints.Settings, number: int) -> tuple[int, str]:
    """Exit status and output of a real run that got a signal after its first saved epoch."""
    record = settings.folder / "checkpoint.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "training", *arguments(settings)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not record.exists() or json.loads(record.read_text())["step"] < 1:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)  # between two looks at the file, not for something to happen
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output


def test_a_run_that_was_interrupted_and_resumed_ends_with_the_weights_of_one_that_was_not(tmp_path):
    settings = run_settings(tmp_path, 12, epochs=20, save_every=1)
    assert main(arguments(settings)) == 0
    unbroken = weights(settings)
    assert any(k.startswith("optimizer.") for k in unbroken)
    for number in (signal.SIGTERM, signal.SIGKILL):
        broken = replace(settings, models=str(tmp_path / number.name))
        status, output = interrupted(broken, number)
        saved = checkpoints.read(broken.folder)
        assert 0 < saved.step < 20 * saved.steps_per_epoch, "the signal came too late to tell"
        assert not same(weights(broken), unbroken)
        if number == signal.SIGKILL:
            assert status == -signal.SIGKILL
        else:
            assert status == 130
            assert f"stopped at epoch {saved.epoch} of 20" in output and "--resume" in output
        assert main(arguments(broken, "--resume")) == 0
        resumed = checkpoints.read(broken.folder)
        assert same(weights(broken), unbroken), number.name
        assert resumed.losses == checkpoints.read(settings.folder).losses
        assert [p.name for p in broken.folder.glob("state-*")] == [resumed.state_file]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_there(tmp_path, schedule):
    """Stopped for certain within an epoch: SIGINT arrives while its second batch is computed."""
    whole = run_settings(tmp_path, 12, epochs=2, schedule=schedule, models=str(tmp_path / "whole"))
    train(whole)
    broken = replace(whole, models=str(tmp_path / "broken"))
    forwards = 0

    def interrupt(module, *_):
        nonlocal forwards
        if type(module).__name__ == "Objective":
            forwards += 1
            if forwards == 2:
                signal.raise_signal(signal.SIGINT)

    hook = torch.nn.modules.module.register_module_forward_hook(interrupt)
    try:
        run = train(broken)
    finally:
        hook.remove()
    assert run.step == 2 < run.steps_per_epoch and not run.finished
    assert checkpoints.read(broken.folder).loss_sum > 0
    assert train(broken, resume=True).finished
    assert same(weights(broken), weights(whole))
    assert checkpoints.read(broken.folder).losses == checkpoints.read(whole.folder).losses


def test_a_finished_run_can_go_on_for_more_epochs(tmp_path):
    longer = run_settings(tmp_path, epochs=3, models=str(tmp_path / "longer"))
    train(longer)
    shorter = replace(longer, epochs=2, models=str(tmp_path / "shorter"))
    train(shorter)
    assert not same(weights(shorter), weights(longer))
    assert main(arguments(replace(shorter, epochs=3), "--resume")) == 0
    assert same(weights(shorter), weights(longer))
    assert checkpoints.read(shorter.folder).settings.epochs == 3


def test_resuming_a_finished_run_computes_and_changes_nothing(settings, monkeypatch):
    train(settings)
    before = {p.name: p.read_bytes() for p in settings.folder.iterdir()}
    monkeypatch.delattr("training.train.teacher_features")
    assert train(settings, resume=True).finished
    assert {p.name: p.read_bytes() for p in settings.folder.iterdir()} == before


def test_a_run_that_another_process_is_at_is_refused(settings, capsys):
    """Or each would delete the other's last state."""
    train(settings)
    with files.claimed(settings.folder) as free:
        assert free
        assert main(arguments(settings, "--overwrite")) == 1
    assert "part/checkpoint: another process is training this run" in capsys.readouterr().err
    assert train(settings, resume=True).finished


def test_a_run_interrupted_before_its_first_step_says_how_to_go_on(settings, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.train.teacher_features", interrupt)
    assert main(arguments(settings)) == 130
    told = capsys.readouterr().out
    assert "stopped at epoch 0 of 1" in told and "--resume" in told
    monkeypatch.undo()
    assert train(settings, resume=True).finished


def test_what_auto_found_is_recorded_and_kept_on_resume(settings):
    run = train(settings)
    assert (run.settings.precision, run.settings.layout) == ("float32", "folder")
    again = arguments(settings, "--precision", "auto", "--layout", "auto", "--resume")
    assert main([*again, "--epochs", "2"]) == 0
    assert checkpoints.read(settings.folder).settings.precision == "float32"


def test_signals_work_as_before_after_a_run(settings):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(settings)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Resuming and starting over


@pytest.mark.parametrize(
    "flag, value, says",
    [
        ("--lr", "0.1", "lr 0.1 contradicts the run's 0.005"),
        ("--seed", "5", "seed 5 contradicts the run's 111"),
        ("--batch-size", "4", "batch_size 4 contradicts the run's 3"),
        ("--architecture", "rd4ad", "architecture rd4ad contradicts the run's sk-rd4ad"),
        ("--skips", "gated", "skips gated contradicts the run's sk"),
        ("--embedding-planes", "64", f"embedding_planes 64 contradicts the run's {PLANES}"),
        ("--image-size", "96", "image_size (96, 96) contradicts the run's (64, 96)"),
        ("--teacher-weights", "hub", "teacher_weights hub contradicts the run's "),
        ("--layout", "folder", "layout folder contradicts the run's mvtec"),
        ("--category", "a", "category a contradicts the run's "),
        ("--group", "(.)", "group (.) contradicts the run's "),
    ],
)
def test_resume_refuses_a_setting_that_contradicts_the_run(tmp_path, capsys, flag, value, says):
    settings = run_settings(tmp_path, layout="mvtec")
    record = checkpoints.Checkpoint(settings, None, {}, {}, "0" * 64)
    write_record(record)
    base = ["train", "--data", settings.data, "--name", "part", "--models", settings.models]
    assert main([*base, "--resume", flag, value]) == 1
    assert f"error: --resume: {says}" in capsys.readouterr().err


def write_record(record: checkpoints.Checkpoint) -> None:
    record.settings.folder.mkdir(parents=True)
    content = {"format": checkpoints.FORMAT} | asdict(record)
    content["teacher"] = {"origin": "x", "sha256": "0" * 64, "licence": "y"}
    (record.settings.folder / "checkpoint.json").write_text(json.dumps(content))


def test_an_existing_run_is_refused_unless_overwritten(settings):
    first = train(settings)
    before = weights(settings)
    with pytest.raises(TrainingError, match=r"holds a run already: --resume.*--overwrite"):
        train(replace(settings, seed=7))
    assert same(weights(settings), before)
    again = train(replace(settings, seed=7), overwrite=True)
    assert not same(weights(settings), before)
    assert again.step == first.step and again.held_out != first.held_out


def test_overwriting_a_longer_run_leaves_nothing_of_it(settings):
    train(replace(settings, epochs=2))
    run = train(settings, overwrite=True)
    expected = {"checkpoint.json", "teacher.safetensors", run.state_file}
    assert {p.name for p in settings.folder.iterdir()} == expected


def test_resume_refuses_images_that_changed_and_names_them(settings):
    run = train(settings)
    changed, missing = list(run.trained)[1], list(run.trained)[2]
    write_picture(Path(settings.data) / changed, normal_picture(np.random.default_rng(99)))
    with pytest.raises(TrainingError, match=f"changed since the run began: {changed}"):
        train(replace(settings, epochs=2), resume=True)
    (Path(settings.data) / missing).unlink()
    with pytest.raises(TrainingError, match=missing):
        train(replace(settings, epochs=2), resume=True)


def test_resume_finds_data_and_models_that_moved(settings, tmp_path):
    whole = replace(settings, epochs=2, models=str(tmp_path / "whole"))
    train(whole)
    train(settings)
    shutil.move(settings.data, tmp_path / "moved")
    shutil.move(settings.models, tmp_path / "elsewhere")
    moved = ["--data", str(tmp_path / "moved"), "--models", str(tmp_path / "elsewhere")]
    assert main(["train", "--name", "part", *moved, "--epochs", "2", "--resume"]) == 0
    assert same(weights(replace(settings, models=str(tmp_path / "elsewhere"))), weights(whole))


def test_resume_without_a_run_is_an_error(settings, capsys):
    assert main(arguments(settings, "--resume")) == 1
    assert "no such checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "settings": {"colour": "red"}}']
)
def test_a_damaged_record_is_an_error_that_names_the_file(settings, content):
    settings.folder.mkdir(parents=True)
    (settings.folder / "checkpoint.json").write_text(content)
    with pytest.raises(TrainingError, match=r"checkpoint\.json"):
        checkpoints.read(settings.folder)


def test_a_damaged_or_foreign_state_is_an_error_that_names_the_file(settings):
    run = train(settings)
    path = settings.folder / run.state_file
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "stage1.0.body.0" not in k}, path)
    with pytest.raises(TrainingError, match=f"{run.state_file}: keys differ.*stage1"):
        train(replace(settings, epochs=2), resume=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=f"{run.state_file}: can't be read"):
        train(replace(settings, epochs=2), resume=True)


# What is saved


def test_held_out_images_are_recorded_and_never_trained_on(settings):
    run = checkpoints.read(train(settings).settings.folder)
    assert len(run.held_out) == 1 and len(run.trained) == 7
    assert not set(run.held_out) & set(run.trained)
    everything = run.held_out | run.trained
    files = sorted(Path(settings.data).iterdir())
    assert sorted(everything) == [p.name for p in files]
    assert all(everything[p.name] == image.digest(p.read_bytes()) for p in files)


def test_what_is_held_out_has_no_influence_on_the_weights(settings, tmp_path):
    run = train(settings)
    other = replace(settings, models=str(tmp_path / "other"), data=str(tmp_path / "copy"))
    shutil.copytree(settings.data, other.data)
    for name in run.held_out:
        write_picture(Path(other.data) / name, normal_picture(np.random.default_rng(50)))
    assert train(other).held_out.keys() == run.held_out.keys()
    assert same(weights(settings), weights(other))


def test_copies_of_a_file_are_left_out(settings):
    """A copy in both halves would be an image trained on that calibrates."""
    data = Path(settings.data)
    for path in sorted(data.iterdir()):
        shutil.copy(path, data / f"copy of {path.name}")
    run = train(settings)
    names = [*run.trained, *run.held_out]
    assert sorted(names) == [f"{i:03}.png" for i in range(8)]
    assert len({*run.trained.values(), *run.held_out.values()}) == 8


def test_a_trained_image_that_was_saved_anew_is_recorded_so_that_it_calibrates_nothing(settings):
    """Other bytes, the same pixels: the service, which knows files, must refuse both."""
    data = Path(settings.data)
    for path in sorted(data.glob("*.png")):
        Image.open(path).save(path.with_suffix(".z.bmp"))
    run = train(settings)
    assert run.copies.keys() == {name.replace(".png", ".z.bmp") for name in run.trained}
    bundle = export(Path(settings.models), settings.name)
    recorded = set(bundle.manifest.data.trained)
    assert recorded == {*run.trained.values(), *run.copies.values()}
    assert len(recorded) == 2 * len(run.trained)


def test_a_category_is_recorded_and_resumed_among_others(settings, tmp_path):
    for name in ("bottle", "cable"):
        shutil.copytree(settings.data, tmp_path / "set" / name / "train" / "good")
    shutil.copytree(settings.data, tmp_path / "set" / "bottle" / "train" / "bad")
    chosen = ["--layout", "mvtec", "--category", "bottle"]
    several = replace(settings, data=str(tmp_path / "set"))
    assert main(arguments(several)) == 1
    assert main(arguments(several, *chosen)) == 0
    run = checkpoints.read(several.folder)
    assert (run.settings.layout, run.settings.category) == ("mvtec", "bottle")
    expected = {f"bottle/train/good/{i:03}.png" for i in range(8)}
    assert run.trained.keys() | run.held_out.keys() == expected
    assert main(arguments(replace(several, epochs=2), "--resume")) == 0
    assert checkpoints.read(several.folder).finished


def test_pictures_of_a_group_are_held_out_together(settings):
    """Four parts, two shots each: 15 % of 8 is one picture, and its other shot goes with it."""
    for path in sorted(Path(settings.data).iterdir()):
        path.rename(path.with_name(f"part{int(path.stem) % 4}_{path.name}"))
    assert main(arguments(settings, "--group", r"(part\d)_")) == 0
    run = checkpoints.read(settings.folder)
    assert run.settings.group == r"(part\d)_"
    assert len(run.held_out) == 2 and len({name[:5] for name in run.held_out}) == 1
    assert not {name[:5] for name in run.held_out} & {name[:5] for name in run.trained}


def test_the_exposures_of_a_tile_are_held_out_together_without_being_told(settings):
    data = Path(settings.data)
    write_normal_pictures(data, 10)
    (data / "MT_Free/Imgs").mkdir(parents=True)
    for i, path in enumerate(sorted(data.glob("*.png"))):  # five tiles of two exposures
        picture = normal_picture(np.random.default_rng(i))
        name = f"exp{1 + i % 2}_num_{1000 * (i // 2) + i}.jpg"
        write_picture(data / "MT_Free/Imgs" / name, picture)
        path.unlink()
    run = train(settings)
    assert run.settings.layout == "mtd"  # found, and recorded
    assert main(arguments(settings, "--layout", "auto", "--resume")) == 0
    tiles = [{name.split("_num_")[1][:-7] for name in side} for side in (run.trained, run.held_out)]
    assert len(run.trained) == 6 and len(run.held_out) == 2
    assert not tiles[0] & tiles[1]


def test_a_wrong_teacher_is_told_before_any_image_is_read(settings):
    for path in Path(settings.data).iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"no-such\.safetensors"):
        train(replace(settings, teacher_weights="no-such.safetensors"))


def test_an_unreadable_image_is_skipped_or_an_error_under_strict(settings):
    (Path(settings.data) / "003.png").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"003\.png"):
        train(replace(settings, strict=True))
    assert not settings.folder.exists()
    run = train(settings)
    assert "003.png" not in {**run.trained, **run.held_out}
    assert len(run.trained) + len(run.held_out) == 7


def test_the_checkpoint_holds_safetensors_and_json_alone(settings):
    run = train(settings)
    files = sorted(p.name for p in settings.folder.iterdir())
    assert files == ["checkpoint.json", run.state_file, "teacher.safetensors"]
    for path in settings.folder.glob("*.safetensors"):
        assert load_file(path)
    json.loads((settings.folder / "checkpoint.json").read_text())


def test_a_read_checkpoint_equals_the_written_one(settings):
    run = train(settings)
    assert checkpoints.read(settings.folder) == run


# The command line


def refused(capsys, argv: list[str]) -> str:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and "error: " in error
    return error


@pytest.mark.parametrize(
    "sides, message",
    [
        (["100"], "100: must be a multiple of 32"),
        (["64", "90"], "90: must be a multiple of 32"),
        (["16"], "16: must be"),
        (["8192"], "8192: must be"),
        (["64", "64", "3"], "got 3 numbers"),
    ],
)
def test_an_image_size_that_the_networks_cant_have_is_refused(capsys, sides, message):
    argv = ["train", "--data", "nowhere", "--name", "part", "--image-size", *sides]
    assert message in refused(capsys, argv)


@pytest.mark.parametrize("name", ["Bottle", "../bottle", "a b", ""])
def test_a_name_that_no_bundle_may_have_is_refused_before_training(settings, capsys, name):
    assert "--name" in refused(capsys, arguments(replace(settings, name=name)))
    assert not Path(settings.models).exists()


def test_too_few_images_and_no_images_are_refused(settings, tmp_path, capsys):
    few = write_normal_pictures(tmp_path / "few", 2)[0].parent
    assert "2 normal images are too few" in refused(
        capsys, arguments(replace(settings, data=str(few)))
    )
    assert "no such folder" in refused(capsys, arguments(replace(settings, data="nowhere")))


@pytest.mark.parametrize(
    "flag", [("--epochs", "0"), ("--lr", "-1"), ("--lr", "nan"), ("--seed", "-1"), ("--skips", "x")]
)
def test_a_flag_out_of_bounds_is_a_usage_error_that_names_it(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data", "nowhere", "--name", "part", *flag])
    assert caught.value.code == 2 and flag[0] in capsys.readouterr().err


def test_without_the_hub_the_error_says_how_to_give_a_file(settings, tmp_path):
    """In a process of its own: the hub's client reads at import that it is offline."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    argv = arguments(replace(settings, teacher_weights="hub"))
    ran = subprocess.run(
        [sys.executable, "-m", "training", *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    assert "error: the weights resnet18.tv_in1k can't be had from the hub" in ran.stderr
    assert "--teacher-weights FILE" in ran.stderr and "Traceback" not in ran.stderr
    assert not settings.folder.exists()


@pytest.mark.parametrize(
    "flags, skips, rate",
    [
        ([], "sk", 0.005),
        (["--architecture", "rd4ad"], "none", 0.0),
        (["--architecture", "rd4ad", "--skips", "gated"], "gated", 0.0),
        (["--consistency-rate", "0.05"], "sk", 0.05),
    ],
)
def test_the_architecture_sets_skips_and_consistency_unless_they_are_given(
    settings, flags, skips, rate
):
    assert main(arguments(settings, *flags)) == 0
    saved = checkpoints.read(settings.folder).settings
    assert (saved.skips, saved.consistency_rate) == (skips, rate)
    assert saved.image_size == IMAGE_SIZE


def test_published_settings_are_the_defaults():
    default = checkpoints.Settings(data="d", name="n")
    assert (default.lr, default.batch_size, default.epochs) == (0.005, 16, 200)
    assert (default.skips, default.consistency_rate) == ("sk", 0.005)
    assert (default.backbone, default.image_size) == ("wide_resnet50_2", (256, 256))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused_and_auto_takes_the_cpu_in_float32():
    with pytest.raises(TrainingError, match="device cuda was asked for"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
    assert choose_precision("auto", torch.device("cpu")) == "float32"


def test_a_cosine_schedule_falls_from_the_rate_to_zero(tmp_path):
    settings = run_settings(tmp_path, 12, epochs=3, schedule="cosine", lr=0.01)
    used = []

    def record(optimizer, *_):
        used.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(record)
    try:
        run = train(settings)
    finally:
        hook.remove()
    total = 3 * run.steps_per_epoch
    expected = [0.01 * (1 + np.cos(np.pi * step / total)) / 2 for step in range(total)]
    assert used == pytest.approx(expected) and used[0] == 0.01


def test_a_run_goes_on_by_its_name_alone_and_never_backwards(tmp_path, capsys):
    settings = run_settings(tmp_path, epochs=2)
    train(settings)
    words = ["train", "--name", settings.name, "--models", settings.models, "--resume"]
    assert main([*words, "--epochs", "1"]) == 1
    assert "--epochs 1 is fewer than the run's 2 (2 are done)" in capsys.readouterr().err
    assert main([*words, "--epochs", "3"]) == 0
    assert "trained 3 epochs" in capsys.readouterr().out
    assert main(["train", "--name", "other"]) == 1
    assert "--data is needed" in capsys.readouterr().err
