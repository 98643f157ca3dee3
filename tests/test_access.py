"""Who may ask for what: every route, with every kind of key, and without one."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import calibrate, encoded, inspect, normal_pictures, picture
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_serve import wait_for

from service.access import Access
from service.app import create_app
from service.bundle import Bundle
from service.database import Database
from service.keys import SCOPES, Keys, Scope
from service.settings import Settings

Write = Callable[..., Bundle]
OPEN = {"/livez", "/readyz"}
NEEDED = {
    ("GET", "/metrics"): "inspect",
    ("POST", "/v1/inspect"): "inspect",
    ("GET", "/v1/models"): "inspect",
    ("GET", "/v1/models/{name}"): "inspect",
    ("GET", "/v1/models/{name}/shadow"): "inspect",
    ("GET", "/v1/inspections/{id}"): "inspect",
    ("GET", "/v1/inspections/{id}/image"): "inspect",
    ("POST", "/v1/inspections/{id}/feedback"): "inspect",
    ("GET", "/v1/inspections"): "calibrate",
    ("GET", "/v1/inspections/export"): "calibrate",
    ("POST", "/v1/calibrate"): "calibrate",
    ("POST", "/v1/calibrations"): "calibrate",
    ("GET", "/v1/calibrations"): "calibrate",
    ("GET", "/v1/calibrations/{id}"): "calibrate",
    ("DELETE", "/v1/calibrations/{id}"): "calibrate",
    ("POST", "/v1/calibrations/{id}/samples"): "calibrate",
    ("GET", "/v1/calibrations/{id}/samples"): "calibrate",
    ("GET", "/v1/calibrations/{id}/samples/{sha256}/heatmap"): "calibrate",
    ("POST", "/v1/calibrations/{id}/samples/{sha256}/exclude"): "calibrate",
    ("POST", "/v1/calibrations/{id}/samples/{sha256}/include"): "calibrate",
    ("POST", "/v1/calibrations/{id}/finish"): "calibrate",
    ("POST", "/v1/calibrations/{id}/activate"): "calibrate",
    ("POST", "/v1/calibrations/deactivate"): "calibrate",
    ("POST", "/v1/calibrations/roll-back"): "calibrate",
    ("GET", "/v1/activations"): "calibrate",
    ("GET", "/v1/models/{name}/feedback"): "calibrate",
    ("GET", "/v1/models/{name}/drift"): "calibrate",
    ("POST", "/v1/models/{name}/drift/reset"): "calibrate",
    ("POST", "/v1/models"): "admin",
    ("POST", "/v1/models/{name}/versions/{version}/activate"): "admin",
    ("POST", "/v1/models/{name}/roll-back"): "admin",
    ("POST", "/v1/models/{name}/versions/{version}/load"): "admin",
    ("POST", "/v1/models/{name}/versions/{version}/unload"): "admin",
    ("PUT", "/v1/models/{name}/shadow"): "admin",
    ("DELETE", "/v1/models/{name}/shadow"): "admin",
}
UNLISTED = ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/nowhere", "/")


@dataclass
class Closed:
    """A service that has keys of every kind."""

    client: TestClient
    keys: Keys
    tokens: dict[str, str]

    def ask(self, method: str, path: str, token: str | None, **more: Any):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self.client.request(method, path, headers=headers, **more)


@pytest.fixture
def closed(settings: Settings, write_bundle: Write) -> Iterator[Closed]:
    write_bundle()
    keys = Keys(Database(settings.database_url))
    tokens = {scope: keys.create(scope, scope) for scope in SCOPES}
    tokens["expired"] = keys.create(
        "expired", "admin", expires=datetime.now(UTC) - timedelta(seconds=1)
    )
    tokens["revoked"] = keys.create("revoked", "admin")
    keys.revoke("revoked")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield Closed(client, keys, tokens)


def routes(client: TestClient) -> dict[tuple[str, str], dict[str, Any]]:
    """Of the OpenAPI, with a path that can be asked for."""
    return {
        (method.upper(), path): operation
        for path, methods in client.app.openapi()["paths"].items()  # type: ignore[attr-defined]
        for method, operation in methods.items()
    }


def concrete(path: str) -> str:
    values = {"id": f"ins_{'0' * 28}", "sha256": "0" * 64, "name": "nothing", "version": "1"}
    if path.startswith("/v1/calibrations"):
        values["id"] = "cal_nothing"
    return path.format_map(values)


def test_the_table_has_every_route_and_every_route_its_scope(closed: Closed) -> None:
    told = {
        key: {scope for security in operation.get("security", []) for scope in one(security)}
        for key, operation in routes(closed.client).items()
        if key[1] not in OPEN
    }

    assert told == {key: {scope} for key, scope in NEEDED.items()}
    apis = {
        (method, route.path)
        for included in closed.client.app.routes  # type: ignore[attr-defined]
        if hasattr(included, "original_router")
        for route in included.original_router.routes
        for method in route.methods
    }
    assert apis == {*NEEDED, *(("GET", path) for path in OPEN)}, "a route is not in the OpenAPI"


def test_the_security_page_has_the_same_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "security.md").read_text()

    told = re.findall(r"^\| `([A-Z]+) (\S+)` \| (\w+)", page, flags=re.MULTILINE)

    probes = [("GET", path, "none") for path in sorted(OPEN)]
    assert told == [*probes, *((*route, scope) for route, scope in NEEDED.items())]


def one(security: dict[str, list[str]]) -> list[str]:
    (scopes,) = security.values()
    return scopes


def test_every_route_wants_a_key_that_is_in_force(closed: Closed) -> None:
    bad = [None, "x" * 64, "", closed.tokens["expired"], closed.tokens["revoked"]]
    paths = [(method, concrete(path)) for method, path in NEEDED]
    for method, path in [*paths, *(("GET", path) for path in UNLISTED)]:
        for token in bad:
            answer = closed.ask(method, path, token)
            assert_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scope", SCOPES)
def test_every_route_wants_its_scope_or_a_higher_one(closed: Closed, scope: Scope) -> None:
    for (method, path), needed in NEEDED.items():
        answer = closed.ask(method, concrete(path), closed.tokens[scope])
        if SCOPES.index(scope) < SCOPES.index(needed):
            assert_problem(answer, 403, f"the key {scope} has the scope {scope}", f"wants {needed}")
        else:
            assert answer.status_code not in (401, 403, 500), (method, path, answer.text)


def test_probes_want_none(closed: Closed) -> None:
    for path in OPEN:
        for token in (None, "x" * 64, closed.tokens["revoked"]):
            assert closed.ask("GET", path, token).status_code == 200


def test_what_is_near_an_open_path_is_closed(closed: Closed) -> None:
    for path in ("/livez/", "//livez", "/livez/..", "/readyz%2f", "/LIVEZ", "/livez;/v1/models"):
        assert_problem(closed.client.get(path, follow_redirects=False), 401)


def test_metrics_are_open_where_that_is_set(settings: Settings, closed: Closed) -> None:
    open_metrics = settings.model_copy(update={"open_metrics": True})
    with TestClient(create_app(open_metrics)) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_the_key_goes_in_either_header(closed: Closed) -> None:
    token = closed.tokens["inspect"]
    get = closed.client.get
    for headers in (
        {"Authorization": f"Bearer {token}"},
        {"Authorization": f"bearer  {token} "},
        {"X-API-Key": token},
        {"X-API-Key": f" {token} "},
        {"Authorization": "Basic dXNlcjpwYXNz", "X-API-Key": token},  # a proxy's own
    ):
        assert get("/v1/models", headers=headers).status_code == 200, headers
    for headers in (
        {"Authorization": token},
        {"Authorization": f"Basic {token}"},
        {"Authorization": "Bearer ", "X-API-Key": token},
        {"Cookie": f"key={token}"},
    ):
        assert_problem(get("/v1/models", headers=headers), 401)
    assert_problem(get(f"/v1/models?key={token}"), 401)


def test_what_is_done_is_recorded_by_the_keys_name(
    closed: Closed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    closed.client.headers["X-API-Key"] = closed.tokens["calibrate"]

    made = calibrate(closed.client, normal_pictures(25), target_fpr=0.05).json()
    inspected = inspect(closed.client, encoded(picture())).json()

    assert made["created_by"] == "calibrate"
    assert closed.client.get("/v1/activations").json()[0]["by"] == "calibrate"
    assert closed.client.get(f"/v1/inspections/{inspected['id']}").json()["by"] == "calibrate"
    lines = [line for line in caplog.messages if "POST /v1/" in line]
    assert len(lines) == 2 and all(line.endswith("by=calibrate") for line in lines)


def test_no_token_is_in_the_log_or_in_an_answer(
    closed: Closed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "skrd4ad_" + "w" * 43
    answers = [
        closed.ask("GET", "/v1/models", token).text for token in [wrong, *closed.tokens.values()]
    ]

    for text in [caplog.text, *answers]:
        assert not any(token in text for token in [wrong, *closed.tokens.values()])
    assert "there is no such key" in caplog.text


def test_a_key_is_made_and_taken_back_without_a_restart(closed: Closed) -> None:
    closed.client.headers["X-API-Key"] = closed.keys.create("new", "inspect")
    until(lambda: closed.client.get("/v1/models").status_code == 200)

    closed.keys.revoke("new")

    until(lambda: closed.client.get("/v1/models").status_code == 401)


def test_without_keys_everybody_may_do_everything_until_there_is_one(
    client: TestClient, settings: Settings
) -> None:
    assert client.get("/v1/inspections").json()["inspections"] == []
    assert_problem(client.post("/v1/models/part/roll-back"), 409)  # admin

    Keys(Database(settings.database_url)).create("first", "admin")

    until(lambda: client.get("/v1/models").status_code == 401)


def until(condition: Callable[[], bool]) -> None:
    wait_for(condition, "not taken up")


# Rates


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass when it is told so."""
    now = [100.0]
    plain = Access.__init__

    def with_clock(self: Access, *args: Any, **more: Any) -> None:
        plain(self, *args, **more, now=lambda: now[0])

    monkeypatch.setattr(Access, "__init__", with_clock)
    return now


