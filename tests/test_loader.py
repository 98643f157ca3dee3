"""Loading beside those that serve, and that what served is really freed."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from conftest import brightness_graph, encoded, golden_of, inspect, normal_pictures, picture
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_serve import wait_for

from service import devices
from service.app import create_app
from service.bundle import Bundle
from service.detector import Detector
from service.errors import BundleError, InferenceFailed, NoNumber
from service.loader import Loader, _is_graphs_fault
from service.metrics import Metrics
from service.settings import Settings

Write = Callable[..., Bundle]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Every runtime session that is made from here on, not held."""
    made: list[weakref.ref] = []
    original = devices._cpu_session

    def make(graph: bytes, threads: int):
        session = original(graph, threads)
        made.append(weakref.ref(session))
        return session

    monkeypatch.setattr(devices, "_cpu_session", make)
    return made


@contextmanager
def no_collector() -> Iterator[None]:
    """What is freed here is freed because nobody holds it, not because somebody looked."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(sessions: list[weakref.ref]) -> int:
    return sum(session() is not None for session in sessions)


def activate(client: TestClient, version: int):
    return client.post(f"/v1/models/part/versions/{version}/activate")


def test_the_session_of_a_replaced_version_is_freed(
    settings: Settings, write_bundle: Write, sessions: list[weakref.ref]
) -> None:
    for version in (1, 2, 3):
        write_bundle(version=version)
    with TestClient(create_app(settings)) as client, no_collector():
        for version in (1, 2, 3, 1):
            inspect(client, encoded(picture()))
            activate(client, version)

        wait_for(lambda: alive(sessions) == 1, f"{alive(sessions)} sessions")
        assert len(sessions) == 5


def test_it_is_freed_although_requests_to_it_failed(
    settings: Settings, write_bundle: Write, sessions: list[weakref.ref]
) -> None:
    write_bundle(version=1)
    write_bundle(version=2, graph=brightness_graph(fragile=True))
    with (
        TestClient(create_app(settings), raise_server_exceptions=False) as client,
        no_collector(),
    ):
        for data, status in ((encoded(picture(1.0)), 500), (b"no picture", 400)):
            assert_problem(inspect(client, data), status)
        assert_problem(inspect(client, encoded(picture()), digest="f" * 64), 409)

        activate(client, 1)

        wait_for(lambda: alive(sessions) == 1, f"{alive(sessions)} sessions")


def test_it_is_freed_after_a_calibration_and_a_shadow(
    settings: Settings, write_bundle: Write, sessions: list[weakref.ref]
) -> None:
    for version in (1, 2):
        write_bundle(version=version)
    with TestClient(create_app(settings)) as client, no_collector():
        files = [("images", (name, data, "image/png")) for name, data in normal_pictures(20)]
        made = client.post("/v1/calibrate", files=files, params={"target_fpr": 0.05})
        assert made.status_code == 201
        client.put("/v1/models/part/shadow", params={"version": 1})
        inspect(client, encoded(picture()))
        assert alive(sessions) == 2

        client.delete("/v1/models/part/shadow")
        activate(client, 1)

        wait_for(lambda: alive(sessions) == 1, f"{alive(sessions)} sessions")


@pytest.mark.parametrize(
    "failing",
    [
        {"golden": golden_of(0.4, 0.8)},
        {"graph": brightness_graph((32, 32))},
        {"graph": brightness_graph(fragile=True), "golden": golden_of(1.0)},
    ],
)
def test_what_failed_to_load_is_freed(
    settings: Settings, write_bundle: Write, sessions: list[weakref.ref], failing: dict
) -> None:
    write_bundle()
    with (
        TestClient(create_app(settings), raise_server_exceptions=False) as client,
        no_collector(),
    ):
        write_bundle(version=2, **failing)
        for _ in range(3):
            assert activate(client, 2).status_code in (500, 503)

        wait_for(lambda: alive(sessions) == 1, f"{alive(sessions)} sessions")
        assert len(sessions) == 4


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Failed to allocate memory for requested buffer of size 18874368", 503),
        ("std::bad_alloc", 503),
        ("out of memory", 503),
        ("indices element out of data bounds, idx=255", 500),
        ("running Gather node. Name:'/out of memory/9' indices element out of data bounds", 500),
    ],
)
def test_a_lack_of_room_is_told_from_a_graph_that_can_not_run(
    client: TestClient,
    write_bundle: Write,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    status: int,
) -> None:
    def fail(self: Detector, images: object, *, aside: bool = False) -> None:
        raise InferenceFailed(said)

    write_bundle(version=2)
    monkeypatch.setattr(Detector, "run", fail)

    problem = assert_problem(activate(client, 2), status)

    assert said in problem["detail"]


def test_a_gpu_that_fails_is_no_fault_of_the_graph_but_no_number_is() -> None:
    class Gpu:
        device = "cuda"

    assert not _is_graphs_fault(InferenceFailed("CUBLAS_STATUS_NOT_INITIALIZED"), Gpu())
    assert _is_graphs_fault(NoNumber("cuda: the graph gave a score that is no number"), Gpu())


def test_a_start_with_a_failing_self_check_is_refused_with_both_scores(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle(golden=golden_of(0.4, 0.5))

    with pytest.raises(BundleError, match=r"part/1: the self-check failed: .* 0\.4.*says 0\.5"):
        create_app(settings)


def test_a_bundle_of_before_golden_pictures_is_loaded_unchecked(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()

    with TestClient(create_app(settings)) as client:
        assert client.get("/readyz").status_code == 200


def test_the_first_runs_leave_the_thread_of_those_that_serve_alone_but_on_cuda(
    settings: Settings, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(golden=golden_of(0.4))
    threads: list[str] = []
    original = Detector.run

    def run(self: Detector, images, **more):
        threads.append(threading.current_thread().name.split("_")[0])
        return original(self, images, **more)

    monkeypatch.setattr(Detector, "run", run)
    for device, expected in (("cpu", "loading"), ("cuda", "device")):
        threads.clear()
        monkeypatch.setattr(devices.CpuSession, "device", device)
        loader = Loader(settings, Metrics())
        loader.load(partial(Bundle, bundle.folder), ("part", 1)).result()
        loader.close()
        assert set(threads) == {expected}, device


def test_a_bundle_in_another_place_is_refused_by_its_name(
    settings: Settings, write_bundle: Write, tmp_path: Path
) -> None:
    folder = write_bundle("part").folder
    loader = Loader(settings, Metrics())

    with pytest.raises(BundleError, match="says part version 1"):
        loader.load(partial(Bundle, folder), ("gear", 1)).result()
    loader.close()
