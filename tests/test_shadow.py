"""A version that is tried beside the active one: seen by counters, and by nobody who inspects."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import brightness_graph, encoded, inspect, picture, spotted
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_serve import wait_for

from service import shadow
from service.app import create_app
from service.bundle import Bundle
from service.registry import Registry
from service.rollouts import Rollout, Rollouts
from service.settings import Settings
from service.store import Graph

Write = Callable[..., Bundle]
SHADOW = "/v1/models/part/shadow"
# Version 1 is at 0.3, so that what it calls normal up to there, version 2 calls anomalous from 0.15
# on, and version 3 normal up to 0.6.
DOUBLE, HALF = brightness_graph(gain=2), brightness_graph(gain=0.5)


@pytest.fixture
def tried(settings: Settings, write_bundle: Write) -> Iterator[TestClient]:
    """The app with version 1 of `part` active, and 2 and 3 to be tried."""
    write_bundle()
    quick = settings.model_copy(update={"sync_interval_s": 0.05})
    with TestClient(create_app(quick), raise_server_exceptions=False) as client:
        write_bundle(version=2, graph=DOUBLE)
        write_bundle(version=3, graph=HALF)
        yield client


def tell(client: TestClient) -> dict:
    return client.get(SHADOW).json()


def compared(client: TestClient) -> int:
    told = tell(client)
    return sum(told[outcome] for outcome in shadow.OUTCOMES)


def without_times(answer) -> dict:
    volatile = {"id", "request_id", "timing_ms"}
    return {key: value for key, value in answer.json().items() if key not in volatile}


def test_answers_are_as_without_a_shadow(tried: TestClient) -> None:
    pictures = [encoded(picture(0.2)), encoded(spotted()), b"no picture"]
    alone = [without_times(inspect(tried, data)) for data in pictures]

    assert tried.put(SHADOW, params={"version": 2}).status_code == 200

    assert [without_times(inspect(tried, data)) for data in pictures] == alone


def test_decisions_are_compared_at_each_ones_own_threshold(tried: TestClient) -> None:
    told = tried.put(SHADOW, params={"version": 2}).json()
    assert (told["model"]["version"], told["by"], told["same"]) == (2, "anonymous", 0)
    assert told["mean_score_difference"] is None

    for brightness in (0.1, 0.2, 0.4):  # to version 2: 0.2, 0.4, 0.8
        inspect(tried, encoded(picture(brightness)), render="none")

    wait_for(lambda: compared(tried) == 3, "not compared")
    told = tell(tried)
    assert (told["same"], told["normal_to_anomalous"], told["anomalous_to_normal"]) == (2, 1, 0)
    scores = np.round(255 * np.array([0.1, 0.2, 0.4])) / 255
    assert told["mean_score_difference"] == pytest.approx(np.mean(scores) / 0.3, rel=1e-3)
    assert told["mean_p_value_difference"] > 0

    tried.put(SHADOW, params={"version": 3})
    assert compared(tried) == 0
    inspect(tried, encoded(picture(0.4)))
    wait_for(lambda: tell(tried)["anomalous_to_normal"] == 1, "not compared")


def test_the_log_names_the_inspections_that_a_shadow_decides_otherwise(
    tried: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.shadow")
    tried.put(SHADOW, params={"version": 2})

    same, other = (inspect(tried, encoded(picture(b))).json()["id"] for b in (0.1, 0.2))
    wait_for(lambda: compared(tried) == 2, "not compared")

    told = [line for line in caplog.messages if same in line or other in line]
    assert told == [f"{other} is anomalous by its shadow, part version 2"]


def test_a_threshold_of_the_request_changes_no_comparison(tried: TestClient) -> None:
    tried.put(SHADOW, params={"version": 2})

    assert inspect(tried, encoded(picture(0.2)), threshold=0.1).json()["decision"] == "anomalous"

    wait_for(lambda: tell(tried)["normal_to_anomalous"] == 1, "not compared")


def test_requests_that_name_another_version_are_not_compared(tried: TestClient) -> None:
    tried.put(SHADOW, params={"version": 2})

    for version in (3, 2):
        inspect(tried, encoded(picture(0.2)), version=version)
    inspect(tried, encoded(picture(0.1)), version=1)

    wait_for(lambda: compared(tried) >= 1, "not compared")
    assert compared(tried) == 1


def test_what_was_counted_is_told_to_prometheus(tried: TestClient) -> None:
    tried.put(SHADOW, params={"version": 2})
    inspect(tried, encoded(picture(0.2)))
    wait_for(lambda: compared(tried) == 1, "not compared")

    lines = tried.get("/metrics").text.splitlines()

    counted = 'skrd4ad_shadow_inspections_total{model="part",outcome="normal_to_anomalous"} 1.0'
    assert counted in lines
    assert 'skrd4ad_shadow_score_difference_count{model="part"} 1.0' in lines
    assert 'skrd4ad_shadow_p_value_difference_count{model="part"} 1.0' in lines


def test_a_shadow_of_another_size_gets_the_picture_at_its_own(
    tried: TestClient, write_bundle: Write
) -> None:
    write_bundle(version=4, graph=brightness_graph((32, 32)), size=(32, 32))
    tried.put(SHADOW, params={"version": 4})

    inspect(tried, encoded(picture(0.2)))

    wait_for(lambda: tell(tried)["same"] == 1, "not compared")


def test_what_was_read_before_a_shadow_was_set_does_not_keep_it_waiting(
    tried: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shadow pins what serves. A look at the database between the two writes takes up
    the pinned version alone, slowly, when the shadow is there already."""
    wanted, set_shadow, lacks = Rollouts.wanted, Rollouts.set_shadow, Registry._lacks
    read, written, asked = threading.Event(), threading.Event(), threading.Event()
    later = itertools.count()

    def wanted_before(rollouts: Rollouts) -> Rollout:
        rollout = wanted(rollouts)
        if rollout.active and not rollout.shadows:
            read.set()
            assert written.wait(60)
            time.sleep(0.2)
        elif rollout.shadows and next(later) >= 2:
            asked.wait(3)  # or the next look would begin it, whatever the request did
        return rollout

    def set_after_a_look(rollouts: Rollouts, graph: Graph, *, by: str) -> None:
        assert read.wait(60)
        set_shadow(rollouts, graph, by=by)
        written.set()

    def lacks_slowly(registry: Registry, graph: Graph) -> str | None:
        if graph.version == 1:
            time.sleep(0.5)
        return lacks(registry, graph)

    monkeypatch.setattr(Rollouts, "wanted", wanted_before)
    monkeypatch.setattr(Rollouts, "set_shadow", set_after_a_look)
    monkeypatch.setattr(Registry, "_lacks", lacks_slowly)

    assert tried.put(SHADOW, params={"version": 2}).status_code == 200
    inspect(tried, encoded(picture(0.2)))
    asked.set()

    wait_for(lambda: compared(tried) == 1, "not compared")


