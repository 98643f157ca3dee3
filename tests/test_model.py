"""Networks, skips and the anomaly map, against the papers' tables and slow versions."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from training_fixtures import PLANES, randomise, torch, write_teacher

from training.errors import TrainingError
from training.model import (
    BACKBONES,
    AnomalyMap,
    Decoder,
    ReverseDistillation,
    Teacher,
    bilinear_matrix,
    cosine_distance,
    gaussian_matrix,
    load_teacher,
)

# Appendix A of the specification: op, channels in and out, stride, height = width at 256 x 256.
RESNET18_BLOCKS = """
bottleneck conv3x3 64 128 2 32
bottleneck conv3x3 128 256 2 16
bottleneck conv3x3 128 256 2 16
bottleneck conv3x3 768 512 2 8
bottleneck conv3x3 512 512 1 8
bottleneck conv1x1 768 512 2 8
bottleneck conv3x3 512 512 1 8
bottleneck conv3x3 512 512 1 8
decoder deconv2x2 512 256 2 16
decoder conv3x3 256 256 1 16
decoder deconv2x2 512 256 2 16
decoder conv3x3 256 256 1 16
decoder conv3x3 256 256 1 16
decoder deconv2x2 256 128 2 32
decoder conv3x3 128 128 1 32
decoder deconv2x2 256 128 2 32
decoder conv3x3 128 128 1 32
decoder conv3x3 128 128 1 32
decoder deconv2x2 128 64 2 64
decoder conv3x3 64 64 1 64
decoder deconv2x2 128 64 2 64
decoder conv3x3 64 64 1 64
decoder conv3x3 64 64 1 64
"""


def images(count: int = 2, size: tuple[int, int] = (64, 96), seed: int = 0) -> "torch.Tensor":
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def small_model(skips: str = "sk") -> ReverseDistillation:
    model = ReverseDistillation("resnet18", skips, PLANES)
    randomise(model, 1)
    return model.eval()


def features(seed: int, batch: int = 2, size: tuple[int, int] = (64, 96)) -> list["torch.Tensor"]:
    """ResNet-18's three maps of random non-negative values."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    return [
        torch.rand(batch, c, height // s, width // s, generator=generator)
        for c, s in ((64, 4), (128, 8), (256, 16))
    ]


def parameters(module: "torch.nn.Module") -> int:
    return sum(p.numel() for p in module.parameters())


# Networks


@pytest.mark.parametrize("backbone", BACKBONES)
def test_decoder_features_have_the_teachers_shapes_on_every_backbone(backbone):
    with torch.device("meta"):
        model = ReverseDistillation(backbone, "sk")
        teacher_features, decoder_features = model(torch.zeros(2, 64, 96, 3, dtype=torch.uint8))
    e = 4 if "50" in backbone else 1
    expected = [(2, 64 * e, 16, 24), (2, 128 * e, 8, 12), (2, 256 * e, 4, 6)]
    assert [tuple(f.shape) for f in teacher_features] == expected
    assert [tuple(f.shape) for f in decoder_features] == expected


@pytest.mark.parametrize("skips", ["none", "sk", "gated"])
@pytest.mark.parametrize(
    "backbone, teacher, bottleneck, decoder, total",
    [
        ("resnet18", 2_782_784, 11_680_000, 3_703_168, 18_165_952),
        ("resnet34", None, None, None, 30_341_568),
        ("resnet50", None, None, None, 55_194_688),
        ("wide_resnet50_2", 24_862_528, 58_885_120, 24_917_504, 108_665_152),
    ],
)
def test_parameter_counts_are_the_published_ones_with_any_skips(
    backbone, teacher, bottleneck, decoder, total, skips
):
    with torch.device("meta"):
        model = ReverseDistillation(backbone, skips)
    parts = [parameters(m) for m in (model.teacher, model.bottleneck, model.decoder)]
    assert sum(parts) == total
    if teacher:
        assert parts == [teacher, bottleneck, decoder]


