"""Checkpoint -> bundle: the graph's contract, its parity with torch, and the manifest's truth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from training_fixtures import IMAGE_SIZE, normal_picture, run_settings, torch, write_picture

from service import bundle as bundles
from service import image
from service.bundle import Bundle
from service.detector import Detector
from training import checkpoint as checkpoints
from training.__main__ import main
from training.errors import TrainingError
from training.export import (
    PARITY_LIMIT,
    Scorer,
    check_parity,
    export,
    load_scorer,
    relative_difference,
    to_onnx,
)
from training.model import AnomalyMap, ReverseDistillation
from training.precision import compute_in_float16, round_activations
from training.train import train

ROOT = Path(__file__).parent.parent
# A CUDA graph records kernels once: nothing may be decided, or wait for the host, while it runs.
CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap", "NonZero"}
SHAPES_AT_RUN_TIME = {"Shape", "Size", "Reshape", "Expand", "ConstantOfShape", "Range", "Tile"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run; 24 pictures, 4 of them held out."""
    return train(run_settings(tmp_path_factory.mktemp("run"), 24, batch_size=10))


@pytest.fixture(scope="module")
def bundle(run):
    return export(Path(run.settings.models), "part")


@pytest.fixture(scope="module")
def scorer(run):
    return load_scorer(run, run.settings.folder)


