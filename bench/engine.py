"""A bundle's graph on every device that this machine has, beside ONNX Runtime on the CPU.

    python -m bench.engine [--bundle models/demo/1 ...] [--out bench/results/engine]

Devices take turns and are compared within each round. The change of a score is the largest, on
drawn parts, from ONNX Runtime's on the CPU in float32. `cuda float16` is the graph that `export
--precision float16` would write, `openvino itself` OpenVINO with its own defaults on the whole
graph, as its documentation shows it. TFLOP/s count convolutions and matrix products; on a GPU a
large float16 product by torch tells its ceiling. The share of the map (upsampling, blur and
maximum) is from ONNX Runtime's profile of its nodes on the CPU.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from bench.turns import timed
from service import cores, devices, image
from service.bundle import Bundle
from service.devices import Device, Precision
from service.errors import DeviceUnavailable
from training import files
from training.benchmark import processor
from training.precision import compute_in_float16
from training.synthetic import draw

BATCHES = (1, 8)
CUDA_BATCHES = (1, 8, 32)
GPU_SIDE = 8192
PROBES = 16
FIRST = "cpu float32"
CHOICES: tuple[tuple[Device, Precision], ...] = (
    *(("cpu", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")),
    *(("cuda", "auto"), ("cuda", "tf32")),
)
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Row = dict[str, Any]


def runs(graph: bytes, threads: int) -> Iterator[tuple[str, Run]]:
    """Everything that this machine can run the graph on, ONNX Runtime on the CPU first."""
    for device, precision in CHOICES:
        try:
            session = devices.open_session(graph, device, precision, threads)
        except DeviceUnavailable as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        yield f"{device} {session.precision}", session.run
        if precision == "tf32":  # so CUDA is here
            yield "cuda float16", devices.open_session(compute_in_float16(graph), "cuda").run
    if devices.has_openvino():
        yield "openvino itself", _openvino_itself(graph, threads)


def _openvino_itself(graph: bytes, threads: int) -> Run:
    core = devices.openvino_core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(graph, b""), "CPU", options)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        results = compiled({"image": images}, share_inputs=True)
        return results["anomaly_map"], results["image_score"]

    return run


def measure(bundle: Bundle, threads: int, rounds: int) -> list[Row]:
    """A row for everything that runs, at every size of batch."""
    graph, images = bundle.read_graph(), parts(bundle.manifest.image_size)
    found, work = dict(runs(graph, threads)), gflop(graph)
    exact = scores(found[FIRST], images)
    changes = {n: np.abs(scores(run, images) / exact - 1).max() for n, run in found.items()}
    rows = []
    for batch in CUDA_BATCHES if any(name.startswith("cuda") for name in found) else BATCHES:
        some = np.resize(images, (batch, *images.shape[1:]))
        works = {name: partial(run, some) for name, run in found.items()}
        for name, taken in timed(works, rounds).items():
            row = {"graph": bundle.name, "engine": name, "batch": batch}
            row |= {"ms_per_image": 1e3 * taken.seconds / batch} | asdict(taken)
            row |= {"tflop_per_s": work * batch / taken.seconds / 1e3}
            rows.append(row | {"score_change": float(changes[name])})
            print(brief(rows[-1]), flush=True)
    return rows


def parts(size: tuple[int, int]) -> np.ndarray:
    """Drawn parts, good ones and others, uint8 (PROBES, h, w, 3)."""
    rng = np.random.default_rng(0)
    kinds = (None, "scratch", "crack", "dent")
    pictures = [draw(rng, kinds[i % len(kinds)])[0] for i in range(PROBES)]
    return np.stack([image.resize(picture, size) for picture in pictures])


def scores(run: Run, images: np.ndarray) -> np.ndarray:
    return np.concatenate([run(images[i : i + 8])[1] for i in range(0, len(images), 8)])


def gflop(graph: bytes) -> float:
    """Multiplications and additions of one image's convolutions and matrix products, in 1e9."""
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graph))
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = [dim.dim_value or 1 for dim in dims]  # a free one is the batch
    total = 0
    for node in model.graph.node:
        first, second = (shapes.get(name, []) for name in (*node.input, "")[:2])
        if node.op_type == "Conv":
            total += 2 * math.prod(shapes[node.output[0]]) * math.prod(second[1:])
        elif node.op_type == "ConvTranspose":
            total += 2 * math.prod(first) * math.prod(second[1:])
        elif node.op_type == "MatMul":
            total += 2 * math.prod(shapes[node.output[0]]) * first[-1]
    return total / 1e9


