"""Checkpoints of the public codes -> bundles whose maps are those of the public codes' networks.

The networks here are plain versions written from the published layer tables, with the published
attribute names: an independent reference, and the makers of the files that are imported.
"""

import enum
import hashlib
import io
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from training_fixtures import normal_picture, randomise, torch, write_normal_pictures

from service import bundle as bundles
from service import image
from service.bundle import Bundle
from service.detector import Detector
from training.__main__ import main
from training.errors import TrainingError
from training.importers import import_checkpoint
from training.model import Teacher

F, nn = torch.nn.functional, torch.nn
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (64, 96)  # height, width


# The published networks


@dataclass(frozen=True)
class Backbone:
    deep: bool  # Bottleneck blocks, else BasicBlocks
    width: int  # inner width of a Bottleneck, in 64ths of its planes
    embedding: int  # blocks of bn_layer
    decoder: tuple[int, int, int]

    @property
    def expansion(self) -> int:
        return 4 if self.deep else 1


BACKBONES = {
    "resnet18": Backbone(False, 64, 2, (2, 2, 2)),
    "resnet34": Backbone(False, 64, 3, (3, 4, 6)),
    "wide_resnet50_2": Backbone(True, 128, 3, (3, 4, 6)),
}
ANOMALIB = {
    "resnet18": Backbone(False, 64, 2, (2, 2, 2)),
    "resnet34": Backbone(False, 64, 2, (3, 4, 6)),
    "wide_resnet50_2": Backbone(True, 64, 3, (3, 4, 6)),
}


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> "nn.Conv2d":
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    def __init__(self, inputs: int, planes: int, of: Backbone, resample: str = "") -> None:
        super().__init__()
        outputs = planes * of.expansion
        inner = planes * of.width // 64 if of.deep else outputs

        def spatial(inputs: int) -> nn.Module:
            if resample == "up":
                return nn.ConvTranspose2d(inputs, inner, 2, 2, bias=False)
            return conv(inputs, inner, 3, 2 if resample == "down" else 1)

        self.deep = of.deep
        self.conv1 = conv(inputs, inner, 1) if of.deep else spatial(inputs)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = spatial(inner) if of.deep else conv(inner, inner, 3)
        self.bn2 = nn.BatchNorm2d(inner)
        if of.deep:
            self.conv3 = conv(inner, outputs, 1)
            self.bn3 = nn.BatchNorm2d(outputs)
        if resample == "down":
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, 2), nn.BatchNorm2d(outputs))
        elif resample == "up":
            up = nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False)
            self.upsample = nn.Sequential(up, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.deep:
            y = self.bn3(self.conv3(F.relu(y)))
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return F.relu(y + x)


def layer(inputs: int, planes: int, count: int, of: Backbone, resample: str) -> "nn.Sequential":
    rest = [Block(planes * of.expansion, planes, of) for _ in range(count - 1)]
    return nn.Sequential(Block(inputs, planes, of, resample), *rest)


class PublishedBottleneck(nn.Module):
    """`bn`: RD4AD's fusion, or DRD's cascade."""

    def __init__(self, of: Backbone, cascade: bool) -> None:
        super().__init__()
        e, self.cascade = of.expansion, cascade
        self.bn_layer = layer((256 if cascade else 768) * e, 512, of.embedding, of, "down")
        self.conv1, self.bn1 = conv(64 * e, 128 * e, 3, 2), nn.BatchNorm2d(128 * e)
        if cascade:
            self.conv2, self.bn2 = conv(256 * e, 512 * e, 3, 2), nn.BatchNorm2d(512 * e)
            self.conv3, self.bn3 = conv(768 * e, 256 * e, 3), nn.BatchNorm2d(256 * e)
        else:
            self.conv2, self.bn2 = conv(128 * e, 256 * e, 3, 2), nn.BatchNorm2d(256 * e)
            self.conv3, self.bn3 = conv(128 * e, 256 * e, 3, 2), nn.BatchNorm2d(256 * e)
        self.conv4, self.bn4 = conv(1024 * e, 512 * e, 1), nn.BatchNorm2d(512 * e)  # never used

    def forward(self, features):
        e1, e2, e3 = features
        shallow = F.relu(self.bn1(self.conv1(e1)))
        if self.cascade:
            fused = F.relu(self.bn2(self.conv2(torch.cat([shallow, e2], 1))))
            return self.bn_layer(F.relu(self.bn3(self.conv3(torch.cat([fused, e3], 1)))))
        shallow = F.relu(self.bn2(self.conv2(shallow)))
        return self.bn_layer(torch.cat([shallow, F.relu(self.bn3(self.conv3(e2))), e3], 1))


class PublishedDecoder(nn.Module):
    def __init__(self, of: Backbone) -> None:
        super().__init__()
        e, (n1, n2, n3) = of.expansion, of.decoder
        self.layer1 = layer(512 * e, 256, n1, of, "up")
        self.layer2 = layer(256 * e, 128, n2, of, "up")
        self.layer3 = layer(128 * e, 64, n3, of, "up")

    def forward(self, z, features, skips: bool):
        _, e2, e3 = features
        d3 = self.layer1(z)
        d2 = self.layer2(F.relu(d3 + e3) if skips else d3)
        d1 = self.layer3(F.relu(d2 + e2) if skips else d2)
        return [d1, d2, d3]


class Published:
    """A public code's network with random weights and statistics, and its map of an image."""

    def __init__(self, format: str, backbone: str, seed: int = 1) -> None:
        of = (ANOMALIB if format == "anomalib" else BACKBONES)[backbone]
        self.format, self.backbone = format, backbone
        self.teacher = Teacher(backbone)
        self.bn = PublishedBottleneck(of, cascade=format == "drd").eval()
        # anomalib's decoder keeps the width that its bottleneck loses.
        self.decoder = PublishedDecoder(BACKBONES[backbone]).eval()
        for offset, module in enumerate((self.teacher, self.bn, self.decoder)):
            randomise(module, seed + offset)

    @torch.no_grad()
    def distances(self, pixels: np.ndarray, mean=MEAN, std=STD):
        x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
        features = self.teacher(x.permute(2, 0, 1)[None])
        restored = self.decoder(self.bn(features), features, self.format == "sk-rd4ad")
        for e, d in zip(features, restored, strict=True):
            low = 1 - F.cosine_similarity(e, d)[:, None]
            size = pixels.shape[:2]
            yield low, F.interpolate(low, size=size, mode="bilinear", align_corners=True)

    def anomaly_map(self, pixels: np.ndarray, **statistics: object) -> np.ndarray:
        """(h, w) of RGB uint8 (h, w, 3); DRD's is the one that its image score is taken from."""
        pairs = list(self.distances(pixels, **statistics))
        summed = sum(up for _, up in pairs)
        if self.format == "anomalib":
            taps = torch.exp(-0.5 * (torch.arange(-16.0, 17) / 4) ** 2)
            kernel = torch.outer(taps, taps) / taps.sum() ** 2
            padded = F.pad(summed, (16, 16, 16, 16), mode="reflect")
            return F.conv2d(padded, kernel[None, None])[0, 0].numpy()
        if self.format == "drd":
            calmest = min(pairs, key=lambda pair: pair[1].var())[0]
            summed = (1 + calmest.max()) * summed / 3
        return gaussian_filter(summed[0, 0].numpy(), sigma=4)

    def save(self, folder: Path, **changes: object) -> Path:
        """The file that the code's own script writes."""
        if self.format == "anomalib":
            return save_anomalib(folder / "model.ckpt", self, **changes)
        path = folder / "official.pth"
        torch.save({"bn": self.bn.state_dict(), "decoder": self.decoder.state_dict()}, path)
        torch.save(self.teacher.weights, folder / "teacher.pth")
        return path


def save_anomalib(path: Path, net: Published, **settings: object) -> Path:
    """A Lightning checkpoint as anomalib 2.6 writes it, its own classes included.

    `settings` are hyper-parameters, and tensors where they begin with `model.`; None leaves out.
    """
    state = {"post_processor._image_threshold": torch.tensor(2.4)}
    parts = {
        "encoder.feature_extractor": net.teacher.weights,
        "bottleneck": net.bn.state_dict(),
        "decoder": net.decoder.state_dict(),
    }
    for part, tensors in parts.items():
        state |= {f"model.{part}.{key}": value for key, value in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        mode = foreign(patch, "anomalib.models.image.reverse_distillation.anomaly_map", MapMode)
        hyper_parameters = {
            "pre_processor": True,
            "backbone": net.backbone,
            "layers": ("layer1", "layer2", "layer3"),
            "anomaly_map_mode": mode.ADD,
        }
        for name, value in settings.items():
            hyper_parameters[name] = value(patch) if callable(value) else value
        for key in [key for key in hyper_parameters if key.startswith("model.")]:
            state[key] = hyper_parameters.pop(key)
        state = {key: value for key, value in state.items() if value is not None}
        content = {
            "epoch": 0,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": state,
            "callbacks": {"ModelCheckpoint": {"best_model_score": None}},
            "hparams_name": "kwargs",
            "hyper_parameters": hyper_parameters,
        }
        torch.save(content, path)
    return path


class MapMode(str, enum.Enum):  # noqa: UP042  # as anomalib has it
    ADD = "add"
    MULTIPLY = "multiply"


class PreProcessor(nn.Module):
    def __init__(self, transform) -> None:
        super().__init__()
        self.transform = transform


class AttributeDict(dict):
    pass


def foreign(patch: pytest.MonkeyPatch, module: str, kind: type) -> type:
    """The class under the module that its library has it in, for as long as the patch holds."""
    parts = module.split(".")
    for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    patch.setattr(sys.modules[module], kind.__name__, kind, raising=False)
    patch.setattr(kind, "__module__", module)
    return kind


def pre_processor(*steps: object):
    """anomalib's, which drags the trainer's other objects into the file."""
    from torchvision.transforms.v2 import Compose

    def make(patch: pytest.MonkeyPatch):
        foreign(patch, "anomalib.pre_processing.pre_processor", PreProcessor)
        foreign(patch, "lightning.fabric.utilities.data", AttributeDict)
        made = PreProcessor(Compose(list(steps)) if len(steps) > 1 else steps[0])
        made.hparams = AttributeDict(layers=("layer1",), getter=getattr)
        return made

    return make


def resize(*size: int):
    from torchvision.transforms.v2 import Resize

    return Resize(size, antialias=True)


def normalise(mean=MEAN, std=STD):
    from torchvision.transforms.v2 import Normalize

    return Normalize(list(mean), list(std))


def run_import(net: Published, path: Path, models: Path, **options: object) -> Bundle:
    if net.format != "anomalib":
        options = {"teacher_weights": str(path.parent / "teacher.pth")} | options
    options = {"size": SIZE} | options
    return import_checkpoint(path, net.format, net.backbone, models, "part", **options)


def probes(size: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    noise = rng.integers(0, 256, (2, *size, 3), np.uint8)
    return [normal_picture(rng, size), normal_picture(rng, size), *noise]


def maps_of(bundle: Bundle) -> np.ndarray:
    detector = Detector(bundle.read_graph(), bundle.manifest.image_size, "cpu", 1)
    return np.stack(
        [p.anomaly_map for p in detector.run(np.stack(probes(bundle.manifest.image_size)))]
    )


@pytest.fixture(scope="module")
def rd4ad() -> Published:
    return Published("rd4ad", "resnet18")


@pytest.fixture(scope="module")
def anomalib() -> Published:
    return Published("anomalib", "resnet18")


# Maps


@pytest.mark.parametrize("format", ["rd4ad", "sk-rd4ad", "drd", "anomalib"])
@pytest.mark.parametrize(("backbone", "size"), [("resnet18", SIZE), ("wide_resnet50_2", (32, 64))])
def test_the_bundles_map_is_the_published_networks(tmp_path, format, backbone, size):
    net = Published(format, backbone)
    bundle = run_import(net, net.save(tmp_path), tmp_path / "models", size=size)
    expected = [net.anomaly_map(pixels) for pixels in probes(size)]
    np.testing.assert_allclose(maps_of(bundle), expected, rtol=0, atol=1e-4)
    # Else the tolerance would tell nothing: the same weights without skips, border or refinement.
    if format != "drd":
        net.format = "sk-rd4ad" if format == "rd4ad" else "rd4ad"
        others = [net.anomaly_map(pixels) for pixels in probes(size)]
        assert np.abs(np.array(others) - expected).max() > 1e-3


def test_anomalibs_resnet34_has_two_embedding_blocks(tmp_path):
    net = Published("anomalib", "resnet34")
    bundle = run_import(net, net.save(tmp_path), tmp_path / "models", size=(32, 64))
    expected = [net.anomaly_map(pixels) for pixels in probes((32, 64))]
    np.testing.assert_allclose(maps_of(bundle), expected, rtol=0, atol=1e-4)


# Keys


def altered(net: Published, folder: Path, part: str, **changes: object) -> Path:
    """The code's file with tensors of `bn` or `decoder` replaced, or left out (None)."""
    path = net.save(folder)
    saved = torch.load(path, weights_only=True)
    saved[part] = {k: v for k, v in (saved[part] | changes).items() if v is not None}
    torch.save(saved, path)
    return path


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("bn", "conv2.weight", None, "missing bn.conv2.weight"),
        ("bn", "bn_layer.0.downsample.1.bias", None, "missing bn.bn_layer.0.downsample.1.bias"),
        ("decoder", "layer1.0.upsample.0.weight", None, "missing decoder.layer1.0.upsample.0"),
        ("decoder", "layer3.1.bn2.running_var", None, "missing decoder.layer3.1.bn2.running_var"),
        ("bn", "conv5.weight", torch.ones(1), "unknown bn.conv5.weight"),
        ("decoder", "conv4.weight", torch.ones(1), "unknown decoder.conv4.weight"),
        ("decoder", "memory", torch.ones(1), "unknown decoder.memory"),
        (
            "bn",
            "bn_layer.1.conv1.weight",
            torch.ones(512, 512, 1, 1),
            r"misshaped bn.bn_layer.1.conv1.weight \(512, 512, 1, 1\) instead of "
            r"\(512, 512, 3, 3\)",
        ),
        ("bn", "bn3.weight", torch.full((256,), torch.nan), "not finite.* bn.bn3.weight"),
        ("bn", "bn3.running_var", torch.full((256,), -1.0), "not finite.* bn.bn3.running_var"),
        ("bn", "bn3.weight", torch.ones(256).bool(), "no dense.* bn.bn3.weight"),
        ("bn", "bn3.weight", torch.ones(256).cfloat(), "no dense.* bn.bn3.weight"),
        # 4 TB if anyone looked at its values.
        ("bn", "bn3.weight", torch.ones(1).expand(10**12), "misshaped bn.bn3.weight"),
        ("bn", "module.bn3.weight", torch.ones(256), "bn has tensors twice"),
    ],
)
def test_every_tensor_is_accounted_for_by_its_published_name(
    rd4ad, tmp_path, part, key, value, words
):
    path = altered(rd4ad, tmp_path, part, **{key: value})
    with pytest.raises(TrainingError, match=f"official.pth: {words}"):
        run_import(rd4ad, path, tmp_path / "models")
    assert bundles.versions(tmp_path / "models", "part") == []


def test_known_leftovers_and_data_parallels_prefix_change_nothing(rd4ad, tmp_path):
    path = rd4ad.save(tmp_path)
    saved = {
        part: {
            f"module.{key}": value
            for key, value in state.items()
            if not key.endswith("num_batches_tracked") and "bn4" not in key
        }
        for part, state in torch.load(path, weights_only=True).items()
    }
    saved["bn"]["module.memory0.units"] = torch.ones(3)
    torch.save(saved, path)
    bundle = run_import(rd4ad, path, tmp_path / "models")
    expected = [rd4ad.anomaly_map(pixels) for pixels in probes(SIZE)]
    np.testing.assert_allclose(maps_of(bundle), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "backbone", "words"),
    [
        ("rd4ad", "resnet34", "missing bn.bn_layer.2"),
        ("drd", "resnet18", "misshaped bn.bn2.bias"),
        ("rd4ad", "wide_resnet50_2", "missing"),
    ],
)
def test_another_network_than_was_said_is_refused(rd4ad, tmp_path, format, backbone, words):
    path = rd4ad.save(tmp_path)
    with pytest.raises(TrainingError, match=f"{words}.*--format and --backbone"):
        import_checkpoint(path, format, backbone, tmp_path, "part", size=SIZE)