def test_a_key_may_ask_as_often_as_it_says(
    clock: list[float], closed: Closed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    token = closed.keys.create("slow", "inspect", max_rate=2)
    until(lambda: closed.ask("GET", "/v1/models", token).status_code == 200)
    clock[0] += 10  # and no more than a second's worth is saved up

    answers = [closed.ask("GET", "/v1/models", token) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert_problem(answers[2], 429, "allows 2 requests a second", "try again in 0.5 s")
    assert answers[2].headers["retry-after"] == "1"
    assert any("429" in line and "by=slow" in line for line in caplog.messages)
    assert closed.ask("GET", "/v1/models", closed.tokens["inspect"]).status_code == 200

    clock[0] += 0.5
    assert closed.ask("GET", "/v1/models", token).status_code == 200
    assert closed.ask("GET", "/v1/models", token).status_code == 429


def test_a_rate_below_one_a_second_tells_when_to_come_again(
    clock: list[float], closed: Closed
) -> None:
    token = closed.keys.create("slow", "inspect", max_rate=0.1)
    until(lambda: closed.ask("GET", "/v1/models", token).status_code == 200)

    answer = closed.ask("GET", "/v1/models", token)

    assert answer.headers["retry-after"] == "10"
    clock[0] += 9.9
    assert closed.ask("GET", "/v1/models", token).status_code == 429
    clock[0] += 0.2
    assert closed.ask("GET", "/v1/models", token).status_code == 200


def test_refusals_are_counted(closed: Closed) -> None:
    closed.ask("GET", "/v1/models", None)
    closed.ask("POST", "/v1/models", closed.tokens["inspect"])

    lines = closed.ask("GET", "/metrics", closed.tokens["inspect"]).text
    statuses = re.findall(r'skrd4ad_requests_total\{.*status="(40\d)"\} (\d)', lines)
    assert sorted(statuses) == [("401", "1"), ("403", "1")]