def test_resnet18s_convolutions_are_those_of_the_table_in_order():
    rows = []

    def record(name):
        def hook(layer, _, output):
            op = "deconv" if isinstance(layer, torch.nn.ConvTranspose2d) else "conv"
            size = f"{layer.kernel_size[0]}x{layer.kernel_size[1]}"
            assert layer.bias is None and output.shape[2] == output.shape[3]
            channels = f"{layer.in_channels} {layer.out_channels}"
            rows.append(f"{name} {op}{size} {channels} {layer.stride[0]} {output.shape[2]}")

        return hook

    with torch.device("meta"):
        model = ReverseDistillation("resnet18", "sk")
        for name in ("bottleneck", "decoder"):
            for layer in getattr(model, name).modules():
                if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                    layer.register_forward_hook(record(name))
        model(torch.zeros(2, 256, 256, 3, dtype=torch.uint8))
    assert rows == RESNET18_BLOCKS.split("\n")[1:-1]


def test_every_trainable_convolution_is_followed_by_batch_norm():
    with torch.device("meta"):
        model = ReverseDistillation("resnet50", "sk")
    kinds = [type(m).__name__ for m in model.modules()]
    trainable = [type(m).__name__ for m in (*model.bottleneck.modules(), *model.decoder.modules())]
    convolutions = sum(k in ("Conv2d", "ConvTranspose2d") for k in trainable)
    assert convolutions == trainable.count("BatchNorm2d") > 40
    assert "Linear" not in kinds


def test_he_initialisation_is_for_convolutions_but_not_for_transposed_ones():
    torch.manual_seed(0)
    model = ReverseDistillation("resnet18", "sk")
    for layer in (*model.bottleneck.modules(), *model.decoder.modules()):
        if isinstance(layer, torch.nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(layer, torch.nn.ConvTranspose2d):
            # PyTorch's default: uniform within 1 / sqrt(fan_in), its fan_in being out * k * k.
            bound = (layer.out_channels * layer.kernel_size[0] ** 2) ** -0.5
            assert layer.weight.abs().max().item() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_the_concatenation_is_shallow_then_middle_then_deep():
    model = small_model()
    e1, e2, e3 = features(3)
    seen = {}
    model.bottleneck.embed.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    model.bottleneck([e1, e2, e3])
    fused = seen["x"]
    assert torch.equal(fused[:, :256], model.bottleneck.shallow(e1))
    assert torch.equal(fused[:, 256:512], model.bottleneck.middle(e2))
    assert torch.equal(fused[:, 512:], e3)


def test_an_unknown_backbone_is_refused_by_name():
    with pytest.raises(TrainingError, match="resnet19.*resnet18.*no network of that name"):
        ReverseDistillation("resnet19", "sk")


def test_a_network_without_the_three_strides_is_refused_with_those_it_has():
    with pytest.raises(TrainingError, match=r"strides \[16, .*needs 4, 8, 16"):
        Teacher("vit_tiny_patch16_224")


@pytest.mark.parametrize("backbone", ["inception_v4", "swin_tiny_patch4_window7_224"])
def test_a_network_whose_maps_do_not_fit_is_refused_by_name(backbone):
    with pytest.raises(TrainingError, match=f"backbone '{backbone}' (has maps of|can't give)"):
        Teacher(backbone)


def test_a_tag_that_names_weights_does_not_change_the_network():
    with torch.device("meta"):
        plain = ReverseDistillation("resnet50", "sk").state_dict()
        tagged = ReverseDistillation("resnet50.a1_in1k", "sk").state_dict()
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in tagged.items()}