def test_a_backbone_that_no_public_code_has_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="convnext_tiny: the public codes have resnet18, "):
        import_checkpoint(tmp_path / "x.pth", "rd4ad", "convnext_tiny", tmp_path, "part")


# Files


def test_a_decoder_alone_is_refused_with_the_reason(rd4ad, tmp_path):
    path = tmp_path / "seg1.pth"
    torch.save(rd4ad.decoder.state_dict(), path)
    with pytest.raises(TrainingError, match=r"--seg 1 saves it: the bottleneck .* is lost"):
        run_import(rd4ad, path, tmp_path)
    torch.save({"layer1.0.conv1.weight": torch.ones(1), "conv1.weight": torch.ones(1)}, path)
    with pytest.raises(TrainingError, match="must hold `bn` and `decoder`, holds layer1.0.conv1"):
        run_import(rd4ad, path, tmp_path)  # a teacher's file, for one


def test_the_projection_of_rd_plus_plus_is_refused_with_the_reason(rd4ad, tmp_path):
    path = rd4ad.save(tmp_path)
    torch.save(torch.load(path, weights_only=True) | {"proj": {}}, path)
    with pytest.raises(TrainingError, match=r"`proj` is RD\+\+'s projection"):
        run_import(rd4ad, path, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"bn": {}}, "must hold `bn` and `decoder`, holds bn"),
        ({"bn": {}, "decoder": {}, "epoch": 3}, "holds bn, decoder, epoch"),
        ({}, "holds nothing"),
        ({"bn": {"conv1.weight": 3}, "decoder": {}}, "bn is no state dict of tensors"),
        ([1, 2], "it holds a list"),
    ],
)
def test_a_file_of_something_else_is_refused(rd4ad, tmp_path, content, words):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(TrainingError, match=words):
        run_import(rd4ad, path, tmp_path)


