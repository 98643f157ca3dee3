"""Faults of the machine: a full disk, a clock that jumps, a models folder that can't be read."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from conftest import calibrate, encoded, inspect, normal_pictures, picture
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_serve import wait_for

from service import inspections
from service.app import create_app
from service.bundle import Bundle
from service.errors import BundleError
from service.settings import Settings

Write = Callable[..., Bundle]


@pytest.fixture
def full_disk() -> Iterator[list[bool]]:
    """SQLite's files may grow no more while the list holds True."""
    full = [False]

    def limit(connection, record, proxy) -> None:
        pages = 1 if full[0] else 2**31  # never fewer than there are
        connection.execute(f"PRAGMA max_page_count={pages}")

    sa.event.listen(sa.Pool, "checkout", limit)
    yield full
    sa.event.remove(sa.Pool, "checkout", limit)


def recorded(client: TestClient) -> int:
    count, after = 0, None
    while True:
        query = {"limit": 1000} | ({"after": after} if after else {})
        page = client.get("/v1/inspections", params=query).json()
        count, after = count + len(page["inspections"]), page["next"]
        if after is None:
            return count


def test_a_full_disk_stops_no_inspection_and_loses_none(
    client: TestClient, full_disk: list[bool]
) -> None:
    made = calibrate(client, normal_pictures(25), target_fpr=0.05).json()
    full_disk[0] = True

    answers = [inspect(client, encoded(picture()), render="none") for _ in range(600)]

    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["calibration"]["id"] for answer in answers} == {made["id"]}
    refused = calibrate(client, normal_pictures(400), target_fpr=0.05)
    assert_problem(refused, 503, "full")
    assert client.get("/readyz").status_code == 200
    assert recorded(client) < 600

    full_disk[0] = False
    wait_for(lambda: recorded(client) == 600, "not recorded")
    assert calibrate(client, normal_pictures(40), target_fpr=0.05).status_code == 201


@pytest.mark.parametrize("jump", [timedelta(days=-30), timedelta(days=30)])
def test_a_clock_that_jumps_loses_no_inspection(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, jump: timedelta
) -> None:
    before = inspect(client, encoded(picture())).json()["id"]
    plain = time.time_ns
    monkeypatch.setattr(
        inspections.time, "time_ns", lambda: plain() + int(1e9 * jump.total_seconds())
    )

    after = inspect(client, encoded(picture(0.4))).json()["id"]

    wait_for(lambda: recorded(client) == 2, "not recorded")
    for id in (before, after):
        assert client.get(f"/v1/inspections/{id}").json()["id"] == id
    expected = datetime.now(UTC) + jump
    at = datetime.fromisoformat(client.get(f"/v1/inspections/{after}").json()["at"])
    assert abs(at - expected) < timedelta(minutes=5)


def test_a_models_folder_that_can_not_be_read_leaves_what_is_loaded_serving(
    client: TestClient, settings: Settings, write_bundle: Write
) -> None:
    write_bundle(version=2)
    away = settings.models.with_name("away")
    settings.models.rename(away)

    assert inspect(client, encoded(picture())).status_code == 200
    assert client.get("/readyz").status_code == 200
    assert_problem(inspect(client, encoded(picture()), version=2), 404, "no version 2")
    assert_problem(client.get("/v1/models"), 500, f"{settings.models}: No such file")

    away.rename(settings.models)
    assert inspect(client, encoded(picture()), version=2).status_code == 200


def test_a_service_without_its_models_folder_does_not_start(
    settings: Settings,
) -> None:
    settings.models.rmdir()

    with pytest.raises(BundleError, match="No such file"):
        create_app(settings)
