"""Versions of models over the API: listed, activated, rolled back, loaded and unloaded."""

import math
import shutil
import threading
from collections.abc import Callable

import pytest
from conftest import (
    SlowDisk,
    brightness_graph,
    calibrate,
    encoded,
    golden_of,
    inspect,
    normal_pictures,
    picture,
    spotted,
)
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_external_data import leaking
from test_serve import wait_for

from service.app import create_app
from service.bundle import Bundle
from service.image import digest
from service.settings import Settings

Write = Callable[..., Bundle]
ACTIVATE, LOAD, UNLOAD = (
    f"/v1/models/part/versions/2/{verb}" for verb in ("activate", "load", "unload")
)


def serving(client: TestClient, **query: object) -> int:
    """The version that answers."""
    answer = inspect(client, encoded(picture()), render="none", **query)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["model"]["version"])


def loaded(client: TestClient) -> list[str]:
    listed = client.get("/v1/models").json()
    return [f"{each['name']}/{each['version']}" for each in listed if each["loaded"]]


class Request(threading.Thread):
    """A request on a thread of its own."""

    def __init__(self, ask: Callable[[], object]) -> None:
        super().__init__()
        self._ask = ask
        self.start()

    def run(self) -> None:
        self.response = self._ask()

    def answer(self):
        self.join(60)
        return self.response


@pytest.fixture
def later(client: TestClient, write_bundle: Write) -> TestClient:
    """The app that began with version 1 of `part`, version 2 dropped into the folder since."""
    write_bundle(version=2, graph=brightness_graph(gain=0.5), golden=golden_of(0.4, 51 / 255))
    return client


# Listed


def test_every_version_on_disk_is_listed_with_what_it_is(later: TestClient) -> None:
    newer, older = later.get("/v1/models").json()

    assert (newer["version"], newer["active"], newer["loaded"]) == (2, False, False)
    assert (older["version"], older["active"], older["loaded"]) == (1, True, True)
    assert newer["versions"] == older["versions"] == [1, 2]
    assert newer["digest"] == digest(brightness_graph(gain=0.5))
    assert newer["threshold"] is newer["provider"] is None
    assert older["threshold"] == pytest.approx(0.3, rel=1e-4)
    assert (newer["golden"], older["golden"]) == (True, False)


def test_a_damaged_bundle_is_listed_with_what_is_wrong(
    later: TestClient, settings: Settings
) -> None:
    (settings.models / "part" / "2" / "manifest.json").write_text("{")

    newer, older = later.get("/v1/models").json()

    assert "part/2/manifest.json" in newer["error"] and older["error"] is None


def test_one_model_tells_who_let_which_version_serve(later: TestClient) -> None:
    later.post(ACTIVATE)

    told = later.get("/v1/models/part").json()

    assert (told["active"], told["shadow"], told["problems"]) == (2, None, [])
    assert [each["version"] for each in told["versions"]] == [2, 1]
    assert [(each["version"], each["by"]) for each in told["activations"]] == [
        (2, "anonymous"),
        (1, "anonymous"),
    ]


def test_an_unknown_model_is_404_on_every_route(client: TestClient) -> None:
    for method, path in (
        ("GET", ""),
        ("GET", "/shadow"),
        ("DELETE", "/shadow"),
        ("PUT", "/shadow?version=1"),
        ("POST", "/roll-back"),
        ("POST", "/versions/1/activate"),
        ("POST", "/versions/1/load"),
        ("POST", "/versions/1/unload"),
    ):
        response = client.request(method, f"/v1/models/gear{path}")
        assert_problem(response, 404, "'gear'", "part")


@pytest.mark.parametrize("verb", ["activate", "load", "unload"])
def test_an_unknown_version_is_404_with_those_there_are(client: TestClient, verb: str) -> None:
    response = client.post(f"/v1/models/part/versions/7/{verb}")

    assert_problem(response, 404, "version 7", "[1]")


