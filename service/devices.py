"""Where a graph can run: CUDA and CPU by ONNX Runtime, CPU by OpenVINO.

OpenVINO is called directly and not as ONNX Runtime's plug-in, which turns away CPUs that are not
Intel's: on others with bfloat16 instructions, too, it takes less than half the time.
"""

import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort

from service import cores
from service.errors import BundleError, DeviceUnavailable
from service.external_data import check_self_contained

Device = Literal["auto", "cuda", "openvino", "cpu"]
# What convolutions are computed in; sums of cosines and what follows are float32, but for the
# products of the map, which are TF32 with tf32 and with float16 graphs on CUDA.
Precision = Literal["auto", "float32", "tf32", "bfloat16"]
Ports = list[tuple[str, str, tuple[int, ...]]]  # name, type, shape without the batch

log = logging.getLogger(__name__)

OUTPUTS = ("anomaly_map", "image_score")
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
# Where none is asked for. A CPU computes several images hardly faster than one after the other.
MAX_BATCH_SIZE = 8
MAX_CUDA_BATCH_SIZE = 32
CUDA_OPTIONS = {
    # Trying all kernels takes several times as long to start and, in float32, a few percent off.
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
    "enable_cuda_graph": "1",
}
FLOAT32_OPTIONS = CUDA_OPTIONS | {"use_tf32": "0"}
# Tensor cores want channels last, and where TF32 is not allowed cuDNN withholds them from float16
# as well. So the few products of the map are in TF32, too.
TENSOR_CORE_OPTIONS = CUDA_OPTIONS | {"use_tf32": "1", "prefer_nhwc": "1"}
# Nodes that compute with shapes, which ONNX Runtime leaves on the CPU on purpose.
SHAPE_NODES = {"Shape", "Size", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice", "Cast"}


class Session(Protocol):
    """A graph loaded on one device. `run` must be called by one thread at a time."""

    device: str
    provider: str
    precision: str
    batch_sizes: tuple[int, ...]  # that it is best at, ascending
    warm_sizes: tuple[int, ...]  # whose first run pays for memory and kernels, ascending
    pads: bool  # other sizes cost as much as the next larger one

    @property
    def ports(self) -> tuple[Ports, Ports]:
        """Inputs and outputs."""

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(maps (N, h, w), scores (N,)) of images (N, h, w, 3)."""

    def run_aside(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `run`, on one thread where that can be had: others compute meanwhile."""


def open_session(
    graph: bytes,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    max_batch_size: int = 0,
) -> Session:
    """The graph on `device`; `auto` is CUDA, else OpenVINO where the CPU computes bfloat16
    itself, else ONNX Runtime on the CPU. `threads` of 0 are as many as there are cores,
    `max_batch_size` of 0 is 32 on CUDA and 8 on a CPU (`cpu`: a multiple of `threads` near it).

    Raises DeviceUnavailable with the reason where a named device, or the precision on it, can't be
    had, and BundleError for a graph that doesn't load, or has weights in another file.
    """
    check_self_contained(graph)
    if device == "cuda":
        return CudaSession(graph, precision, max_batch_size)
    if device == "openvino":
        return OpenVinoSession(graph, precision, threads, max_batch_size)
    if device == "cpu":
        return CpuSession(graph, precision, threads, max_batch_size)
    if CUDA in ort.get_available_providers() and precision != "bfloat16":
        try:
            return CudaSession(graph, precision, max_batch_size)
        except DeviceUnavailable as error:
            log.warning("not using CUDA: %s", error)
    if precision in ("auto", "bfloat16") and has_openvino():
        try:
            return OpenVinoSession(graph, "bfloat16", threads, max_batch_size)
        except DeviceUnavailable as error:
            if precision == "bfloat16":
                raise
            log.info("auto leaves OpenVINO out: %s", error)
    return CpuSession(graph, precision, threads, max_batch_size)


def batch_sizes(largest: int) -> tuple[int, ...]:
    """The powers of two up to `largest`, and `largest` itself."""
    powers = (2**exponent for exponent in range(largest.bit_length()))
    return tuple(sorted({*powers, largest}))


class CpuSession:
    """ONNX Runtime's own kernels, in float32.

    All threads compute an image together. But of a batch that they can share out evenly, each
    computes its share alone: none waits for the others at the end of each layer, and that is worth
    holding the weights twice.
    """

    device, provider, precision, pads = "cpu", CPU, "float32", False

    def __init__(
        self,
        graph: bytes,
        precision: Precision = "auto",
        threads: int = 0,
        max_batch_size: int = 0,
    ) -> None:
        _check_precision(self.device, precision, ("float32",))
        self._thread_count = count = threads or cores.available()
        most = max_batch_size or count * max(1, MAX_BATCH_SIZE // count)
        self.batch_sizes = batch_sizes(most)
        shares = 1 < count <= most
        self.warm_sizes: tuple[int, ...] = (1, count) if shares else (1,)
        try:
            self._together = _cpu_session(graph, count)
            self._alone: Any = _cpu_session(graph, 1) if shares else None
        except Exception as error:  # the runtime raises many types with no common base
            raise BundleError(f"ONNX Runtime can't load the graph: {error}") from error
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="cpu")

    @property
    def ports(self) -> tuple[Ports, Ports]:
        return _ports(self._together)

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._alone is None or len(images) % self._thread_count or not len(images):
            maps, scores = self._together.run(OUTPUTS, {"image": images})
            return maps, scores
        shares = np.split(images, self._thread_count)
        maps, scores = zip(*self._threads.map(self._run_alone, shares), strict=True)
        return np.concatenate(maps), np.concatenate(scores)

    def run_aside(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        maps, scores = (self._alone or self._together).run(OUTPUTS, {"image": images})
        return maps, scores

    def _run_alone(self, images: np.ndarray) -> list[np.ndarray]:
        results: list[np.ndarray] = self._alone.run(OUTPUTS, {"image": images})
        return results


def _cpu_session(graph: bytes, threads: int) -> ort.InferenceSession:
    options = _session_options()
    options.intra_op_num_threads = threads
    # Threads that spin while they wait gain nothing here and take a core from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(graph, options, providers=[CPU])


class OpenVinoSession:
    """OpenVINO on the CPU; in bfloat16 where the CPU has instructions for it (AMX, AVX-512).

    Eight bits are too few for 1 - cosine: the network up to the features that are compared is one
    stage in bfloat16, cosines, map and score are another in float32.
    """

    device, provider, pads = "openvino", "OpenVINO", False
    warm_sizes: tuple[int, ...] = (1,)

    def __init__(
        self,
        graph: bytes,
        precision: Precision = "auto",
        threads: int = 0,
        max_batch_size: int = 0,
    ) -> None:
        openvino = import_openvino()
        self.batch_sizes = batch_sizes(max_batch_size or MAX_BATCH_SIZE)
        options = {
            "INFERENCE_NUM_THREADS": threads or cores.available(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # decoding shares the cores
        }
        try:
            core = openvino_core()
            native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            model = _read_onnx(graph)
            self.ports = _openvino_ports(model.inputs), _openvino_ports(model.outputs)
            features = _features(model.get_ordered_ops())
        except Exception as error:  # as in CpuSession
            raise DeviceUnavailable(f"device openvino can't load the graph: {error}") from error
        # Where no cosines are found, bfloat16 would be in them as well.
        offered = ("bfloat16", "float32") if native and features else ("float32",)
        lack = "the graph has no cosines" if native else "this CPU lacks AVX-512 BF16 and AMX"
        why = f": {lack}" if precision == "bfloat16" else ""
        _check_precision(self.device, precision, offered, why)
        self.precision = offered[0] if precision == "auto" else precision
        try:
            stages = [(model, "f32")]
            if self.precision == "bfloat16":
                network, cosines = _cut(openvino, model, features)
                stages = [(network, "bf16"), (cosines, "f32")]
            self._requests = [
                core.compile_model(
                    stage, "CPU", options | {"INFERENCE_PRECISION_HINT": hint}
                ).create_infer_request()
                for stage, hint in stages
            ]
        except Exception as error:  # as in CpuSession
            raise DeviceUnavailable(f"device openvino can't load the graph: {error}") from error

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._requests[0].infer({"image": images}, share_inputs=True, share_outputs=True)
        for earlier, later in pairwise(self._requests):
            for place in range(len(later.model_inputs)):
                later.set_input_tensor(place, earlier.get_output_tensor(place))
            later.infer(share_outputs=True)
        # Copies: the next run overwrites the tensors.
        maps, scores = (np.array(self._requests[-1].get_tensor(name).data) for name in OUTPUTS)
        return maps, scores

    def run_aside(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.run(images)


class CudaSession:
    """ONNX Runtime on an NVIDIA GPU, one CUDA graph for each batch size.

    A graph exported in float16 computes in that, its map's products in TF32; any other in float32
    (which agrees with the CPU's) or TF32 (which changes scores by about 1e-3).
    """

    device, provider, pads = "cuda", CUDA, True

    def __init__(
        self, graph: bytes, precision: Precision = "auto", max_batch_size: int = 0
    ) -> None:
        if CUDA not in ort.get_available_providers():
            raise DeviceUnavailable(
                "device cuda was asked for, but this ONNX Runtime is built without it: install "
                "the `gpu` extra (make serve RUNTIME=gpu) where there is an NVIDIA GPU"
            )
        _check_precision(self.device, precision, ("float32", "tf32"))
        ort.preload_dlls()
        asked: str = "float32" if precision == "auto" else precision
        session = _cuda_session(graph, asked)
        stored = session.get_modelmeta().custom_metadata_map.get("precision")
        if stored == "float16":  # only a loaded graph says so
            if precision != "auto":
                raise DeviceUnavailable(
                    f"precision {precision} was asked for, but the graph was exported in {stored}"
                )
            del session  # else both need room at once
            session, asked = _cuda_session(graph, stored), stored
        self.precision = asked
        # From here on it would log each plan of cuDNN's that can't be had, before it takes another.
        ort.set_default_logger_severity(4)
        self._session = session
        self.batch_sizes = self.warm_sizes = batch_sizes(max_batch_size or MAX_CUDA_BATCH_SIZE)
        try:
            self._batches = BoundBatches(session, "cuda", self.batch_sizes)
        except Exception as error:  # as in CpuSession
            raise DeviceUnavailable(f"device cuda has no room for batches: {error}") from error

    @property
    def ports(self) -> tuple[Ports, Ports]:
        return _ports(self._session)

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._batches.run(images)

    def run_aside(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.run(images)


def _cuda_session(graph: bytes, precision: str) -> ort.InferenceSession:
    """The graph on CUDA and nowhere else, or DeviceUnavailable."""
    options = _session_options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    provider_options = FLOAT32_OPTIONS if precision == "float32" else TENSOR_CORE_OPTIONS
    try:
        session = ort.InferenceSession(graph, options, [(CUDA, provider_options), CPU])
    except Exception as error:  # as in CpuSession
        raise DeviceUnavailable(f"device cuda can't load the graph: {error}") from error
    if session.get_providers()[0] != CUDA:
        # On a machine without a driver the session is made without an error, on the CPU.
        raise DeviceUnavailable(
            "device cuda was asked for, but ONNX Runtime fell back to "
            f"{session.get_providers()[0]}: no NVIDIA GPU, or a driver older than CUDA 13 needs"
        )
    check_placement(
        (node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )
    return session


class BoundBatches:
    """Batches padded to one of a few sizes, each with memory on the device that stays in place.

    What CUDA graphs need: they replay kernels with the addresses and shapes of their recording.
    Only uint8 pixels travel to the device, only maps and scores back.
    """

    def __init__(
        self, session: ort.InferenceSession, device: Literal["cuda", "cpu"], sizes: Sequence[int]
    ) -> None:
        self._batches = [_BoundBatch(session, device, size) for size in sorted(sizes)]

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Session.run; more than the largest size go in several runs."""
        largest = self._batches[-1].size
        results = [
            self._fitting(len(part)).run(part)
            for part in (images[i : i + largest] for i in range(0, len(images), largest))
        ]
        if len(results) == 1:
            return results[0]
        maps, scores = zip(*results, strict=True)
        return np.concatenate(maps), np.concatenate(scores)

    def _fitting(self, count: int) -> "_BoundBatch":
        return next(batch for batch in self._batches if batch.size >= count)


class _BoundBatch:
    def __init__(self, session: ort.InferenceSession, device: str, size: int) -> None:
        self.size, self._session = size, session
        self._binding = session.io_binding()
        height, width = session.get_inputs()[0].shape[1:3]

        def placed(dtype: type, *shape: int) -> ort.OrtValue:
            return ort.OrtValue.ortvalue_from_shape_and_type((size, *shape), dtype, device, 0)

        self._padded = np.zeros((size, height, width, 3), np.uint8)
        self._image = placed(np.uint8, height, width, 3)
        self._binding.bind_ortvalue_input("image", self._image)
        for name, value in zip(
            OUTPUTS, (placed(np.float32, height, width), placed(np.float32)), strict=True
        ):
            self._binding.bind_ortvalue_output(name, value)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(size))

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(images)
        if count < self.size:
            self._padded[:count] = images
            images = self._padded
        self._image.update_inplace(np.ascontiguousarray(images))
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding, self._options)
        maps, scores = self._binding.copy_outputs_to_cpu()
        return maps[:count], scores[:count]


def check_placement(nodes: Iterable[tuple[str, str]]) -> None:
    """Raises DeviceUnavailable where (operator, provider) pairs leave the CPU more than shapes."""
    left = sorted({kind for kind, provider in nodes if provider != CUDA} - SHAPE_NODES)
    if left:
        raise DeviceUnavailable(
            f"device cuda was asked for, but ONNX Runtime leaves {', '.join(left)} on the CPU"
        )


def _check_precision(
    device: str, precision: Precision, offered: Sequence[str], why: str = ""
) -> None:
    if precision not in ("auto", *offered):
        raise DeviceUnavailable(
            f"precision {precision} was asked for, but device {device} offers "
            f"{' and '.join(offered)} here{why}"
        )


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The same for ONNX Runtime; and weights in another file would be looked for where nothing is.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    return options


def _ports(session: ort.InferenceSession) -> tuple[Ports, Ports]:
    def described(ports: Any) -> Ports:
        types = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
        return [(p.name, types.get(p.type, p.type), tuple(p.shape[1:])) for p in ports]

    return described(session.get_inputs()), described(session.get_outputs())


@cache
def openvino_core() -> Any:
    """The one core of this process, kept for ever: each lends its thread a stack for signals, and
    of several that go in another order than they came the next SIGTERM would find a freed one."""
    return import_openvino().Core()


def _read_onnx(graph: bytes) -> Any:
    """As ONNX and nothing else: a core takes bytes for whatever format they may be."""
    from openvino.frontend import FrontEndManager

    onnx = FrontEndManager().load_by_framework("onnx")
    return onnx.convert(onnx.load(io.BytesIO(graph)))


def _openvino_ports(ports: Any) -> Ports:
    return [
        (
            port.any_name,
            str(port.element_type.to_dtype()),
            tuple(s.get_length() if s.is_static else -1 for s in list(port.partial_shape)[1:]),
        )
        for port in ports
    ]


def _features(nodes: list[Any]) -> list[Any]:
    """The outputs (N, channels, h, w) that are multiplied and then summed over channels: what goes
    into cosines, those of gated skips included."""
    found: dict[tuple[str, int], Any] = {}
    for node in nodes:
        product = node.input_value(0).get_node() if node.get_type_name() == "ReduceSum" else None
        if product is None or product.get_type_name() != "Multiply":
            continue
        if len(product.get_output_partial_shape(0)) == 4:
            for value in product.input_values():
                found[value.get_node().get_name(), value.get_index()] = value
    return list(found.values())


def _cut(openvino: Any, model: Any, outputs: list[Any]) -> tuple[Any, Any]:
    """(what leads to `outputs`, what follows from them) as two models."""
    before: set[str] = set()
    pending = [output.get_node() for output in outputs]
    while pending:
        node = pending.pop()
        if node.get_name() not in before:
            before.add(node.get_name())
            pending += [value.get_node() for value in node.input_values()]
    parameters = []
    outputs = [output for output in outputs if _users(output) - before]
    for output in outputs:
        shape, dtype = output.get_partial_shape(), output.get_element_type()
        parameters.append(openvino.opset13.parameter(shape, dtype))
        for port in output.get_target_inputs():
            if port.get_node().get_name() not in before:
                port.replace_source_output(parameters[-1].output(0))
    following = openvino.Model(model.get_results(), parameters)
    results = [openvino.opset13.result(output) for output in outputs]
    return openvino.Model(results, model.get_parameters()), following


def has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _users(output: Any) -> set[str]:
    return {port.get_node().get_name() for port in output.get_target_inputs()}


def import_openvino() -> Any:
    if not has_openvino():
        raise DeviceUnavailable(
            "device openvino was asked for, but openvino is not installed (the `cpu` extra brings "
            "it on Linux)"
        )
    # Its import would tell a web analytics service; without this package it has nobody to tell.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise DeviceUnavailable(f"OpenVINO can't be loaded: {error}") from error
    return openvino
