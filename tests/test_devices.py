"""Every device gives the same answer, and none is replaced in silence."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import HAS_CUDA, SIZE, brightness_graph, picture, spotted

from service import devices
from service.devices import BoundBatches, CpuSession, OpenVinoSession, Session, open_session
from service.errors import BundleError, DeviceUnavailable

DEMO = Path(__file__).parents[1] / "models/demo/1/model.onnx"
IMAGES = np.stack([picture(0.2), spotted(0.8), picture(0.4)])

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
needs_no_cuda = pytest.mark.skipif(HAS_CUDA, reason="CUDA may be had here")


def has_bfloat16() -> bool:
    core = devices.openvino_core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _noting(counts: list[int], run: Callable) -> Callable:
    def noted(images: np.ndarray):
        counts.append(len(images))
        return run(images)

    return noted


def assert_same(session: Session, images: np.ndarray, rel: float) -> None:
    """Scores and maps as ONNX Runtime's on the CPU, relative to the greatest."""
    graph = DEMO.read_bytes() if images.shape[1:3] == (256, 256) else brightness_graph()
    for theirs, ours in zip(session.run(images), CpuSession(graph).run(images), strict=True):
        assert theirs.dtype == np.float32 and theirs.shape == ours.shape
        assert np.abs(theirs - ours).max() <= rel * ours.max()


def test_auto_serves_on_every_machine() -> None:
    session = open_session(brightness_graph())

    assert session.device in ("cuda", "openvino", "cpu")
    assert_same(session, IMAGES, 1e-2)


@needs_no_cuda
def test_auto_is_openvino_just_where_it_computes_bfloat16() -> None:
    fast = importlib.util.find_spec("openvino") is not None and has_bfloat16()

    session = open_session(DEMO.read_bytes())

    assert (session.device, session.precision) == (
        ("openvino", "bfloat16") if fast else ("cpu", "float32")
    )


@needs_no_cuda
def test_a_graph_without_cosines_is_never_computed_in_bfloat16() -> None:
    """There would be nothing that stays in float32."""
    assert open_session(brightness_graph()).device == "cpu"
    if importlib.util.find_spec("openvino") is not None:
        assert OpenVinoSession(brightness_graph()).precision == "float32"
        with pytest.raises(DeviceUnavailable, match="bfloat16 was asked for"):
            open_session(brightness_graph(), "auto", "bfloat16")


@needs_no_cuda
def test_an_openvino_that_is_broken_leaves_auto_to_onnx_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise DeviceUnavailable("OpenVINO can't be loaded: libtbb.so.12")

    monkeypatch.setattr(devices, "has_openvino", lambda: True)
    monkeypatch.setattr(devices, "import_openvino", broken)

    assert open_session(DEMO.read_bytes()).device == "cpu"
    with pytest.raises(DeviceUnavailable, match="libtbb"):
        open_session(DEMO.read_bytes(), "auto", "bfloat16")


@needs_no_cuda
def test_auto_in_float32_is_onnx_runtime() -> None:
    assert open_session(DEMO.read_bytes(), "auto", "float32").device == "cpu"


@needs_no_cuda
def test_auto_without_openvino_is_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_openvino", lambda: False)

    assert open_session(DEMO.read_bytes()).provider == "CPUExecutionProvider"
    with pytest.raises(DeviceUnavailable, match="openvino was asked for, but .* not installed"):
        open_session(brightness_graph(), "openvino")


@needs_no_cuda
def test_cuda_that_cannot_be_had_is_an_error_and_never_the_cpu() -> None:
    with pytest.raises(DeviceUnavailable, match="cuda was asked for"):
        open_session(brightness_graph(), "cuda")


@needs_openvino
def test_openvino_in_float32_gives_the_cpus_answer() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), np.uint8)

    session = OpenVinoSession(DEMO.read_bytes(), "float32")

    assert session.precision == "float32"
    assert_same(session, noise, 1e-5)