@pytest.mark.parametrize(
    "backbone, channels",
    [("convnext_tiny", [96, 192, 384]), ("efficientnet_b0", [24, 40, 112])],
)
@pytest.mark.parametrize("bottleneck", ["mff", "mfcf"])
def test_any_cnn_of_timm_can_teach(backbone, channels, bottleneck):
    model = ReverseDistillation(backbone, "sk", None, bottleneck)
    teacher_features, decoder_features = model(images())
    sizes = [(16, 24), (8, 12), (4, 6)]
    expected = [(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    assert [tuple(f.shape) for f in teacher_features] == expected
    assert [tuple(f.shape) for f in decoder_features] == expected
    assert model.embedding_planes == 2 * channels[-1]
    for e, d in zip(teacher_features, decoder_features, strict=True):
        assert e.min() < 0 and d.min() < 0  # no ReLU stands between the student and signed maps


def test_images_are_normalised_by_the_teachers_own_statistics():
    teacher = Teacher("convnext_large_mlp.clip_laion2b_augreg")
    assert (teacher.mean / 255).tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    white = teacher.normalise(torch.full((1, 32, 32, 3), 255, dtype=torch.uint8))
    assert white[0, :, 0, 0].tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-3)


def test_drds_bottleneck_has_its_published_size():
    with torch.device("meta"):
        model = ReverseDistillation("wide_resnet50_2", "none", None, "mfcf")
    parts = [parameters(m) for m in (model.teacher, model.bottleneck, model.decoder)]
    unused = 8_392_704  # conv4 and bn4 of the public code, which no forward pass sees
    assert parts[1] == 98_737_152 - unused and sum(parts) == 140_124_480


def test_drds_bottleneck_fuses_from_shallow_to_deep():
    model = ReverseDistillation("resnet18", "none", PLANES, "mfcf").eval()
    randomise(model, 1)
    e1, e2, e3 = features(0)
    seen = {}
    bottleneck = model.bottleneck
    bottleneck.embed.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    bottleneck([e1, e2, e3])
    x = bottleneck.middle(torch.cat([bottleneck.shallow(e1), e2], 1))
    assert torch.equal(seen["x"], bottleneck.deep(torch.cat([x, e3], 1)))
    assert seen["x"].shape == e3.shape


def test_the_narrow_bottleneck_has_the_size_of_anomalibs():
    """39.22 M of WideResNet-50's 67.28 M, conv4 and bn4 not counted; two blocks for ResNet-34."""
    with torch.device("meta"):
        wide, middling, eighteen = (
            parameters(ReverseDistillation(b, "none", None, "mff-narrow").bottleneck)
            for b in ("wide_resnet50_2", "resnet34", "resnet18")
        )
    assert wide == pytest.approx(39.22e6 - 8_392_704, abs=5e3)
    assert middling == eighteen == 11_680_000


# Teacher


def test_the_teacher_stays_in_eval_and_gets_no_gradient():
    model = small_model().train()
    statistics = {k: v.clone() for k, v in model.teacher.state_dict().items() if "running" in k}
    teacher_features, decoder_features = model(images())
    sum(d.sum() for d in decoder_features).backward()
    assert not any(m.training for m in model.teacher.modules())
    assert all(m.training for m in model.decoder.modules())
    assert not any(e.requires_grad for e in teacher_features)
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.bottleneck.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    after = model.teacher.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in statistics.items())


