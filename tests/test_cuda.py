"""The graph on an NVIDIA GPU: the CPU's answers, whatever ran before. Needs one."""

import gc
from pathlib import Path

import numpy as np
import pytest
from conftest import HAS_CUDA, SIZE, brightness_graph, inspect, picture, spotted
from fastapi.testclient import TestClient

from service import image
from service.app import create_app
from service.devices import CpuSession, CudaSession, Session, open_session
from service.errors import DeviceUnavailable
from service.settings import Settings

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models/demo/1/model.onnx"
MEGABYTE = 1 << 20

pytestmark = pytest.mark.skipif(
    not HAS_CUDA, reason="no NVIDIA GPU, or an ONNX Runtime without CUDA"
)


@pytest.fixture(scope="module")
def graph() -> bytes:
    return DEMO.read_bytes()


@pytest.fixture(scope="module")
def session(graph: bytes) -> CudaSession:
    return CudaSession(graph)


@pytest.fixture(scope="module")
def exact(graph: bytes) -> Session:
    return CpuSession(graph)


def noise(count: int, size: tuple[int, int] = (256, 256)) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *size, 3), np.uint8)


def assert_same(session: Session, exact: Session, images: np.ndarray, rel: float) -> None:
    """Relative to the greatest."""
    for found, expected in zip(session.run(images), exact.run(images), strict=True):
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(found - expected).max() <= rel * expected.max()


def differs(session: Session, exact: Session, size: tuple[int, int] = (256, 256)) -> bool:
    """By more than the order of float32 sums explains."""
    found, expected = (each.run(noise(3, size))[0] for each in (session, exact))
    return bool(np.abs(found - expected).max() > 1e-5 * expected.max())


def test_auto_is_cuda(graph: bytes) -> None:
    session = open_session(graph)

    assert (session.device, session.precision) == ("cuda", "float32")
    assert session.batch_sizes == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 32, 41])
def test_float32_gives_the_cpus_answer(session: Session, exact: Session, count: int) -> None:
    assert_same(session, exact, noise(count), 1e-5)


def test_tf32_gives_nearly_the_cpus_answer(graph: bytes, exact: Session) -> None:
    session = open_session(graph, "cuda", "tf32")

    assert session.precision == "tf32"
    assert_same(session, exact, noise(3), 5e-3)
    assert differs(session, exact)


def test_each_size_of_batch_replays_its_own_record(session: Session, exact: Session) -> None:
    """Whatever ran before, in whatever order."""
    rng = np.random.default_rng(0)
    for count in rng.permutation([1, 2, 3, 4, 7, 8, 16, 32] * 2):
        assert_same(session, exact, rng.integers(0, 256, (count, 256, 256, 3), np.uint8), 1e-5)


def test_results_stay_as_they_are_when_the_next_batch_runs(session: Session) -> None:
    maps, scores = session.run(noise(2))
    kept = maps.copy(), scores.copy()
    session.run(255 - noise(2))

    assert np.array_equal(maps, kept[0]) and np.array_equal(scores, kept[1])


def test_models_that_come_and_go_leave_the_others_answers_and_memory(
    session: Session, exact: Session, graph: bytes
) -> None:
    torch = pytest.importorskip("torch")

    free = []
    for _ in range(4):
        other = CudaSession(graph, max_batch_size=8)
        other.run(noise(8))
        assert_same(session, exact, noise(4), 1e-5)
        del other
        gc.collect()
        free.append(torch.cuda.mem_get_info()[0])

    assert free[0] - free[-1] < 32 * MEGABYTE


def test_mixed_batches_leave_memory_flat(session: Session) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)

    session.run(noise(32))
    before = torch.cuda.mem_get_info()[0]
    for count in rng.integers(1, 40, 60):
        session.run(noise(int(count)))

    assert before - torch.cuda.mem_get_info()[0] < 32 * MEGABYTE


@pytest.mark.parametrize("skips", ["none", "sk", "gated"])
def test_a_float16_graph_computes_in_it_as_its_export_promised(skips: str) -> None:
    """Within a tenth of what export allows."""
    pytest.importorskip("torch")
    from training_fixtures import randomise

    from training.export import Scorer, to_onnx
    from training.model import AnomalyMap, ReverseDistillation
    from training.precision import compute_in_float16, keep_pixels_whole

    model = ReverseDistillation("resnet18", skips, 16)
    randomise(model, 0)
    wide = keep_pixels_whole(to_onnx(Scorer(model, AnomalyMap(SIZE)).eval(), SIZE))
    narrow = compute_in_float16(wide)
    session = CudaSession(narrow)

    assert session.precision == "float16"
    for count in (1, 3, 8):
        assert_same(session, CpuSession(wide), noise(count, SIZE), 2e-3)
    assert differs(session, CpuSession(wide), SIZE)
    with pytest.raises(DeviceUnavailable, match="tf32 was asked for, .* exported in float16"):
        CudaSession(narrow, "tf32")


def test_the_service_inspects_on_cuda(tmp_path: Path) -> None:
    settings = Settings(
        models=ROOT / "models",
        database_url=f"sqlite:///{tmp_path / 'service.sqlite'}",
        device="cuda",
    )
    with TestClient(create_app(settings)) as client:
        assert "CUDAExecutionProvider in float32" in client.get("/readyz").json()["detail"]
        for name in ("normal", "anomalous"):
            data = (ROOT / f"examples/{name}.png").read_bytes()
            answer = inspect(client, data).json()
            pixels, _ = image.decode_to(data, (256, 256))
            (score,) = CpuSession(DEMO.read_bytes()).run(pixels[None])[1]
            assert answer["decision"] == name
            assert answer["score"] == pytest.approx(score, rel=1e-5)


def test_images_of_another_size_are_refused_and_the_next_batch_runs() -> None:
    session = CudaSession(brightness_graph(), max_batch_size=2)

    with pytest.raises(Exception, match=r"(?i)shape|dimension|size"):
        session.run(np.zeros((1, 8, 8, 3), np.uint8))
    assert session.run(spotted(0.8)[None])[1][0] == pytest.approx(204 / 255, rel=1e-5)
    assert session.run(np.stack([picture(0.4)] * 5))[1] == pytest.approx([0.4] * 5, rel=1e-5)


def test_pictures_of_any_layout_are_read(session: Session, exact: Session) -> None:
    assert_same(session, exact, noise(2)[:, ::-1, ::-1], 1e-5)