# Active


def test_a_version_that_is_dropped_in_waits_to_be_activated(later: TestClient) -> None:
    assert serving(later) == 1
    assert serving(later, version=2) == 2
    assert serving(later) == 1

    activated = later.post(ACTIVATE).json()

    assert activated["model"] == {
        "name": "part",
        "version": 2,
        "digest": digest(brightness_graph(gain=0.5)),
    }
    assert (activated["replaced"], activated["threshold_source"]) == (1, "bundle")
    assert activated["threshold"] == pytest.approx(0.3, rel=1e-4)
    assert serving(later) == 2


def test_activating_says_the_calibration_of_that_version(later: TestClient) -> None:
    made = calibrate(later, normal_pictures(25), target_fpr=0.05, version=2).json()

    activated = later.post(ACTIVATE).json()

    assert activated["threshold_source"] == "calibration"
    assert activated["calibration"]["id"] == made["id"]
    assert activated["threshold"] == made["threshold"]


def test_activating_names_the_profiles_that_are_left_without_a_calibration(
    later: TestClient,
) -> None:
    for profile, version in (("", 1), ("left", 1), ("right", 1), ("right", 2)):
        query = {"target_fpr": 0.05, "profile": profile, "version": version}
        assert calibrate(later, normal_pictures(25), **query).status_code == 201

    assert later.post(ACTIVATE).json()["uncalibrated_profiles"] == ["left"]
    assert later.post("/v1/models/part/roll-back").json()["uncalibrated_profiles"] == []


def test_the_version_that_was_replaced_is_freed_and_still_answers_when_named(
    later: TestClient,
) -> None:
    later.post(ACTIVATE)

    assert loaded(later) == ["part/2"]
    assert serving(later, version=1) == 1
    assert loaded(later) == ["part/2", "part/1"]


def test_what_is_active_outlives_a_restart_and_a_newer_version(
    later: TestClient, settings: Settings, write_bundle: Write
) -> None:
    later.post(ACTIVATE)
    write_bundle(version=3)

    with TestClient(create_app(settings)) as client:
        assert serving(client) == 2


def test_without_any_activation_the_newest_at_start_serves(
    later: TestClient, settings: Settings
) -> None:
    with TestClient(create_app(settings)) as client:
        assert serving(client) == 2


def test_rolling_back_goes_one_step_further_each_time(
    later: TestClient, write_bundle: Write
) -> None:
    write_bundle(version=3)
    for version in (2, 3):
        later.post(f"/v1/models/part/versions/{version}/activate")

    for before, after in ((3, 2), (2, 1)):
        answer = later.post("/v1/models/part/roll-back").json()
        assert (answer["replaced"], answer["model"]["version"]) == (before, after)
        assert serving(later) == after

    assert_problem(later.post("/v1/models/part/roll-back"), 409, "no other version of part")
    assert later.get("/v1/models/part").json()["activations"][0]["rolled_back"] is True


def test_a_bundle_that_went_since_can_not_be_rolled_back_to(
    later: TestClient, settings: Settings
) -> None:
    later.post(ACTIVATE)
    shutil.rmtree(settings.models / "part" / "1")

    assert_problem(later.post("/v1/models/part/roll-back"), 404, "version 1", "[2]")
    assert serving(later) == 2


@pytest.mark.parametrize(
    ("bundle", "status", "says"),
    [
        ({"graph": brightness_graph((32, 32))}, 500, "(N, 64, 96, 3)"),
        ({"golden": golden_of(0.4, 0.8)}, 500, "golden.png scores 0.4"),
        ({"graph": b"no graph"}, 500, "can't load the graph"),
        ({"graph": leaking("manifest.json")}, 500, "is in another file"),
        ({"graph": brightness_graph(gain=math.nan)}, 500, "is no number"),
        ({"graph": brightness_graph(fragile=True, zeros=9)}, 500, "out of data bounds"),
    ],
)
def test_a_version_that_fails_leaves_the_old_one_serving_and_says_why(
    client: TestClient, write_bundle: Write, bundle: dict, status: int, says: str
) -> None:
    write_bundle(version=2, **bundle)

    for _ in range(2):
        assert_problem(client.post(ACTIVATE), status, "part/2", says)

    assert serving(client) == 1
    assert loaded(client) == ["part/1"]
    lines = client.get("/metrics").text.splitlines()
    assert "skrd4ad_model_load_failures_total 2.0" in lines
    assert client.get("/v1/models/part").json()["activations"] == []