@needs_openvino
def test_openvino_in_bfloat16_gives_nearly_the_cpus_answer() -> None:
    if not has_bfloat16():
        with pytest.raises(DeviceUnavailable, match="bfloat16 was asked for, but .* float32 here"):
            OpenVinoSession(DEMO.read_bytes(), "bfloat16")
        return
    noise = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), np.uint8)

    session = OpenVinoSession(DEMO.read_bytes())

    assert session.precision == "bfloat16"
    assert_same(session, noise, 5e-3)
    assert (session.run(noise)[1].view(np.uint32) & 0xFFFF).all()  # no bfloat16 themselves
    scores = [session.run(noise[:count])[1][0] for count in (1, 2, 3)]
    assert len(set(scores)) == 1  # one image's score does not depend on who came with it


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_threads_share_an_even_batch_and_change_no_answer(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, *SIZE, 3), np.uint8)

    session = CpuSession(brightness_graph(), threads=3)
    shares = []
    monkeypatch.setattr(session, "_run_alone", _noting(shares, session._run_alone))

    maps, scores = session.run(images)

    assert shares == ([count // 3] * 3 if count % 3 == 0 else [])
    expected_maps, expected_scores = CpuSession(brightness_graph(), threads=1).run(images)
    assert np.array_equal(maps, expected_maps) and np.array_equal(scores, expected_scores)


def test_an_error_in_one_threads_share_fails_the_batch_and_the_next_one_runs() -> None:
    session = CpuSession(brightness_graph(fragile=True), threads=2)

    for _ in range(3):
        with pytest.raises(Exception, match="out of"):
            session.run(np.stack([picture(0.4), picture(1.0)]))
        assert session.run(np.stack([picture(0.2), picture(0.4)]))[1] == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize(
    ("threads", "largest", "sizes", "warm"),
    [
        (1, 0, (1, 2, 4, 8), (1,)),
        (2, 0, (1, 2, 4, 8), (1, 2)),
        (3, 0, (1, 2, 4, 6), (1, 3)),
        (12, 0, (1, 2, 4, 8, 12), (1, 12)),
        (3, 2, (1, 2), (1,)),
    ],
)
def test_a_full_batch_is_one_that_threads_share_out_evenly(
    threads: int, largest: int, sizes: tuple, warm: tuple
) -> None:
    """And the first of those is run before a client's is."""
    session = CpuSession(brightness_graph(), threads=threads, max_batch_size=largest)

    assert (session.batch_sizes, session.warm_sizes) == (sizes, warm)


@needs_openvino
def test_results_stay_as_they_are_when_the_next_batch_runs() -> None:
    for session in (OpenVinoSession(brightness_graph()), CpuSession(brightness_graph())):
        maps, scores = session.run(IMAGES[:1])
        kept = maps.copy(), scores.copy()
        session.run(IMAGES[1:2])
        assert np.array_equal(maps, kept[0]) and np.array_equal(scores, kept[1])


@needs_openvino
def test_signals_still_arrive_when_models_have_come_and_gone() -> None:
    code = """
import signal
from pathlib import Path
import numpy as np
from service.devices import OpenVinoSession

graph, images = Path("models/demo/1/model.onnx").read_bytes(), np.zeros((1, 256, 256, 3), np.uint8)
sessions = [OpenVinoSession(graph, precision, 1) for precision in ("float32", "auto", "auto")]
for session in sessions:
    session.run(images)
del sessions, session
signal.signal(signal.SIGTERM, lambda number, frame: print("arrived"))
signal.raise_signal(signal.SIGTERM)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "arrived"), result.stderr


@needs_openvino
def test_openvino_tells_nobody_that_it_is_used() -> None:
    code = "from service.devices import import_openvino; import_openvino(); import sys; "
    code += "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "bfloat16"), ("cpu", "tf32"), ("openvino", "tf32")]
)
def test_a_precision_that_a_device_lacks_is_refused(device: str, precision: str) -> None:
    if device == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    with pytest.raises(DeviceUnavailable, match=f"{precision} was asked for, but device {device}"):
        open_session(brightness_graph(), device, precision)  # type: ignore[arg-type]


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(BundleError, match="can't load the graph"):
        open_session(b"not onnx", "cpu")


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (32, (1, 2, 4, 8, 16, 32))]
)
def test_batch_sizes_are_powers_of_two_up_to_the_largest(largest: int, sizes: tuple) -> None:
    assert devices.batch_sizes(largest) == sizes
    assert open_session(brightness_graph(), "cpu", max_batch_size=largest).batch_sizes == sizes


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 11])
def test_bound_batches_are_padded_and_cut_back(count: int) -> None:
    """What CUDA runs, bound to the CPU's memory."""
    session = ort.InferenceSession(brightness_graph(), providers=["CPUExecutionProvider"])
    batches = BoundBatches(session, "cpu", (1, 2, 4))
    images = np.random.default_rng(count).integers(0, 256, (count, *SIZE, 3), np.uint8)

    maps, scores = batches.run(images)
    batches.run(255 - images)  # in the same memory

    expected_maps, expected_scores = CpuSession(brightness_graph()).run(images)
    assert np.array_equal(maps, expected_maps)
    assert np.array_equal(scores, expected_scores)


def test_bound_batches_take_images_that_are_not_contiguous() -> None:
    session = ort.InferenceSession(brightness_graph(), providers=["CPUExecutionProvider"])

    _, scores = BoundBatches(session, "cpu", (1, 4)).run(IMAGES[:, ::-1])

    assert scores == pytest.approx([51 / 255, 204 / 255, 102 / 255])


def test_nodes_that_compute_may_not_stay_on_the_cpu() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"

    devices.check_placement([("Conv", cuda), ("Shape", cpu), ("Gather", cpu)])
    with pytest.raises(DeviceUnavailable, match="leaves Conv, ReduceMax on the CPU"):
        devices.check_placement([("ReduceMax", cpu), ("Conv", cpu), ("MatMul", cuda)])