@pytest.mark.parametrize("fixture", ["rd4ad", "anomalib"])
def test_bytes_that_are_no_checkpoint_are_refused(request, tmp_path, fixture):
    net = request.getfixturevalue(fixture)
    path = tmp_path / "garbage.ckpt"
    with pytest.raises(TrainingError, match="garbage.ckpt: no such file"):
        run_import(net, path, tmp_path)
    path.write_bytes(b"PK\x03\x04 neither zip nor pickle")
    with pytest.raises(TrainingError, match="garbage.ckpt: no checkpoint of plain tensors"):
        run_import(net, path, tmp_path)


class Malicious:
    """Runs `function(*arguments)` in a reader that trusts it."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("fixture", ["rd4ad", "anomalib"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    request, tmp_path, fixture, writer
):
    net = request.getfixturevalue(fixture)
    content = {"bn": {}, "decoder": Malicious(io.open, str(tmp_path / "ran"), "w")}
    path = tmp_path / "trap.pth"
    path.write_bytes(pickle.dumps(content))
    if writer == "torch":
        torch.save(content, path)
    with pytest.raises(TrainingError, match=r"trap\.pth: "):
        run_import(net, path, tmp_path)
    assert not (tmp_path / "ran").exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())["decoder"].close()  # so it was a working trap
        assert (tmp_path / "ran").exists()


def test_a_trap_among_anomalibs_own_names_is_refused_by_its_name(anomalib, tmp_path):
    trap = Malicious(io.open, str(tmp_path / "ran"), "w")
    path = save_anomalib(tmp_path / "model.ckpt", anomalib, visualizer=trap)
    with pytest.raises(TrainingError, match=r"model\.ckpt: names \S*open, which no checkpoint"):
        run_import(anomalib, path, tmp_path)
    assert not (tmp_path / "ran").exists()


# anomalib's settings


def test_the_teacher_size_and_statistics_come_from_anomalibs_checkpoint(anomalib, tmp_path):
    """From a file whose names are read and never called: this `getattr` would fail."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    path = save_anomalib(
        tmp_path / "model.ckpt",
        anomalib,
        pre_processor=pre_processor(resize(64, 32), normalise(mean, std)),
        visualizer=Malicious(getattr, nn.Linear, "no such attribute"),
    )
    bundle = run_import(anomalib, path, tmp_path / "models", size=None)
    assert bundle.manifest.image_size == (64, 32)
    expected = [anomalib.anomaly_map(p, mean=mean, std=std) for p in probes((64, 32))]
    np.testing.assert_allclose(maps_of(bundle), expected, rtol=0, atol=1e-4)
    teacher = bundle.manifest.teacher
    assert (teacher.origin, teacher.licence) == ("model.ckpt: encoder", "not stated")


