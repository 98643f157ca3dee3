"""Services that share a database, that lose it, and that are killed in the middle of a change."""

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from conftest import PostgreSql, encoded, normal_pictures, picture
from test_serve import Server, wait_for

from service.bundle import Bundle
from training.rehearsal import free_port

Write = Callable[..., Bundle]
PICTURE = encoded(picture())


@pytest.fixture
def replicas(tmp_path: Path, write_bundle: Write) -> Iterator[Callable[..., list[Server]]]:
    """Starts two services over one models folder and one database."""
    write_bundle()
    servers: list[Server] = []

    def start(database_url: str, **environment: str) -> list[Server]:
        for number in range(2):
            folder = tmp_path / f"replica-{number}"
            folder.mkdir()
            (folder / "models").symlink_to(tmp_path / "models")
            servers.append(Server(folder, database_url=database_url, **environment))
        return [server.wait_until_ready() for server in servers]

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


def calibrate(server: Server, count: int, **query: object) -> httpx2.Response:
    files = [("images", (name, data, "image/png")) for name, data in normal_pictures(count)]
    return server.client.post("/v1/calibrate", files=files, params={"target_fpr": 0.05, **query})


def in_force(server: Server, **query: str) -> str:
    return str(server.inspect(PICTURE, render="none", **query).json()["calibration"]["id"])


def test_what_one_activates_is_in_force_in_the_other(
    replicas: Callable[..., list[Server]], database_url: str
) -> None:
    one, other = replicas(database_url)

    first = calibrate(one, 25).json()["id"]
    wait_for(lambda: in_force(other) == first, "not taken up")
    second = calibrate(other, 30, profile="left").json()["id"]
    wait_for(lambda: in_force(one, profile="left") == second, "not taken up for the profile")
    assert in_force(one) == first

    assert other.client.post("/v1/calibrations/roll-back").json()["id"] == "bundle"
    wait_for(lambda: in_force(one) == "bundle", "not rolled back")


def test_a_calibration_is_filled_by_several_services(
    replicas: Callable[..., list[Server]], database_url: str
) -> None:
    servers, images = replicas(database_url), normal_pictures(40)
    id = servers[0].client.post("/v1/calibrations").json()["id"]

    for number, (name, data) in enumerate(images):
        files = [("images", (name, data, "image/png"))]
        response = servers[number % 2].client.post(f"/v1/calibrations/{id}/samples", files=files)
        assert response.status_code == 200, response.text
    response = servers[1].client.post(f"/v1/calibrations/{id}/finish?target_fpr=0.05")

    assert response.json()["samples"] == 40
    wait_for(lambda: in_force(servers[0]) == id, "not taken up")


def test_inspection_goes_on_while_the_database_is_away(
    replicas: Callable[..., list[Server]], postgresql: PostgreSql
) -> None:
    server, other = replicas(postgresql.new_database())
    made = calibrate(server, 25).json()["id"]
    postgresql.stop()
    try:
        wait_for(lambda: server.metric("skrd4ad_database_up") == 0, "not noticed")
        assert server.client.get("/readyz").status_code == 200
        assert in_force(server) == made
        refused = server.client.post("/v1/calibrations/roll-back")
        assert (refused.status_code, refused.json()["title"]) == (503, "Database away or busy")
        assert refused.headers["retry-after"]
    finally:
        postgresql.start()

    wait_for(lambda: server.metric("skrd4ad_database_up") == 1, "not noticed again")
    assert server.client.post("/v1/calibrations/roll-back").json()["id"] == "bundle"
    wait_for(lambda: in_force(other) == "bundle", "not taken up by the other one")
    assert "inspection goes on" in server.log.read_text()
    assert "the database answers again" in server.log.read_text()


# Killed