def gpu() -> str:
    """The GPU and the float16 matrix product that is its ceiling; empty without one."""
    if not torch.cuda.is_available():
        return ""
    matrix = torch.randn(GPU_SIDE, GPU_SIDE, device="cuda", dtype=torch.float16)

    def product() -> None:
        _ = matrix @ matrix
        torch.cuda.synchronize()

    seconds = timed({"product": product}, 3)["product"].seconds
    rate = 2 * GPU_SIDE**3 / seconds / 1e12
    return f"{torch.cuda.get_device_name()}, a float16 product by torch: {rate:.0f} TFLOP/s; "


def map_share(graph: bytes, threads: int, size: tuple[int, int]) -> float:
    """The share of ONNX Runtime's time on the CPU that goes to the nodes from the first matrix
    product of the anomaly map on."""
    nodes = {node.name for node in _from_products(onnx.load_model_from_string(graph))}
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(10):
            session.run(None, {"image": np.zeros((1, *size, 3), np.uint8)})
        events = json.loads(Path(session.end_profiling()).read_text())
    spent = {True: 0, False: 0}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["name"].removesuffix("_kernel_time") in nodes] += event["dur"]
    return spent[True] / sum(spent.values())


def _from_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    reached: set[str] = set()
    found = []
    for node in model.graph.node:  # in topological order
        if node.op_type == "MatMul" or reached & set(node.input):
            reached |= set(node.output)
            found.append(node)
    return found


def brief(row: Row) -> str:
    return (
        f"| {row['graph']} | {row['engine']} | {row['batch']} | {row['ms_per_image']:.3g} "
        f"| {row['tflop_per_s']:.3g} "
        f"| {row['times_as_fast']:.2f} ({row['least']:.2f} to {row['most']:.2f}) "
        f"| {row['score_change']:.1e} |"
    )


def table(rows: Sequence[Row], shares: dict[str, float], told: str) -> str:
    lines = ["| graph | on | batch | ms an image | TFLOP/s | times as fast | score change |"]
    lines += ["|---|---|---|---|---|---|---|", *map(brief, rows), ""]
    lines += [f"Upsampling, blur and maximum of {name}: {s:.1%}." for name, s in shares.items()]
    return "\n".join([*lines, "", told])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    demo = [Path("models/demo/1")]
    add("--bundle", type=Path, nargs="+", default=demo, metavar="DIR", help="default: the demo")
    add("--threads", type=int, default=cores.available(), help="default: one for each core")
    add("--rounds", type=int, default=5, help="turns of every device (default: 5)")
    add("--out", type=Path, metavar="DIR", help="write engine.md and engine.json here")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    shares = {}
    for bundle in map(Bundle, arguments.bundle):
        rows += measure(bundle, arguments.threads, arguments.rounds)
        size = bundle.manifest.image_size
        shares[bundle.name] = map_share(bundle.read_graph(), arguments.threads, size)
    told = (
        f"{arguments.threads} threads on {processor()}; {gpu()}ONNX Runtime {ort.__version__}; "
        f"{date.today()}; medians of {arguments.rounds} rounds (least to most)."
    )
    print("\n" + table(rows, shares, told))
    if arguments.out:
        record = {"rows": rows, "map_share": shares, "told": told}
        files.write_json(arguments.out / "engine.json", record, "--out")
        files.write_text(arguments.out / "engine.md", table(rows, shares, told) + "\n", "--out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
