"""The graph on a device: exact answers, one interface, and no silent fallback."""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import SIZE, brightness_graph, picture, spotted

from service.detector import Detector
from service.errors import BundleError, DeviceUnavailable, InferenceFailed

has_openvino = importlib.util.find_spec("onnxruntime_ep_openvino") is not None
cpu_info = Path("/proc/cpuinfo")
is_intel = cpu_info.exists() and "GenuineIntel" in cpu_info.read_text()


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(brightness_graph(), SIZE, "cpu", threads=1)


def test_every_image_of_a_batch_gets_its_own_score_and_map(detector: Detector) -> None:
    predictions = detector.run(np.stack([picture(0.2), spotted(0.8), picture(0.4)]))

    assert [p.score for p in predictions] == pytest.approx([51 / 255, 204 / 255, 102 / 255])
    assert all(p.anomaly_map.shape == SIZE for p in predictions)
    assert all(p.score == p.anomaly_map.max() for p in predictions)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_batch_size_gives_the_same_scores(detector: Detector, count: int) -> None:
    predictions = detector.run(np.stack([spotted(0.8)] * count))

    assert [p.score for p in predictions] == pytest.approx([204 / 255] * count)


def test_auto_serves_on_a_machine_without_a_gpu() -> None:
    detector = Detector(brightness_graph(), SIZE, "auto")

    assert detector.provider in ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert detector.run(picture(0.2)[None])[0].score == pytest.approx(0.2)


@pytest.mark.skipif(
    ort.get_device() == "GPU" and "CUDAExecutionProvider" in ort.get_available_providers(),
    reason="this ONNX Runtime may have CUDA",
)
def test_cuda_that_cannot_be_had_is_an_error_and_never_the_cpu() -> None:
    with pytest.raises(DeviceUnavailable, match="cuda was asked for"):
        Detector(brightness_graph(), SIZE, "cuda")


@pytest.mark.skipif(not (has_openvino and is_intel), reason="needs OpenVINO and an Intel CPU")
def test_openvino_gives_the_cpus_answer(detector: Detector) -> None:
    images = np.stack([picture(0.2), spotted(0.8)])

    other = Detector(brightness_graph(), SIZE, "openvino")

    assert other.provider == "OpenVINOExecutionProvider"
    for ours, theirs in zip(detector.run(images), other.run(images), strict=True):
        assert theirs.score == pytest.approx(ours.score, rel=1e-5)
        assert np.allclose(theirs.anomaly_map, ours.anomaly_map, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(has_openvino and is_intel, reason="OpenVINO can be had here")
def test_openvino_that_cannot_be_had_is_an_error_and_never_the_cpu() -> None:
    with pytest.raises(DeviceUnavailable, match="openvino was asked for"):
        Detector(brightness_graph(), SIZE, "openvino")


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(BundleError, match="can't load the graph"):
        Detector(b"not onnx", SIZE, "cpu")


def test_a_graph_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(BundleError, match=r"\(N, 64, 96, 3\).*\[32, 32, 3\]"):
        Detector(brightness_graph((32, 32)), SIZE, "cpu")


def test_a_graph_with_other_outputs_is_refused() -> None:
    with pytest.raises(BundleError, match="outputs must be anomaly_map"):
        Detector(brightness_graph(output="heat"), SIZE, "cpu")


def test_an_error_of_the_runtime_is_reported_and_the_next_batch_runs() -> None:
    fragile = Detector(brightness_graph(fragile=True), SIZE, "cpu")
    white = picture(1.0)

    with pytest.raises(InferenceFailed, match="CPUExecutionProvider: .*out of"):
        fragile.run(white[None])
    assert fragile.run(picture(0.4)[None])[0].score == pytest.approx(0.4)
