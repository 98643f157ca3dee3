"""The graph on a device: uint8 images in; one score and one anomaly map per image out.

ONNX Runtime's execution providers are the only device abstraction. A named device that can't be
had is an error; only `auto` chooses.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from service.errors import BundleError, DeviceUnavailable, InferenceFailed

Device = Literal["auto", "cuda", "openvino", "cpu"]

log = logging.getLogger(__name__)

PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
# TF32 would move scores by 1e-3; the exact arena growth keeps odd batch sizes from piling up.
CUDA_OPTIONS = {
    "use_tf32": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}
# The provider's own default on recent CPUs is bfloat16, 2e-3 away from every other device.
OPENVINO_OPTIONS = {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'}


@dataclass(frozen=True)
class Prediction:
    score: float  # the map's maximum
    anomaly_map: np.ndarray  # float32 (h, w) at the model's size


class Detector:
    """A graph loaded on one device. `run` must be called by one thread at a time.

    Raises DeviceUnavailable where a named device can't be had, and BundleError for a graph that
    doesn't load or whose interface differs from `image -> anomaly_map, image_score`.
    """

    def __init__(
        self, graph: bytes, image_size: tuple[int, int], device: Device = "auto", threads: int = 0
    ) -> None:
        self.image_size = image_size
        self.device, self._session = _open(graph, device, threads)
        self._check_interface()

    @property
    def provider(self) -> str:
        return PROVIDERS[self.device]

    def run(self, images: np.ndarray) -> list[Prediction]:
        """Predictions of uint8 (N, h, w, 3) RGB images at the model's size.

        Raises InferenceFailed with the runtime's reason, or where a score is no finite number.
        """
        try:
            maps, scores = self._session.run(["anomaly_map", "image_score"], {"image": images})
        except Exception as error:  # the runtime raises many types with no common base
            raise InferenceFailed(f"{self.provider}: {error}") from error
        if not np.isfinite(scores).all():
            raise InferenceFailed(f"{self.provider}: the graph gave a score that is no number")
        return [
            Prediction(float(score), anomaly_map)
            for score, anomaly_map in zip(scores, maps, strict=True)
        ]

    def warm_up(self, batch_size: int = 1) -> None:
        """Run once on gray images, so that the first request doesn't pay for memory and kernels."""
        self.run(np.full((batch_size, *self.image_size, 3), 128, np.uint8))

    def _check_interface(self) -> None:
        height, width = self.image_size
        inputs = [(i.name, i.type, i.shape[1:]) for i in self._session.get_inputs()]
        outputs = {o.name: o.type for o in self._session.get_outputs()}
        if inputs != [("image", "tensor(uint8)", [height, width, 3])]:
            raise BundleError(
                f"the graph's input must be image: uint8 (N, {height}, {width}, 3), is {inputs}"
            )
        if outputs != {"anomaly_map": "tensor(float)", "image_score": "tensor(float)"}:
            raise BundleError(
                f"the graph's outputs must be anomaly_map and image_score, float32; are {outputs}"
            )


def _open(graph: bytes, device: Device, threads: int) -> tuple[str, ort.InferenceSession]:
    if device != "auto":
        return device, _open_on(device, graph, threads)
    if PROVIDERS["cuda"] in ort.get_available_providers():
        try:
            return "cuda", _open_on("cuda", graph, threads)
        except DeviceUnavailable as error:
            log.warning("no CUDA device, using the CPU: %s", error)
    return "cpu", _open_on("cpu", graph, threads)


def _open_on(device: str, graph: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 3
    # The arena keeps the largest batch's memory for ever and is no faster for these graphs.
    options.enable_cpu_mem_arena = False
    providers: list[Any] = [PROVIDERS["cpu"]]
    if device == "cuda":
        if PROVIDERS["cuda"] not in ort.get_available_providers():
            raise DeviceUnavailable(
                "device cuda was asked for, but this ONNX Runtime is built without it: install "
                "the `gpu` extra (make RUNTIME=gpu)"
            )
        ort.preload_dlls()
        providers = [(PROVIDERS["cuda"], CUDA_OPTIONS), PROVIDERS["cpu"]]
    elif device == "openvino":
        providers = []
        options.add_provider_for_devices([_openvino_device()], OPENVINO_OPTIONS)
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # as in `run`
        if device == "cpu":
            raise BundleError(f"ONNX Runtime can't load the graph: {error}") from error
        raise DeviceUnavailable(f"device {device} can't load the graph: {error}") from error
    if session.get_providers()[0] != PROVIDERS[device]:
        # A CUDA session on a machine without a driver is made without an error, on the CPU.
        raise DeviceUnavailable(
            f"device {device} was asked for, but ONNX Runtime fell back to "
            f"{session.get_providers()[0]}: no NVIDIA GPU, or a driver older than CUDA 13 needs"
        )
    return session


def available_cores() -> int:
    """Cores that this process may use, which taskset and cpusets narrow: more threads than that
    spin against each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _openvino_device() -> Any:
    """OpenVINO's CPU device, its plug-in registered with ONNX Runtime once per process."""
    try:
        import onnxruntime_ep_openvino as plugin
    except ImportError:
        raise DeviceUnavailable(
            "device openvino was asked for, but onnxruntime-ep-openvino is not installed (the "
            "`cpu` extra brings it on Linux x86-64)"
        ) from None
    name = PROVIDERS["openvino"]
    if not any(device.ep_name == name for device in ort.get_ep_devices()):
        try:
            ort.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # as in `run`
            raise DeviceUnavailable(f"OpenVINO's provider can't be loaded: {error}") from error
    for device in ort.get_ep_devices():
        if device.ep_name == name and device.device.type == ort.OrtHardwareDeviceType.CPU:
            return device
    raise DeviceUnavailable(
        "device openvino was asked for, but OpenVINO's provider offers no CPU here: it runs on "
        "Intel CPUs only"
    )