def test_trainable_state_is_everything_but_the_teacher():
    model = small_model()
    trainable = set(model.trainable_state())
    assert trainable and all(k.startswith(("bottleneck.", "decoder.")) for k in trainable)
    assert trainable | {f"teacher.{k}" for k in model.teacher.state_dict()} == set(
        model.state_dict()
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_teacher_computes_torchvisions_layers_one_to_three(backbone, tmp_path):
    """From torchvision's own keys; resnet50 shows where a Bottleneck's stride lies."""
    reference = getattr(torchvision.models, backbone)(weights=None)
    randomise(reference, 5)
    reference.eval()
    state = reference.state_dict()
    if backbone == "resnet18":
        assert "fc.weight" in state and "layer4.0.conv1.weight" in state
    else:
        state = {k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}
    torch.save(state, tmp_path / "weights.pth")
    teacher = Teacher(backbone)
    load_teacher(teacher, backbone, str(tmp_path / "weights.pth"))

    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for actual, layer in zip(
            teacher(x), (reference.layer1, reference.layer2, reference.layer3), strict=True
        ):
            y = layer(y)
            torch.testing.assert_close(actual, y)
            assert actual.min() >= 0


def test_images_are_normalised_as_rgb_by_imagenets_statistics():
    model = small_model()
    pixels = images(1)
    seen = {}
    model.teacher.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    model(pixels)
    for channel, (mean, std) in enumerate(
        zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        expected = (pixels[0, :, :, channel].double() / 255 - mean) / std
        torch.testing.assert_close(seen["x"][0, channel].double(), expected, rtol=1e-5, atol=1e-6)


# Skips


def restored(decoder: Decoder, teacher_features: list["torch.Tensor"], seed: int = 7):
    e3 = teacher_features[2]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(e3), PLANES, e3.shape[2] // 2, e3.shape[3] // 2)
    embedding = torch.rand(shape, generator=generator)
    with torch.inference_mode():
        return embedding, decoder(embedding, teacher_features)


def test_sk_adds_each_deeper_teacher_map_to_the_next_stage_as_published():
    decoder = small_model("sk").decoder
    _, e2, e3 = teacher_features = features(0)
    embedding, (d1, d2, d3) = restored(decoder, teacher_features)
    with torch.inference_mode():
        slow3 = decoder.stage3(embedding)
        slow2 = decoder.stage2(torch.relu(slow3 + e3))
        slow1 = decoder.stage1(torch.relu(slow2 + e2))
    for actual, expected in zip((d1, d2, d3), (slow1, slow2, slow3), strict=True):
        torch.testing.assert_close(actual, expected)


def test_without_skips_the_teachers_features_enter_through_the_bottleneck_alone():
    decoder = small_model("none").decoder
    embedding, first = restored(decoder, features(0))
    _, second = restored(decoder, features(1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.inference_mode():
        slow = decoder.stage1(decoder.stage2(decoder.stage3(embedding)))
    torch.testing.assert_close(first[0], slow)


@pytest.mark.parametrize("skips", ["sk", "gated"])
def test_no_restored_map_sees_its_own_target_past_the_bottleneck(skips):
    decoder = small_model(skips).decoder
    base, other = features(0), features(1)
    _, (d1, d2, d3) = restored(decoder, base)

    _, (a1, a2, a3) = restored(decoder, [other[0], base[1], base[2]])  # another E1
    assert torch.equal(a1, d1) and torch.equal(a2, d2) and torch.equal(a3, d3)
    _, (a1, a2, a3) = restored(decoder, [base[0], other[1], base[2]])  # another E2
    assert not torch.equal(a1, d1) and torch.equal(a2, d2) and torch.equal(a3, d3)
    _, (a1, a2, a3) = restored(decoder, [base[0], base[1], other[2]])  # another E3
    assert not torch.equal(a1, d1) and not torch.equal(a2, d2) and torch.equal(a3, d3)


def test_gated_skips_weigh_the_teacher_by_the_cosine_at_each_place():
    decoder = small_model("gated").decoder
    _, e2, e3 = teacher_features = features(0)
    e3[0, :, 1, 2] = 0  # a zero vector has cosine 0, and adds nothing
    inputs = []
    for stage in (decoder.stage2, decoder.stage1):
        stage.register_forward_pre_hook(lambda _, given: inputs.append(given[0].numpy()))
    _, (_, d2, d3) = restored(decoder, teacher_features)
    for actual, d, e in zip(inputs, (d3, d2), (e3, e2), strict=True):
        d, e = d.numpy().astype(np.float64), e.numpy().astype(np.float64)
        for b in range(e.shape[0]):
            for i in range(e.shape[2]):
                for j in range(e.shape[3]):
                    u, v = d[b, :, i, j], e[b, :, i, j]
                    norm = np.linalg.norm(u) * np.linalg.norm(v)
                    cosine = u @ v / norm if norm else 0
                    np.testing.assert_allclose(actual[b, :, i, j], u + cosine * v, rtol=2e-4)


# Teacher weights


def test_safetensors_and_pth_give_the_same_teacher(tmp_path):
    path = write_teacher(tmp_path / "teacher.safetensors")
    torch.save(load_file(path), tmp_path / "teacher.pth")
    wrapped = {"state_dict": {f"module.{k}": v for k, v in load_file(path).items()}, "epoch": 3}
    torch.save(wrapped["state_dict"], tmp_path / "parallel.pth")
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    for name in ("teacher.safetensors", "teacher.pth", "parallel.pth", "checkpoint.pth"):
        teacher = Teacher("resnet18")
        record = load_teacher(teacher, "resnet18", str(tmp_path / name))
        loaded = teacher.weights
        assert all(torch.equal(loaded[k], v) for k, v in load_file(path).items()), name
        assert record.origin == name and len(record.sha256) == 64
        assert record.licence == ("CC0-1.0" if name == "teacher.safetensors" else "not stated")


def test_batch_counters_may_be_missing_as_in_old_files(tmp_path):
    state = load_file(write_teacher(tmp_path / "teacher.safetensors"))
    state = {k: v for k, v in state.items() if "num_batches" not in k}
    save_file(state, tmp_path / "old.safetensors")
    load_teacher(Teacher("resnet18"), "resnet18", str(tmp_path / "old.safetensors"))


def test_a_missing_and_a_misshaped_key_are_named_and_nothing_is_loaded(tmp_path):
    state = load_file(write_teacher(tmp_path / "teacher.safetensors"))
    del state["layer2.0.conv1.weight"]
    state["layer3.0.bn1.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "broken.safetensors")
    teacher = Teacher("resnet18")
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    with pytest.raises(TrainingError) as caught:
        load_teacher(teacher, "resnet18", str(tmp_path / "broken.safetensors"))
    assert "broken.safetensors" in str(caught.value)
    assert "missing layer2.0.conv1.weight" in str(caught.value)
    assert "layer3.0.bn1.bias (7,) instead of (256,)" in str(caught.value)
    assert str(caught.value).count("layer") == 2
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())


def test_another_backbones_weights_are_refused(tmp_path):
    path = write_teacher(tmp_path / "teacher.safetensors", "resnet18")
    with pytest.raises(
        TrainingError, match=r"missing layer1\.2\.bn1.* more. Is it another network"
    ):
        load_teacher(Teacher("resnet34"), "resnet34", str(path))


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, writer):
    content = {"conv1.weight": Malicious(tmp_path / "ran")}
    path = tmp_path / "weights.pth"
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(TrainingError, match=r"weights\.pth: neither .safetensors nor"):
        load_teacher(Teacher("resnet18"), "resnet18", str(path))
    assert not (tmp_path / "ran").exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())  # so it was a working trap
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.zeros(1)}])
def test_a_pth_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(TrainingError, match="not a state dict"):
        load_teacher(Teacher("resnet18"), "resnet18", str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_foreign_bytes_and_absent_files_are_refused_by_name(tmp_path, name):
    with pytest.raises(TrainingError, match=f"{name}: no such file"):
        load_teacher(Teacher("resnet18"), "resnet18", str(tmp_path / name))
    (tmp_path / name).write_bytes(b"no weights at all" * 100)
    with pytest.raises(TrainingError, match=f"{name}: neither .safetensors nor"):
        load_teacher(Teacher("resnet18"), "resnet18", str(tmp_path / name))


def test_the_hub_has_torchvisions_weights_of_every_backbone():
    assert set(timm.list_pretrained("*.tv_in1k")) >= {f"{name}.tv_in1k" for name in BACKBONES}


# Anomaly map


@pytest.mark.parametrize("sigma", [1.0, 4.0])
@pytest.mark.parametrize("length", [8, 32, 96, 256])
def test_the_blurring_matrix_equals_scipys_filter(length, sigma):
    """At length 8 and sigma 4 the kernel of radius 16 is reflected more than once."""
    signal = np.random.default_rng(length).random((length, 3))
    actual = gaussian_matrix(length, sigma).numpy() @ signal
    expected = gaussian_filter1d(signal, sigma, axis=0, mode="reflect")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inputs, outputs", [(2, 32), (3, 96), (16, 256), (64, 256), (24, 96)])
def test_the_upsampling_matrix_equals_torchs_interpolation(inputs, outputs):
    rows = torch.rand(1, 2, inputs, dtype=torch.float64)
    expected = F.interpolate(rows, size=outputs, mode="linear", align_corners=True)
    torch.testing.assert_close(rows @ bilinear_matrix(inputs, outputs).T, expected)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 64), (256, 256)])
