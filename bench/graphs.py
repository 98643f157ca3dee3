"""Bundles to measure serving with.

    python -m bench.graphs [--out runs/bench/models] [--wide]

`light` keeps the graph's whole interface (docs/architecture.md) at under a millisecond, so that
decoding and serving are all that is measured: its anomaly map is how far a pixel's brightness lies
from the mean of its block. `resnet18` is the shipped demo model. `wide-resnet50` has random
weights: it takes the time of a trained one, and its scores mean nothing.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service import bundle as bundles
from service.bundle import (
    Bundle,
    Graph,
    HeldOutImage,
    Manifest,
    Network,
    Teacher,
    TrainingData,
)
from service.image import digest

FOLDER = Path("runs/bench/models")
DEMO = Path("models/demo/1")
SIZE = (256, 256)
BLOCK = 8  # pixels
HELD_OUT = 99  # what a rate of 1 % takes
LIGHT_THRESHOLD = 0.9  # a white pixel alone in a black block scores 63 / 64


def light_graph(size: tuple[int, int] = SIZE) -> bytes:
    """|brightness - the mean of its block|, from 0 to 1, and the maximum."""
    height, width = size
    blocks = [0, height // BLOCK, BLOCK, width // BLOCK, BLOCK]  # 0: as it is, the batch
    nodes = [
        helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["levels", "channel"], ["gray"], keepdims=0),
        helper.make_node("Mul", ["gray", "scale"], ["brightness"]),
        helper.make_node("Reshape", ["brightness", "blocks"], ["blocked"]),
        helper.make_node("ReduceMean", ["blocked", "within"], ["mean"]),
        helper.make_node("Sub", ["blocked", "mean"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("Reshape", ["distance", "whole"], ["anomaly_map"]),
        helper.make_node("ReduceMax", ["anomaly_map", "places"], ["image_score"], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(np.array(1 / 255, np.float32), "scale"),
        numpy_helper.from_array(np.array([3], np.int64), "channel"),
        numpy_helper.from_array(np.array(blocks, np.int64), "blocks"),
        numpy_helper.from_array(np.array([2, 4], np.int64), "within"),
        numpy_helper.from_array(np.array([0, height, width], np.int64), "whole"),
        numpy_helper.from_array(np.array([1, 2], np.int64), "places"),
    ]
    graph = helper.make_graph(
        nodes,
        "light",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *size, 3])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", *size]),
            helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["batch"]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def manifest_of(graph: bytes, name: str, backbone: str, threshold: float) -> Manifest:
    """A manifest that says what is true of a graph that nobody trained.

    Held-out scores that end just below `threshold`, as no picture was held out.
    """
    scores = np.linspace(0.9, 1, HELD_OUT) * threshold
    return Manifest(
        name=name,
        version=1,
        created=datetime.now(UTC).replace(microsecond=0),
        image_size=SIZE,
        graph=Graph(
            sha256=digest(graph), opset=20, weights="float32", parity=0.0, weight_rounding=0.0
        ),
        network=Network(
            architecture="benchmark",
            backbone=backbone,
            skips="none",
            consistency_rate=None,
            embedding_planes=0,
        ),
        teacher=Teacher(origin="none", sha256=digest(b""), licence="Apache-2.0"),
        data=TrainingData(
            fingerprint=digest(b""),
            trained=[],
            held_out=[
                HeldOutImage(file=f"{number:03}", sha256=digest(bytes([number])), score=float(s))
                for number, s in enumerate(scores)
            ],
        ),
        training={},
        metrics={},
    )


def wide_graph() -> bytes:
    """SK-RD4AD over WideResNet-50-2 as `train` would begin it, by the training package's export.

    Its batch norms shift, as trained ones do: without, no convolution would have a bias.
    """
    import torch

    from training.export import Scorer, to_onnx
    from training.model import AnomalyMap, from_settings
    from training.settings import Settings

    torch.manual_seed(0)
    model = from_settings(Settings("none", "wide-resnet50", backbone="wide_resnet50_2"))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return to_onnx(Scorer(model, AnomalyMap(SIZE)).eval(), SIZE)


def write(folder: Path, *, wide: bool = False) -> list[Bundle]:
    """The bundles, each in a models folder of its own: `folder/<name>/<name>/1`.

    What is there stays, as bundles never change, but for a demo that has been trained anew: delete
    the folder to have the others made anew.
    """

    def target(name: str) -> Path:
        return folder / name / name / "1"

    made = [
        _made(target("light"), light_graph, "none", LIGHT_THRESHOLD),
        copied(Bundle(DEMO), target("resnet18")),
    ]
    if wide:
        made.append(_made(target("wide-resnet50"), wide_graph, "wide_resnet50_2", 3.0))
    return [Bundle(each) for each in made]


def copied(bundle: Bundle, target: Path) -> Path:
    """The bundle under the name and version that `target` says, in place of another graph."""
    if target.exists() and Bundle(target).digest != bundle.digest:
        shutil.rmtree(target)
    if not target.exists():
        said = {"name": target.parent.name, "version": int(target.name)}
        manifest = bundle.manifest.model_copy(update=said)
        bundles.write(target, manifest, bundle.read_graph(), bundle.read_golden())
    return target


def _made(target: Path, make: Callable[[], bytes], backbone: str, threshold: float) -> Path:
    if not target.exists():
        graph = make()
        bundles.write(target, manifest_of(graph, target.parent.name, backbone, threshold), graph)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.graphs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--wide", action="store_true", help="the WideResNet as well: minutes")
    arguments = parser.parse_args(argv)
    for bundle in write(arguments.out, wide=arguments.wide):
        print(bundle.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