def test_a_failed_self_check_names_both_scores_and_the_tolerance(
    client: TestClient, write_bundle: Write
) -> None:
    write_bundle(version=2, golden=golden_of(0.4, 0.5, tolerance=0.125))

    assert_problem(client.post(ACTIVATE), 500, "scores 0.4", "says 0.5", "0.125 of that")


def test_a_score_within_the_tolerance_passes(client: TestClient, write_bundle: Write) -> None:
    write_bundle(version=2, golden=golden_of(0.4, 0.41))

    assert client.post(ACTIVATE).status_code == 200


def test_another_graph_under_an_activated_version_is_not_served(
    later: TestClient, settings: Settings, write_bundle: Write
) -> None:
    later.post(ACTIVATE)
    shutil.rmtree(settings.models / "part" / "2")
    write_bundle(version=2, graph=brightness_graph(gain=0.25))
    write_bundle("gear")
    activated, found = (digest(brightness_graph(gain=gain)) for gain in (0.5, 0.25))

    with TestClient(create_app(settings)) as client:
        assert_problem(client.get("/readyz"), 503, activated, found)
        assert_problem(
            inspect(client, encoded(picture()), model="part"), 409, activated, found, "put that"
        )
        assert serving(client, model="gear") == 1
        assert client.get("/v1/models/part").json()["active"] is None

        assert client.post("/v1/models/part/versions/1/activate").status_code == 200

        assert serving(client, model="part") == 1
        assert client.get("/readyz").status_code == 200


def test_an_activated_version_that_is_missing_at_start_is_served_once_it_is_back(
    later: TestClient, settings: Settings, write_bundle: Write
) -> None:
    later.post(ACTIVATE)
    away = settings.models.parent / "away"
    (settings.models / "part" / "2").rename(away)

    quick = settings.model_copy(update={"sync_interval_s": 0.05})
    with TestClient(create_app(quick)) as client:
        assert_problem(client.get("/readyz"), 503, "version 2", "[1]")
        away.rename(settings.models / "part" / "2")
        wait_for(lambda: client.get("/readyz").status_code == 200, "not served")
        assert serving(client) == 2


# In memory


def test_loading_and_unloading_by_hand(later: TestClient) -> None:
    assert later.post(LOAD).json()["loaded"] is True
    assert loaded(later) == ["part/2", "part/1"]

    assert later.post(UNLOAD).json()["loaded"] is False

    assert loaded(later) == ["part/1"]
    assert later.post(UNLOAD).status_code == 200  # as it is
    info = [line for line in later.get("/metrics").text.splitlines() if "model_info{" in line]
    assert len(info) == 1 and 'version="1"' in info[0]


def test_the_active_version_is_never_unloaded(later: TestClient) -> None:
    assert_problem(later.post("/v1/models/part/versions/1/unload"), 409, "version 1 is active")

    assert serving(later) == 1


def test_what_serves_and_what_is_loaded_is_told_to_prometheus(later: TestClient) -> None:
    later.post(ACTIVATE)

    lines = later.get("/metrics").text.splitlines()

    active = [line for line in lines if line.startswith("skrd4ad_model_active{")]
    assert active == ['skrd4ad_model_active{model="part",version="2"} 1.0']
    assert "skrd4ad_model_load_seconds_count 2.0" in lines
    (info,) = (line for line in lines if line.startswith("skrd4ad_model_info{"))
    assert 'version="2"' in info