def test_the_map_equals_interpolation_and_scipys_blur_and_the_score_is_its_maximum(size):
    teacher_features, decoder_features = features(0, 3, size), features(1, 3, size)
    maps, scores = AnomalyMap(size)(teacher_features, decoder_features)
    assert maps.shape == (3, *size) and maps.dtype == torch.float32
    for b in range(3):
        summed = np.zeros(size)
        for e, d in zip(teacher_features, decoder_features, strict=True):
            distance = 1 - F.cosine_similarity(e[b : b + 1].double(), d[b : b + 1].double())
            summed += F.interpolate(distance[None], size=size, mode="bilinear", align_corners=True)[
                0, 0
            ].numpy()
        expected = gaussian_filter(summed, sigma=4)
        np.testing.assert_allclose(maps[b].numpy(), expected, rtol=0, atol=1e-6)
        assert scores[b].item() == maps[b].max().item()


def test_a_zero_vector_is_at_distance_one_and_equal_ones_at_zero():
    a = torch.zeros(1, 3, 1, 4)
    b = torch.zeros(1, 3, 1, 4)
    b[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0])  # a is zero
    a[0, :, 0, 2] = b[0, :, 0, 2] = torch.tensor([1.0, 2.0, 2.0])  # equal
    a[0, 0, 0, 3], b[0, 1, 0, 3] = 5.0, 0.1  # orthogonal
    expected = torch.tensor([[[1.0, 1.0, 0.0, 1.0]]])
    torch.testing.assert_close(cosine_distance(a, b), expected)


