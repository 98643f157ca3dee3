"""int8 beside float on the CPU: how much faster it is, and what it does to scores.

    python -m bench.quantisation --bundle models/my-part/1 --data my-part [--threads 2]

ONNX Runtime quantises the bundle's convolutions statically, weights by channel, calibrated on
pictures that it was trained on: held-out ones must stay like new ones, and test ones unseen. The
graphs take turns in short blocks and are compared within each round, as other work on the machine
slows all alike; speed is that of the fastest float path, changes are from float32.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from bench.turns import in_turns
from service.bundle import Bundle
from service.cores import available
from service.detector import Detector
from service.devices import Device
from training import data, datasets
from training.benchmark import hardware
from training.errors import TrainingError
from training.evaluate import are_anomalous, labelled_images
from training.export import score
from training.metrics import image_metrics

FLOAT, INT8 = "float", "int8"
NOT_FIRST, NOT_DECODER = "int8 but for the first convolution", "int8 but for the decoder"
PATHS: tuple[tuple[str, Device], ...] = (
    *((FLOAT, "cpu"), (FLOAT, "openvino")),
    *((INT8, "cpu"), (INT8, "openvino")),
    *((NOT_FIRST, "openvino"), (NOT_DECODER, "openvino")),
)
BATCHES = (1, 8)


class Pictures:
    """A CalibrationDataReader: images uint8 (N, H, W, 3) one by one, and then None."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image[None]}


def quantised(graph: bytes, which: str, images: np.ndarray) -> bytes:
    """The graph with int8 convolutions, calibrated on images uint8 (N, H, W, 3)."""
    model = onnx.load_model_from_string(graph)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    left_out = {
        INT8: [],
        NOT_FIRST: convolutions[:1],
        NOT_DECODER: [node for node in convolutions if "decoder" in node.input[1]],
    }[which]
    add_pre_process_metadata(model)  # batch norm is folded and shapes are inferred already
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            target,
            Pictures(images),
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[node.name for node in left_out],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


def trained_on(bundle: Bundle, root: Path, count: int) -> np.ndarray:
    """The first `count` pictures below `root` that the bundle was trained on."""
    category = str(bundle.manifest.training.get("category") or "")
    paths = datasets.read(root, category=category).to_train_on()
    loaded = data.load(paths, bundle.manifest.image_size, strict=True, what="normal images")
    known = set(bundle.manifest.data.trained)
    kept = [i for i, digest in enumerate(loaded.digests) if digest in known][:count]
    if not kept:
        raise TrainingError(f"{root}: holds no picture that {bundle.folder} was trained on")
    return loaded.pixels[kept]


def measure(
    detectors: Sequence[Detector], images: np.ndarray, rounds: int, seconds: float
) -> list[list[float]]:
    """Seconds per image of each detector in each round, in turns of about `seconds`."""
    taken = in_turns([partial(detector.run, images) for detector in detectors], rounds, seconds)
    return [[each / len(images) for each in times] for times in taken]


def ratios(taken: list[list[float]], baselines: Sequence[int]) -> list[list[float]]:
    """How many times as fast each is, round by round, as the fastest of the `baselines`."""
    best = min((taken[i] for i in baselines), key=statistics.median)
    return [[a / b for a, b in zip(best, times, strict=True)] for times in taken]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantisation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="in float32: MODELS/NAME/VERSION")
    add("--data", type=Path, required=True, metavar="DIR", help="what it was trained on, labelled")
    add("--pictures", type=int, default=64, help="to calibrate on (default 64)")
    add("--threads", type=int, default=available(), help="default: all")
    add("--rounds", type=int, default=7, help="default 7")
    add("--seconds", type=float, default=1.0, help="of a turn, about (default 1)")
    arguments = parser.parse_args(argv)

    bundle = Bundle(arguments.bundle)
    size, held_out = bundle.manifest.image_size, bundle.manifest.data.held_out
    graphs = {FLOAT: bundle.read_graph()}
    calibrating = trained_on(bundle, arguments.data, arguments.pictures)
    for which in (INT8, NOT_FIRST, NOT_DECODER):
        graphs[which] = quantised(graphs[FLOAT], which, calibrating)
    detectors = [Detector(graphs[g], size, device, arguments.threads) for g, device in PATHS]
    floats = [i for i, (graph, _) in enumerate(PATHS) if graph == FLOAT]

    tests = labelled_images(bundle, arguments.data, None, None)
    shown = data.load([t.path for t in tests], size, strict=True, what="test images").pixels
    paths = [arguments.data / image.file for image in held_out]
    normals = data.load(paths, size, strict=True, what="held-out images").pixels
    exact = score(detectors[0], normals)
    changes = [np.abs(score(detector, normals) / exact - 1).max() for detector in detectors]
    aurocs = [
        image_metrics(score(detector, shown), are_anomalous(tests)).auroc for detector in detectors
    ]
    speeds = [
        ratios(measure(detectors, shown[:batch], arguments.rounds, arguments.seconds), floats)
        for batch in BATCHES
    ]

    print(f"| {bundle.manifest.network.architecture}, {size[0]} x {size[1]} | MB ", end="")
    print(*(f"| times as fast, batch {batch} " for batch in BATCHES), sep="", end="")
    print("| image AUROC | its change | held-out scores change by at most |")
    print("|---" * (5 + len(BATCHES)) + "|")
    for i, (which, device) in enumerate(PATHS):
        precision = detectors[i].precision if which == FLOAT else which
        print(f"| {precision}, {device} | {len(graphs[which]) / 1e6:.1f} ", end="")
        for speed in speeds:
            least, most = min(speed[i]), max(speed[i])
            print(f"| {statistics.median(speed[i]):.2f} ({least:.2f} to {most:.2f}) ", end="")
        print(f"| {aurocs[i]:.4f} | {aurocs[i] - aurocs[0]:+.4f} | {changes[i]:.1%} |")
    torch.set_num_threads(arguments.threads)  # what `hardware` tells
    print(
        f"\n{hardware(torch.device('cpu'))}; ONNX Runtime {onnxruntime.__version__}; "
        f"{date.today()}; medians of {arguments.rounds} rounds of {arguments.seconds:g} s (least "
        f"to most); {len(calibrating)} pictures to calibrate on, {len(normals)} held out, "
        f"{len(shown)} tested."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