def test_least_recently_used_models_make_room_for_what_is_asked_for(
    settings: Settings, write_bundle: Write
) -> None:
    for name in ("a", "b", "c"):
        write_bundle(name)
    few = settings.model_copy(update={"max_loaded_models": 2})
    with TestClient(create_app(few)) as client:
        assert loaded(client) == ["a/1", "b/1"]  # at start, by name
        assert client.get("/readyz").status_code == 200

        for model, expected in (
            ("a", ["a/1", "b/1"]),
            ("c", ["a/1", "c/1"]),
            ("a", ["a/1", "c/1"]),
            ("b", ["a/1", "b/1"]),
        ):
            assert serving(client, model=model) == 1
            assert loaded(client) == expected


def test_the_limit_never_unloads_what_serves_before_the_next_version_does(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    one = settings.model_copy(update={"max_loaded_models": 1})
    with TestClient(create_app(one)) as client:
        slow = SlowDisk(write_bundle(version=2))
        activating = Request(lambda: client.post(ACTIVATE))
        slow.wait_for_reader()

        assert serving(client) == 1
        assert loaded(client) == ["part/1"]
        slow.let_go()

        assert activating.answer().status_code == 200
        assert loaded(client) == ["part/2"]


def test_requests_to_others_are_answered_while_a_model_loads(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle("gear")
    write_bundle("part")
    with TestClient(create_app(settings)) as client:
        slow = SlowDisk(write_bundle("part", version=2))
        waiting = Request(lambda: inspect(client, encoded(spotted()), model="part", version=2))
        slow.wait_for_reader()

        assert serving(client, model="gear") == serving(client, model="part") == 1
        assert client.get("/readyz").status_code == 200
        assert waiting.is_alive()

        slow.let_go()
        assert waiting.answer().json()["model"]["version"] == 2


def test_whoever_asks_for_the_same_model_waits_for_one_load(
    client: TestClient, write_bundle: Write
) -> None:
    slow = SlowDisk(write_bundle(version=2))
    waiting = [
        Request(lambda: inspect(client, encoded(picture()), version=2, render="none"))
        for _ in range(4)
    ]
    slow.wait_for_reader()
    slow.let_go()

    assert [each.answer().status_code for each in waiting] == [200] * 4
    assert "skrd4ad_model_load_seconds_count 2.0" in client.get("/metrics").text.splitlines()


def test_a_request_that_waits_for_a_load_obeys_its_deadline_and_the_load_goes_on(
    client: TestClient, write_bundle: Write
) -> None:
    slow = SlowDisk(write_bundle(version=2))
    headers = {"Content-Type": "image/png", "X-Request-Timeout-Ms": "50"}
    url = "/v1/inspect?version=2"

    response = Request(lambda: client.post(url, content=encoded(picture()), headers=headers))
    slow.wait_for_reader()
    assert_problem(response.answer(), 504, "0.05 s")
    slow.let_go()

    wait_for(lambda: "part/2" in loaded(client), "the load was given up")
    assert serving(client, version=2) == 2


def test_no_more_than_the_queue_holds_wait_for_a_load(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    short = settings.model_copy(update={"max_queue": 1})
    with TestClient(create_app(short)) as client:
        slow = SlowDisk(write_bundle(version=2))
        waiting = Request(lambda: inspect(client, encoded(picture()), version=2))
        slow.wait_for_reader()

        assert_problem(inspect(client, encoded(picture()), version=2), 429, "the limit is 1")
        slow.let_go()
        assert waiting.answer().status_code == 200


def test_a_model_that_is_dropped_in_is_found_when_it_is_named(
    client: TestClient, write_bundle: Write
) -> None:
    write_bundle("gear", version=3)

    assert serving(client, model="gear") == 3
    assert client.get("/v1/models/gear").json()["active"] == 3