def test_a_perfect_restoration_scores_zero_and_nothing_in_common_scores_three():
    teacher_features = features(0)
    maps, scores = AnomalyMap((64, 96))(teacher_features, [2 * e for e in teacher_features])
    assert maps.abs().max() < 1e-5
    nothing = [torch.zeros_like(e) for e in teacher_features]
    maps, scores = AnomalyMap((64, 96))(teacher_features, nothing)
    torch.testing.assert_close(maps, torch.full_like(maps, 3.0), rtol=1e-5, atol=0)


def test_half_precision_features_are_compared_in_float32():
    """Sums of 1024 squares overflow float16."""
    shapes = [(1, 256, 16, 24), (1, 512, 8, 12), (1, 1024, 4, 6)]
    large = [torch.full(shape, 60.0, dtype=torch.float16) for shape in shapes]
    maps, scores = AnomalyMap((64, 96))(large, large)
    assert maps.dtype == torch.float32 and maps.abs().max() < 1e-5


@pytest.mark.parametrize("size", [(64, 96), (96, 32)])
def test_refinement_scales_the_mean_by_the_calmest_scales_maximum(size):
    """DRD's image score, from upsampled maps and torch's variance; its map scaled alike."""
    calmest = set()
    for seed in range(6):
        e, d = features(seed, 1, size), features(seed + 50, 1, size)
        # One scale is restored well, and so varies less than the other two.
        d[seed % 3] = e[seed % 3] + 0.3 * d[seed % 3]
        distances = [cosine_distance(a, b) for a, b in zip(e, d, strict=True)]
        upsampled = [
            F.interpolate(x[None], size=size, mode="bilinear", align_corners=True)[0, 0]
            for x in distances
        ]
        best = int(torch.stack([u.var() for u in upsampled]).argmin())
        calmest.add(best)
        certainty = 1 + distances[best].max()
        expected = gaussian_filter((certainty * sum(upsampled) / 3).numpy(), sigma=4)
        anomaly_map, score = AnomalyMap(size, refinement=True)(e, d)
        np.testing.assert_allclose(anomaly_map[0].numpy(), expected, atol=2e-6)
        assert score.item() == anomaly_map.max().item()
    assert len(calmest) > 1


def test_refinement_judges_each_image_of_a_batch_by_itself():
    e, d = features(0, 4), features(1, 4)
    refine = AnomalyMap((64, 96), refinement=True)
    together, _ = refine(e, d)
    for i in range(4):
        alone, _ = refine([x[i : i + 1] for x in e], [x[i : i + 1] for x in d])
        np.testing.assert_allclose(together[i].numpy(), alone[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("length", [32, 96])
def test_the_whole_sample_border_is_torchs_reflection(length):
    signal = torch.rand(1, 1, length, dtype=torch.float64)
    offsets = torch.arange(-16, 17)
    kernel = torch.exp(-0.5 * (offsets.double() / 4) ** 2)
    expected = F.conv1d(F.pad(signal, (16, 16), "reflect"), (kernel / kernel.sum())[None, None])
    actual = gaussian_matrix(length, 4, border="whole-sample") @ signal[0, 0]
    np.testing.assert_allclose(actual.numpy(), expected[0, 0].numpy(), atol=1e-12)
