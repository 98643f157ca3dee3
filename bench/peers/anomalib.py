"""anomalib's inferencers on its reverse distillation: pictures a second, from file to score.

    python -m bench.peers.anomalib --image part.jpg [--seconds 5]

ResNet-18 at 256 x 256 with random weights. As its documentation has it: `export`, then
`TorchInferencer` and `OpenVINOInferencer` and their `predict` with a path. It has no server and
takes one picture at a time; both use all cores. Prints JSON.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TRUST_REMOTE_CODE"] = "1"  # what TorchInferencer asks for to read its own export

import numpy as np
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import ReverseDistillation

WARM_UP_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    image = arguments.image.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # OpenVINO's cache is written to where one stands
        model = ReverseDistillation(backbone="resnet18", pre_trained=False)
        engine = Engine(default_root_dir=folder, logger=False)
        torch_file = engine.export(model, ExportType.TORCH)
        openvino_file = engine.export(model, ExportType.OPENVINO)
        found = {
            "TorchInferencer": TorchInferencer(torch_file, device="cpu").predict,
            "OpenVINOInferencer": OpenVINOInferencer(openvino_file, device="CPU").predict,
        }
        rows = {name: measure(predict, image, arguments.seconds) for name, predict in found.items()}
    print(json.dumps(rows))


def measure(predict: Callable[[Path], object], image: Path, seconds: float) -> dict[str, float]:
    taken, begin = [], time.perf_counter()
    while (started := time.perf_counter()) < begin + WARM_UP_S + seconds:
        predict(image)
        if started >= begin + WARM_UP_S:
            taken.append(1e3 * (time.perf_counter() - started))
    p50, p95, p99 = np.percentile(taken, (50, 95, 99)).tolist()
    rate = 1e3 * len(taken) / sum(taken)
    return {"images_per_s": rate, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


if __name__ == "__main__":
    main()