def test_a_shadow_that_fails_is_counted_and_answers_go_on(
    tried: TestClient, write_bundle: Write
) -> None:
    write_bundle(version=4, graph=brightness_graph(fragile=True))
    tried.put(SHADOW, params={"version": 4})

    assert inspect(tried, encoded(picture(1.0))).json()["decision"] == "anomalous"

    wait_for(lambda: tell(tried)["failed"] == 1, "not counted")
    assert tell(tried)["mean_score_difference"] is None


def test_what_the_shadow_can_not_keep_up_with_is_dropped_and_counted(
    tried: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "QUEUE", 1)
    tried.put(SHADOW, params={"version": 2})
    data = encoded(picture(0.2))

    def ask() -> None:
        for _ in range(5):
            assert inspect(tried, data, render="none").status_code == 200

    asked = 0
    while tell(tried)["dropped"] == 0:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        asked += 40
        assert asked < 4000, "nothing was dropped"

    wait_for(lambda: compared(tried) == asked, "an image was lost")


def test_the_active_version_can_not_be_its_own_shadow(tried: TestClient) -> None:
    assert_problem(tried.put(SHADOW, params={"version": 1}), 409, "version 1 is active")


def test_a_version_without_a_threshold_can_not_be_compared(
    tried: TestClient, write_bundle: Write
) -> None:
    write_bundle(version=4, scores=())

    assert_problem(tried.put(SHADOW, params={"version": 4}), 409, "part/4 has no threshold")
    assert_problem(tried.get(SHADOW), 404, "no shadow")


def test_a_shadow_is_never_unloaded_and_its_end_leaves_it_to_the_others(
    tried: TestClient,
) -> None:
    tried.put(SHADOW, params={"version": 2})

    assert_problem(
        tried.post("/v1/models/part/versions/2/unload"), 409, "is tried", f"DELETE {SHADOW}"
    )
    inspect(tried, encoded(picture()), version=3)
    loaded = [each["version"] for each in tried.get("/v1/models").json() if each["loaded"]]
    assert loaded == [3, 2, 1]
    assert tried.get("/v1/models/part").json()["shadow"] == 2

    assert tried.delete(SHADOW).status_code == 204

    assert tell(tried)["until"] >= tell(tried)["since"]
    assert_problem(tried.delete(SHADOW), 404, "no shadow since")
    assert tried.post("/v1/models/part/versions/2/unload").status_code == 200


def test_activating_the_shadow_ends_it_and_what_it_counted_is_still_told(
    tried: TestClient,
) -> None:
    assert tried.put(SHADOW, params={"version": 2}).json()["until"] is None
    inspect(tried, encoded(picture(0.2)))
    wait_for(lambda: compared(tried) == 1, "not compared")

    assert tried.post("/v1/models/part/versions/2/activate").json()["replaced"] == 1

    told = tell(tried)
    assert (told["model"]["version"], told["normal_to_anomalous"]) == (2, 1)
    assert told["until"] is not None
    assert_problem(tried.delete(SHADOW), 404, "no shadow since")
    loaded = [each["version"] for each in tried.get("/v1/models").json() if each["loaded"]]
    assert loaded == [2]


def test_a_shadow_and_its_counts_outlive_a_restart(tried: TestClient, settings: Settings) -> None:
    tried.put(SHADOW, params={"version": 2})
    inspect(tried, encoded(picture(0.2)))
    wait_for(lambda: compared(tried) == 1, "not compared")

    with TestClient(create_app(settings)) as again:
        assert inspect(again, encoded(picture())).json()["model"]["version"] == 1
        wait_for(lambda: again.get("/v1/models/part").json()["shadow"] == 2, "not taken up")
        inspect(again, encoded(picture(0.2)))
        wait_for(lambda: compared(again) == 2, "not added up")