def test_a_preparation_that_the_service_does_not_have_needs_a_size(anomalib, tmp_path, caplog):
    """And without a Normalize the network saw 0 to 1."""
    from torchvision.transforms.v2 import CenterCrop

    cropped = pre_processor(resize(96, 96), CenterCrop((64, 64)))
    path = save_anomalib(tmp_path / "model.ckpt", anomalib, pre_processor=cropped)
    with pytest.raises(TrainingError, match="went through Resize, CenterCrop .*--image-size H W"):
        run_import(anomalib, path, tmp_path / "models", size=None)
    bundle = run_import(anomalib, path, tmp_path / "models", size=(32, 64))
    assert "CenterCrop" in caplog.text and "imported for 32 x 64" in caplog.text
    expected = [anomalib.anomaly_map(p, mean=(0, 0, 0), std=(1, 1, 1)) for p in probes((32, 64))]
    np.testing.assert_allclose(maps_of(bundle), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"anomaly_map_mode": "multiply"}, "anomaly_map_mode 'multiply': maps are added"),
        ({"layers": ("layer2", "layer3")}, "layers .*'layer2', 'layer3'"),
        ({"backbone": "resnet50"}, "its backbone is resnet50, not resnet18"),
        ({"pre_processor": pre_processor(resize(100, 96))}, "image size 100: must be a multiple"),
        ({"pre_processor": pre_processor(resize(96))}, r"Resize to \[96\]"),
        ({"pre_processor": False}, "pre_processor can't be read"),
        ({"pre_processor": pre_processor(*[normalise((0,) * 3, (1,) * 3)] * 2)}, "a step twice"),
        ({"layers": 3}, "layers 3 are not"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_of_anomalib_that_are_not_reproduced_are_refused(
    anomalib, tmp_path, settings, words
):
    path = save_anomalib(tmp_path / "model.ckpt", anomalib, **settings)
    with pytest.raises(TrainingError, match=words):
        run_import(anomalib, path, tmp_path / "models", size=None)


def test_the_enum_of_multiplied_maps_is_refused_too(anomalib, tmp_path):
    path = save_anomalib(
        tmp_path / "model.ckpt", anomalib, anomaly_map_mode=lambda _: MapMode.MULTIPLY
    )
    with pytest.raises(TrainingError, match="anomaly_map_mode 'multiply'"):
        run_import(anomalib, path, tmp_path / "models")


def test_anomalib_brings_its_teacher_and_takes_no_other(anomalib, tmp_path):
    with pytest.raises(TrainingError, match="leave --teacher-weights out"):
        run_import(anomalib, anomalib.save(tmp_path), tmp_path, teacher_weights="hub")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("encoder.feature_extractor.layer2.0.conv1.weight", None, "missing"),
        ("bottleneck.bn_layer.0.downsample.0.weight", None, "missing"),
        ("decoder.layer1.0.upsample.1.running_mean", None, "missing"),
        ("encoder.feature_extractor.layer4.0.conv1.weight", torch.ones(1), "unknown"),
        ("projection.weight", torch.ones(1), "unknown"),
    ],
)
def test_every_tensor_is_accounted_for_by_anomalibs_name(anomalib, tmp_path, key, value, words):
    path = save_anomalib(tmp_path / "model.ckpt", anomalib, **{f"model.{key}": value})
    with pytest.raises(TrainingError, match=f"model.ckpt: {words} model.{key}"):
        run_import(anomalib, path, tmp_path / "models")