def run_service(folder: Path, port: int, database_url: str) -> None:
    """In a process that has the service's modules already, so that it starts at once."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    from service.__main__ import main

    sys.exit(
        main(
            ["serve", "--port", str(port), "--models", str(folder / "models"), "--threads", "1"]
            + ["--device", "cpu", "--database-url", database_url]
        )
    )


@functools.cache
def samples(count: int) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (name, data, "image/png")) for name, data in normal_pictures(count)]


class Operator:
    """Calibrates and activates at random, and remembers what it was told."""

    def __init__(self, client: httpx2.Client, rng: random.Random) -> None:
        self.client, self._rng = client, rng
        self.finished: dict[str, float] = {}  # id: threshold, as told
        self.opened: dict[str, int] = {}  # id: samples, as told
        self.begun: set[str] = set()  # every id that was told
        # What may be in force: what was told last, and what was asked for without an answer.
        self.possible: set[str | None] = {"bundle"}

    def act(self) -> None:
        """One change; raises TransportError where the service is killed meanwhile."""
        kind = self._rng.choice(["at once", "at once", "fill", "fill", "activate", "back"])
        if kind == "at once":
            self.possible.add(None)  # one whose id nobody was told
            told = self._post("/v1/calibrate", files=samples(self._rng.randint(20, 30)))
            self._tell_finished(told)
        elif kind == "fill" and self.opened and self._rng.random() < 0.5:
            id = self._rng.choice(list(self.opened))
            self.possible.add(id)
            self._tell_finished(self._post(f"/v1/calibrations/{id}/finish"))
            del self.opened[id]
        elif kind == "fill":
            id = str(self._post("/v1/calibrations")["id"])
            self.begun.add(id)
            count = self._rng.randint(20, 30)
            self._post(f"/v1/calibrations/{id}/samples", files=samples(count))
            self.opened[id] = count
        elif kind == "activate" and self.finished:
            id = self._rng.choice(list(self.finished))
            self.possible.add(id)
            self._post(f"/v1/calibrations/{id}/activate")
            self.possible = {id}
        else:
            self.possible.add("bundle")
            self.possible = {self._post("/v1/calibrations/deactivate")["id"]}

    def check(self) -> None:
        """All that was told is there, whole, and what is in force is what was asked for last."""
        listed = {c["id"]: c for c in self._get("/v1/calibrations?limit=1000")}
        for id, threshold in self.finished.items():
            assert (listed[id]["state"], listed[id]["threshold"]) == ("finished", threshold)
        for id in self.opened:
            assert id in listed
        for id, calibration in listed.items():
            counted = self._get(f"/v1/calibrations/{id}")["samples"]
            if calibration["state"] == "finished":
                assert counted == calibration["samples"]
                self.finished[id] = calibration["threshold"]
                self.opened.pop(id, None)
            elif id in self.opened:
                assert counted == self.opened[id]
            else:  # only what was opened by itself is ever open
                assert id in self.begun or counted == 0
        response = self.client.post(
            "/v1/inspect?render=none", content=PICTURE, headers={"Content-Type": "image/png"}
        )
        assert response.status_code == 200, response.text
        answer = response.json()
        found = answer["calibration"]["id"]
        assert found in self.possible or None in self.possible and found in listed
        if found != "bundle":
            assert answer["threshold"] == listed[found]["threshold"]
        self.possible = {found}

    def _tell_finished(self, told: dict[str, object]) -> None:
        self.finished[str(told["id"])] = float(str(told["threshold"]))
        assert told["active"] is True
        self.possible = {str(told["id"])}

    def _post(self, path: str, **content: object) -> dict[str, object]:
        query = {"target_fpr": 0.05} if path.endswith(("calibrate", "finish")) else {}
        response = self.client.post(path, params=query, **content)  # type: ignore[arg-type]
        assert response.status_code < 300, response.text
        return dict(response.json())

    def _get(self, path: str):
        response = self.client.get(path)
        assert response.status_code == 200, response.text
        return response.json()


def survive(kills: int, folder: Path, database_url: str) -> int:
    """Kills a service again and again in the middle of changes; returns how many it had made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.__main__"])
    rng, port, changes = random.Random(0), free_port(), 0
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        operator = Operator(client, rng)
        for _ in range(kills):
            process = context.Process(target=run_service, args=(folder, port, database_url))
            process.start()
            wait_for(lambda: answers(client), "no start")
            operator.check()
            killer = threading.Timer(rng.uniform(0.0, 0.5), process.kill)
            killer.start()
            with contextlib.suppress(httpx2.TransportError):
                while True:
                    operator.act()
                    changes += 1
            process.join(30)
            assert process.exitcode == -signal.SIGKILL, (folder / "log").read_text()
    return changes


def answers(client: httpx2.Client) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return client.get("/readyz").status_code == 200
    return False


def test_no_kill_loses_a_finished_calibration_or_leaves_half_of_one(
    tmp_path: Path, write_bundle: Write, database_url: str
) -> None:
    write_bundle()

    assert survive(12, tmp_path, database_url) > 0


@pytest.mark.slow
def test_nor_do_200_kills(tmp_path: Path, write_bundle: Write, database_url: str) -> None:
    write_bundle()

    assert survive(200, tmp_path, database_url) > 200