def pictures(count: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([normal_picture(rng) for _ in range(count)])


def in_torch(scorer, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        maps, scores = scorer(torch.from_numpy(images))
    return maps.numpy(), scores.numpy()


# The graph


def test_the_graph_has_the_contracts_interface(bundle):
    model = onnx.load_model_from_string(bundle.read_graph())
    onnx.checker.check_model(model, full_check=True)

    def interface(values):
        return [
            (
                v.name,
                v.type.tensor_type.elem_type,
                [d.dim_value or "free" for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        ]

    assert interface(model.graph.input) == [("image", TensorProto.UINT8, ["free", 64, 96, 3])]
    assert interface(model.graph.output) == [
        ("anomaly_map", TensorProto.FLOAT, ["free", 64, 96]),
        ("image_score", TensorProto.FLOAT, ["free"]),
    ]
    assert {o.domain: o.version for o in model.opset_import}[""] == 20
    assert bundle.manifest.graph.opset == 20


def test_the_graph_is_one_file_of_standard_operators(bundle):
    model = onnx.load_model_from_string(bundle.read_graph())
    files = sorted(path.name for path in bundle.folder.iterdir())
    assert files == ["golden.png", "manifest.json", "model.onnx"]
    assert all(t.data_location == TensorProto.DEFAULT for t in model.graph.initializer)
    operators = {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not operators & {"Resize", "Pad", "BatchNormalization"}, operators
    assert not model.functions


def test_the_graph_names_no_place_on_the_machine_that_made_it(bundle):
    for content in (bundle.read_graph(), (bundle.folder / "manifest.json").read_bytes()):
        for trace in (str(ROOT), "site-packages", str(bundle.folder.parent.parent), "stack_trace"):
            assert trace.encode() not in content, trace


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_bundle_answers_as_the_network_does(bundle, scorer, count):
    images = pictures(count)
    maps, scores = in_torch(scorer, images)
    for i, prediction in enumerate(Detector(bundle.read_graph(), IMAGE_SIZE, "cpu").run(images)):
        np.testing.assert_allclose(prediction.anomaly_map, maps[i], rtol=1e-4, atol=1e-5)
        assert prediction.score == pytest.approx(float(scores[i]), rel=1e-4)
        assert prediction.score == prediction.anomaly_map.max()


def test_an_images_score_does_not_depend_on_its_batch(bundle):
    images = pictures(4)
    detector = Detector(bundle.read_graph(), IMAGE_SIZE, "cpu")
    together = [p.score for p in detector.run(images)]
    alone = [detector.run(images[i : i + 1])[0].score for i in range(4)]
    assert together == pytest.approx(alone, rel=1e-5)
    assert len({round(s, 6) for s in alone}) == 4


@pytest.mark.parametrize(
    "skips, bottleneck, refinement, backbone",
    [
        ("none", "mff", False, "resnet18"),
        ("gated", "mff", False, "resnet18"),
        ("sk", "mff", False, "resnet50"),
        ("none", "mfcf", True, "resnet18"),
        ("sk", "mff-narrow", True, "wide_resnet50_2"),
        ("sk", "mff", False, "convnext_tiny"),
        ("sk", "mfcf", True, "efficientnet_b0"),
    ],
)
def test_every_architecture_exports_with_parity_for_any_device(
    skips, bottleneck, refinement, backbone
):
    torch.manual_seed(0)
    model = ReverseDistillation(backbone, skips, 16, bottleneck)
    scorer = Scorer(model, AnomalyMap((32, 64), refinement=refinement)).eval()
    graph = to_onnx(scorer, (32, 64))
    images = pictures(2)[:, :32, :64]
    assert check_parity(graph, scorer, images) <= PARITY_LIMIT

    operators = {node.op_type for node in onnx.load_model_from_string(graph).graph.node}
    assert not operators & (CONTROL_FLOW | SHAPES_AT_RUN_TIME), operators
    narrow = Detector(round_activations(compute_in_float16(graph)), (32, 64), "cpu").run(images)
    scores = in_torch(scorer, images)[1]
    assert [p.score for p in narrow] == pytest.approx(scores.tolist(), rel=5e-3)


# Parity


def test_parity_is_the_recorded_one_and_within_the_limit(bundle, scorer, run):
    recorded = bundle.manifest.graph.parity
    assert 0 < recorded <= PARITY_LIMIT == 1e-4
    held_out = [image.read(Path(run.settings.data) / name) for name in run.held_out]
    assert check_parity(bundle.read_graph(), scorer, np.stack(held_out)) == pytest.approx(recorded)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_network_that_differs_from_its_graph_fails_and_says_by_how_much(bundle, run, value):
    scorer = load_scorer(run, run.settings.folder)
    with torch.no_grad():
        weight = scorer.model.decoder.stage1[0].body[0].weight
        weight.copy_(weight * 1.05 if value is None else torch.full_like(weight, value))
    number = r"\d\.\d\de[-+]\d\d" if value is None else "nan"
    with pytest.raises(TrainingError, match=f"differs from the network by {number} relative"):
        check_parity(bundle.read_graph(), scorer, pictures(2))


def test_parity_looks_at_every_batch_size(bundle, scorer):
    """A graph that is right for the first two images of a batch alone."""
    model = onnx.load_model_from_string(bundle.read_graph())
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "image_score":
                node.output[index] = "score_before"
    helper = onnx.helper
    model.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.array([2], np.int64), "test.two"),
            onnx.numpy_helper.from_array(np.array([0], np.int64), "test.zero"),
            onnx.numpy_helper.from_array(np.array([9999], np.int64), "test.end"),
        ]
    )
    model.graph.node.extend(
        [
            helper.make_node("Slice", ["score_before", "test.zero", "test.two"], ["test.first"]),
            helper.make_node("Slice", ["score_before", "test.two", "test.end"], ["test.rest"]),
            helper.make_node("Add", ["test.rest", "test.rest"], ["test.doubled"]),
            helper.make_node("Concat", ["test.first", "test.doubled"], ["image_score"], axis=0),
        ]
    )
    with pytest.raises(TrainingError, match="differs from the network by 1.00e"):
        check_parity(bytes(model.SerializeToString()), scorer, pictures(5))


def test_a_relative_difference_is_over_the_largest_value():
    assert relative_difference(np.array([1.0, 4.5]), np.array([1.2, 4.0])) == pytest.approx(0.125)


# Float16 storage


@pytest.fixture(scope="module")
def halved(run, bundle):
    return export(Path(run.settings.models), "part", version=50, weights="float16")


def test_float16_weights_shrink_the_file_and_say_what_rounding_changed(bundle, halved):
    graph = halved.manifest.graph
    assert len(halved.read_graph()) < 0.6 * len(bundle.read_graph())
    assert (bundle.manifest.graph.weights, graph.weights) == ("float32", "float16")
    assert bundle.manifest.graph.weight_rounding == 0 < graph.weight_rounding < 2e-2
    exact = [i.score for i in bundle.manifest.data.held_out]
    rounded = [i.score for i in halved.manifest.data.held_out]
    changes = np.abs(np.array(rounded) / exact - 1)
    assert graph.weight_rounding == pytest.approx(changes.max(), rel=1e-3)


def test_float16_weights_are_computed_in_float32(halved):
    """All but storage is float32: every float16 tensor goes into a Cast and nowhere else."""
    model = onnx.load_model_from_string(halved.read_graph())
    small = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    assert len(small) > 20
    for node in model.graph.node:
        if set(node.input) & small:
            assert node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT
    kept = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert all(len(t.dims) != 4 for t in kept)
    operators = [t for t in kept if len(t.dims) == 2]  # of the anomaly map: rows and columns
    assert len(operators) >= 6
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(halved.read_graph(), providers=["CPUExecutionProvider"])
    assert {o.type for o in session.get_outputs()} == {"tensor(float)"}


# Float16 computation


@pytest.fixture(scope="module")
def half(run):
    return export(Path(run.settings.models), "part", version=51, precision="float16")


def test_a_float16_bundle_says_so_and_what_rounding_changed(bundle, half):
    graph = half.manifest.graph
    assert (graph.precision, graph.weights) == ("float16", "float16")
    assert bundle.manifest.graph.precision == "float32"
    assert graph.parity == bundle.manifest.graph.parity  # of what was rounded
    assert len(half.read_graph()) < 0.6 * len(bundle.read_graph())
    exact = [i.score for i in bundle.manifest.data.held_out]
    rounded = [i.score for i in half.manifest.data.held_out]
    changes = np.abs(np.array(rounded) / exact - 1)
    assert 0 < graph.weight_rounding < 5e-3
    assert graph.weight_rounding == pytest.approx(changes.max(), rel=1e-3)


def test_a_float16_bundles_scores_are_those_of_a_gpu_which_rounds_in_between(half, run):
    held_out = half.manifest.data.held_out
    images = np.stack([image.read(Path(run.settings.data) / i.file) for i in held_out])
    graph = half.read_graph()
    rounding = Detector(round_activations(graph), IMAGE_SIZE, "cpu").run(images)
    assert [p.score for p in rounding] == pytest.approx([i.score for i in held_out], rel=1e-6)
    plain = Detector(graph, IMAGE_SIZE, "cpu").run(images)
    assert [p.score for p in plain] == pytest.approx([i.score for i in held_out], rel=5e-3)


def test_a_network_that_overflows_in_float16_is_refused_in_it_alone(run, tmp_path):
    """A cosine doesn't see how large its vectors are, so that in float32 all is well."""
    settings = replace(run.settings, models=str(tmp_path))
    model = load_scorer(run, run.settings.folder).model
    first = model.teacher.network.model.bn1
    with torch.no_grad():
        first.weight.mul_(2e4)
        first.bias.mul_(2e4)
    checkpoints.save_teacher(settings.folder, model)
    checkpoints.save(
        replace(run, settings=settings), model, torch.optim.Adam(model.bottleneck.parameters())
    )

    with pytest.raises(TrainingError, match=r"beyond float16's range \(65504\): .* in float32"):
        export(tmp_path, "part", precision="float16")
    assert bundles.versions(tmp_path, "part") == []
    assert export(tmp_path, "part").version == 1


def test_float16_that_changes_scores_too_much_is_refused(run, monkeypatch):
    monkeypatch.setattr("training.export.ROUNDING_LIMIT", 1e-7)
    with pytest.raises(TrainingError, match=r"changes scores by \d.* limit is 1e-07: .*float32"):
        export(Path(run.settings.models), "part", version=52, precision="float16")
    assert 52 not in bundles.versions(Path(run.settings.models), "part")


# The manifest


def test_the_manifest_lists_the_held_out_images_with_scores_that_the_detector_gives(bundle, run):
    detector = Detector(bundle.read_graph(), IMAGE_SIZE, "cpu")
    listed = bundle.manifest.data.held_out
    assert {i.file: i.sha256 for i in listed} == run.held_out and len(listed) == 4
    for held_out in listed:
        path = Path(run.settings.data) / held_out.file
        assert image.digest(path.read_bytes()) == held_out.sha256
        pixels = image.resize(image.read(path), IMAGE_SIZE)
        assert detector.run(pixels[None])[0].score == pytest.approx(held_out.score, rel=1e-5)
    assert bundle.manifest.data.trained == list(run.trained.values())
    assert len(bundle.manifest.data.trained) == 20
    assert bundle.manifest.data.fingerprint == run.data_fingerprint


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_golden_picture_is_a_typical_held_out_one_with_its_score(run, tmp_path, precision):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoint").symlink_to(run.settings.folder)
    bundle = export(tmp_path, "part", precision=precision)

    golden, pixels = bundle.manifest.golden, bundle.golden_pixels()
    assert pixels.shape == (*IMAGE_SIZE, 3)
    held_out = [held.score for held in bundle.manifest.data.held_out]
    assert golden.score == sorted(held_out)[2]  # of 4
    (found,) = Detector(bundle.read_graph(), IMAGE_SIZE, "cpu").run(pixels[None])
    assert found.score == pytest.approx(golden.score, rel=golden.tolerance)


def test_the_default_threshold_is_the_finest_that_four_images_allow(bundle):
    calibration = bundle.default_calibration()
    highest = max(i.score for i in bundle.manifest.data.held_out)
    assert calibration.target_fpr == pytest.approx(1 / 5) and calibration.samples == 4
    assert highest < calibration.threshold < highest * 1.0001


def test_the_manifest_tells_network_teacher_and_training(bundle, run):
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, manifest.image_size) == ("part", 1, IMAGE_SIZE)
    assert manifest.graph.sha256 == image.digest(bundle.read_graph())
    network = manifest.network.model_dump()
    assert network == {
        "architecture": "sk-rd4ad",
        "backbone": "resnet18",
        "skips": "sk",
        "bottleneck": "mff",
        "refinement": False,
        "border": "half-sample",
        "consistency_rate": 0.005,
        "embedding_planes": 32,
    }
    assert manifest.teacher.origin == "teacher.safetensors"
    assert manifest.teacher.licence == "CC0-1.0"
    assert manifest.training["seed"] == 111 and manifest.training["lr"] == 0.005
    assert manifest.metrics == {"epochs": 1, "loss": run.losses[-1]}


# Versions and refusals


def test_versions_increment_and_an_existing_one_is_refused(run, bundle, tmp_path):
    models = tmp_path / "models"
    run = train(replace(run.settings, models=str(models)))
    first, second = export(models, "part"), export(models, "part")
    assert (first.version, second.version) == (1, 2)
    before = (first.folder / "manifest.json").read_bytes()
    with pytest.raises(TrainingError, match=r"part/1: exists"):
        export(models, "part", version=1)
    assert (first.folder / "manifest.json").read_bytes() == before
    assert bundles.versions(models, "part") == [1, 2]
    assert first.digest == second.digest  # one checkpoint gives one graph


def test_a_changed_or_missing_held_out_image_is_refused_and_nothing_is_written(run, tmp_path):
    settings = replace(run.settings, models=str(tmp_path / "models"), data=str(tmp_path / "data"))
    for path in Path(run.settings.data).iterdir():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    run = train(settings)
    victim = tmp_path / "data" / next(iter(run.held_out))
    write_picture(victim, normal_picture(np.random.default_rng(77)))
    with pytest.raises(TrainingError, match=f"{victim.name}: changed since it was held out"):
        export(tmp_path / "models", "part")
    victim.unlink()
    with pytest.raises(TrainingError, match=victim.name):
        export(tmp_path / "models", "part")
    assert bundles.versions(tmp_path / "models", "part") == []


def test_a_run_without_a_finished_epoch_exports_a_manifest_without_a_loss(run, tmp_path):
    """JSON has no NaN; other readers than ours would refuse the whole file."""
    settings = replace(run.settings, models=str(tmp_path))
    run = train(settings)
    run.losses, run.step = [], 1
    model = load_scorer(run, settings.folder).model
    optimizer = torch.optim.Adam(model.bottleneck.parameters())
    checkpoints.save(run, model, optimizer)
    bundle = export(tmp_path, "part", unfinished=True)
    assert bundle.manifest.metrics == {"epochs": 0}
    assert "NaN" not in (bundle.folder / "manifest.json").read_text()


def test_a_run_that_was_interrupted_is_exported_only_when_told_so(run, tmp_path):
    settings = replace(run.settings, models=str(tmp_path), epochs=run.settings.epochs + 1)
    run = replace(run, settings=settings)
    model = ReverseDistillation(settings.backbone, settings.skips, settings.embedding_planes)
    optimizer = torch.optim.Adam(model.bottleneck.parameters())
    checkpoints.save_teacher(settings.folder, model)
    checkpoints.save(run, model, optimizer)

    with pytest.raises(TrainingError, match="stopped at epoch 1 of 2: .*--unfinished"):
        export(tmp_path, "part")
    assert not (tmp_path / "part" / "1").exists()


def test_the_command_line_exports_and_says_what_the_threshold_promises(run, capsys):
    argv = ["export", "--name", "part", "--models", run.settings.models, "--version", "60"]
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "float16" not in output
    assert "opset 20" in output and "rate of 0.2, from 4 held-out" in output
    assert "0.01 needs 99 held-out images" in output
    assert Bundle(Path(run.settings.models) / "part" / "60").version == 60

    assert main([*argv[:-1], "61", "--precision", "float16"]) == 0
    assert "float16 changes scores by at most" in capsys.readouterr().out
    manifest = Bundle(Path(run.settings.models) / "part" / "61").manifest
    assert manifest.graph.precision == "float16"
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "exists" in error and "Traceback" not in error


def test_export_without_a_checkpoint_is_an_error(tmp_path, capsys):
    assert main(["export", "--name", "part", "--models", str(tmp_path)]) == 1
    assert "no such checkpoint; run `training train` first" in capsys.readouterr().err