def test_a_ckpt_without_settings_is_refused(anomalib, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(TrainingError, match="lacks state_dict or hyper_parameters"):
        run_import(anomalib, path, tmp_path)


# Thresholds and records


def test_the_command_line_imports_with_a_threshold_from_normal_pictures(rd4ad, tmp_path, capsys):
    path = rd4ad.save(tmp_path)
    pictures = write_normal_pictures(tmp_path / "normals", 4)
    (tmp_path / "normals" / "again.png").write_bytes(pictures[2].read_bytes())
    command = ["import", "--format", "rd4ad", "--checkpoint", str(path), "--backbone", "resnet18"]
    command += ["--teacher-weights", str(tmp_path / "teacher.pth"), "--teacher-licence", "BSD"]
    command += ["--name", "part", "--models", str(tmp_path), "--version", "3", "--image-size"]
    command += [*map(str, SIZE), "--normals", str(tmp_path / "normals")]
    assert main(command) == 0
    assert "rate of 0.2, from 4 held-out" in capsys.readouterr().out

    bundle = Bundle(tmp_path / "part" / "3")
    manifest = bundle.manifest
    assert manifest.training == {
        "format": "rd4ad",
        "checkpoint": "official.pth",
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert manifest.teacher.licence == "BSD" and manifest.network.architecture == "rd4ad"
    assert manifest.data.trained == [] and len(manifest.data.held_out) == 4
    for held_out in manifest.data.held_out:
        pixels = image.resize(image.read(tmp_path / "normals" / held_out.file), SIZE)
        assert held_out.score == pytest.approx(rd4ad.anomaly_map(pixels).max(), abs=1e-4)
    golden = rd4ad.anomaly_map(bundle.golden_pixels()).max()
    assert manifest.golden.score == pytest.approx(golden, abs=1e-4)
    assert bundle.default_calibration().threshold == pytest.approx(
        max(h.score for h in manifest.data.held_out), rel=1e-4
    )

    assert main(command) == 1
    assert "part/3: exists" in capsys.readouterr().err


def test_without_normal_pictures_there_is_no_threshold_and_rounding_is_still_measured(
    rd4ad, tmp_path, capsys
):
    path = rd4ad.save(tmp_path)
    command = ["import", "--format", "rd4ad", "--checkpoint", str(path), "--backbone", "resnet18"]
    command += ["--teacher-weights", str(tmp_path / "teacher.pth"), "--weights", "float16"]
    command += ["--name", "part", "--models", str(tmp_path), "--image-size", *map(str, SIZE)]
    assert main(command) == 0
    assert "no threshold: calibrate it" in capsys.readouterr().out

    bundle = Bundle(tmp_path / "part" / "1")
    assert bundle.default_calibration() is None and bundle.manifest.data.held_out == []
    assert bundle.manifest.golden is None
    assert 0 < bundle.manifest.graph.weight_rounding < 2e-2
    assert len(bundle.read_graph()) < 40e6

    assert main([*command, "--precision", "float16"]) == 0
    graph = Bundle(tmp_path / "part" / "2").manifest.graph
    assert graph.precision == "float16" and 0 < graph.weight_rounding < 2e-2


def test_a_data_set_is_no_folder_of_normal_pictures(rd4ad, tmp_path):
    """Its train/good is what the network was trained on: the threshold would be too low."""
    path = rd4ad.save(tmp_path)
    write_normal_pictures(tmp_path / "data" / "train" / "good", 3)
    write_normal_pictures(tmp_path / "sorted" / "good", 3)
    write_normal_pictures(tmp_path / "sorted" / "bad", 3)
    for name, says in (("data", "is a data set"), ("", "is a data set"), ("sorted", "holds bad")):
        with pytest.raises(TrainingError, match=f"--normals: .*{name}.*{says}"):
            run_import(rd4ad, path, tmp_path, normals=tmp_path / name)


def test_a_name_that_the_service_could_not_be_asked_for_is_refused(rd4ad, tmp_path):
    with pytest.raises(TrainingError, match="--name Part A: must match"):
        import_checkpoint(tmp_path / "x.pth", "rd4ad", "resnet18", tmp_path, "Part A")
