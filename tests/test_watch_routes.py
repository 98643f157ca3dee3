"""Drift over HTTP, from inspections that were really made."""

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from conftest import calibrate, encoded, inspect, normal_pictures, picture, spotted
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_serve import wait_for

from service import watch as watching
from service.app import create_app
from service.bundle import Bundle
from service.settings import Settings

Write = Callable[..., Bundle]


@pytest.fixture
def watched(
    settings: Settings, database_url: str, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    monkeypatch.setattr(watching, "INTERVAL_S", 0.1)
    monkeypatch.setattr(watching, "LAG", timedelta(seconds=2))  # more than a record takes
    write_bundle()
    settings = settings.model_copy(update={"database_url": database_url})
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def drift(client: TestClient, **query: str):
    return client.get("/v1/models/part/drift", params=query)


def images(client: TestClient, **query: str) -> int:
    response = drift(client, **query)
    return int(response.json()["images"]) if response.status_code == 200 else 0


def test_inspections_are_tested_as_they_are_recorded(watched: TestClient) -> None:
    pictures = normal_pictures(40)
    made = calibrate(watched, pictures, target_fpr=0.05).json()
    for _, data in pictures[:15]:  # those that score lowest
        inspect(watched, data, render="none")
    inspect(watched, encoded(spotted()), render="none")  # anomalous
    inspect(watched, encoded(picture()), render="none", threshold=0.9)

    wait_for(lambda: images(watched) == 15, "not tested")

    told = drift(watched).json()
    assert told["calibration"]["id"] == made["id"]
    assert (told["alarm"], told["since"], sum(told["histogram"])) == (None, None, 15)
    assert 0 <= told["distance"] <= 1 and told["statistic"] < told["run_length"] == 100_000
    assert 'skrd4ad_drift_images{model="part",profile=""} 15.0' in watched.get("/metrics").text


def test_a_profile_with_a_calibration_is_tested_by_itself(watched: TestClient) -> None:
    pictures = normal_pictures(40)
    made = calibrate(watched, pictures, target_fpr=0.05, profile="left").json()
    for _, data in pictures[:5]:
        inspect(watched, data, render="none", profile="left")
        inspect(watched, data, render="none", profile="right")

    wait_for(lambda: images(watched, profile="left") == images(watched) == 5, "not tested")

    told = drift(watched, profile="left").json()
    assert (told["profile"], told["calibration"]["id"]) == ("left", made["id"])
    assert drift(watched, profile="right").json()["calibration"]["id"] == "bundle"


def test_a_reset_begins_anew_and_is_kept(watched: TestClient) -> None:
    for _, data in normal_pictures(5):
        inspect(watched, data, render="none")
    wait_for(lambda: images(watched) == 5, "not tested")

    told = watched.post("/v1/models/part/drift/reset").json()

    assert told["images"] == 0 and told["since"] is not None
    assert drift(watched).json()["since"] == told["since"]


def test_an_unknown_model_is_404(watched: TestClient) -> None:
    assert_problem(watched.get("/v1/models/gear/drift"), 404, "'gear'")


def test_without_records_nothing_is_tested_and_that_is_told(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    with TestClient(create_app(settings.model_copy(update={"trace": False}))) as client:
        assert_problem(drift(client), 409, "SKRD4AD_TRACE")
        assert_problem(client.post("/v1/models/part/drift/reset"), 409, "SKRD4AD_TRACE")
