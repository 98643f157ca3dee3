"""What was inspected, over HTTP: found, exported, looked at again, judged by people."""

import csv
import io
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest
from conftest import PostgreSql, encoded, inspect, normal_pictures, picture, record, spotted
from fastapi.testclient import TestClient
from test_app import assert_problem
from test_serve import Server, wait_for

from service.app import create_app
from service.bundle import Bundle
from service.calibration import rate_interval
from service.database import Database
from service.image import digest
from service.inspections import Inspections, Record
from service.settings import Settings
from service.trace_routes import EXPORTED_TOGETHER

Write = Callable[..., Bundle]
NOBODY = record(1).id


@pytest.fixture
def table(client: TestClient, settings: Settings) -> Iterator[Inspections]:
    """The client's database, to put inspections in that nobody waits for."""
    with closing(Database(settings.database_url)) as database:
        yield Inspections(database)


def inspected(client: TestClient, data: bytes, **query: object) -> dict:
    answer = inspect(client, data, **query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def listed(client: TestClient, **query: object) -> list[str]:
    answer = client.get("/v1/inspections", params=query)
    assert answer.status_code == 200, answer.text
    return [each["id"] for each in answer.json()["inspections"]]


def export(client: TestClient, **query: object) -> str:
    answer = client.get("/v1/inspections/export", params=query)
    assert answer.status_code == 200, answer.text
    return answer.text


# One inspection


def test_an_inspection_can_be_told_as_it_was_answered(client: TestClient) -> None:
    data = encoded(spotted())
    answer = inspected(client, data, profile="left", threshold=0.5)

    told = client.get(f"/v1/inspections/{answer['id']}").json()

    for name in ("id", "request_id", "model", "profile", "score", "threshold", "decision"):
        assert told[name] == answer[name]
    for name in ("threshold_source", "p_value", "timing_ms"):
        assert told[name] == answer[name]
    assert told["image"] == answer["image"] | {"bytes": len(data), "archived": False}
    assert told["calibration"] == answer["calibration"]["id"]
    assert (told["by"], told["label"], told["feedback"]) == ("anonymous", None, [])


def test_an_answer_that_is_a_picture_has_the_id_in_a_header(client: TestClient) -> None:
    answer = client.post(
        "/v1/inspect",
        content=encoded(spotted()),
        headers={"Content-Type": "image/png", "Accept": "image/png", "X-Request-Id": "mine"},
    )

    told = client.get(f"/v1/inspections/{answer.headers['x-inspection-id']}").json()

    assert (told["request_id"], repr(told["score"])) == ("mine", answer.headers["x-score"])


def test_what_is_refused_is_not_recorded(client: TestClient) -> None:
    assert inspect(client, b"no image").status_code == 400
    last = inspected(client, encoded(picture()))["id"]
    client.get(f"/v1/inspections/{last}")  # by when all are written

    assert listed(client) == [last]


def test_an_unknown_inspection_is_404(client: TestClient) -> None:
    for path in ("", "/image"):
        assert_problem(client.get(f"/v1/inspections/{NOBODY}{path}"), 404, NOBODY)
    answer = client.post(f"/v1/inspections/{NOBODY}/feedback", json={"label": "normal"})
    assert_problem(answer, 404, NOBODY)
    assert_problem(client.get("/v1/inspections/nonsense"), 422, "nonsense")


def test_without_a_trace_nothing_is_recorded_and_all_is_answered(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    untraced = settings.model_copy(update={"trace": False})
    with TestClient(create_app(untraced)) as client:
        id = inspected(client, encoded(picture()))["id"]

        assert_problem(client.get(f"/v1/inspections/{id}"), 404)
        assert listed(client) == []


def test_inspections_of_before_a_restart_are_still_there(
    settings: Settings, write_bundle: Write
) -> None:
    write_bundle()
    with TestClient(create_app(settings)) as client:
        ids = [inspected(client, encoded(picture()))["id"] for _ in range(3)]

    with TestClient(create_app(settings)) as client:
        assert listed(client) == sorted(ids, reverse=True)


# The list


def test_the_list_is_filtered_by_what_the_query_names(
    client: TestClient, table: Inspections
) -> None:
    table.add([record(n, request_id=f"r{n % 2}", score=n / 10) for n in range(6)])
    id = [record(n).id for n in range(6)]

    assert listed(client) == id[::-1]
    assert listed(client, request_id="r1") == [id[5], id[3], id[1]]
    assert listed(client, min_score=0.3, max_score=0.4) == [id[4], id[3]]
    assert listed(client, since="2026-11-26T12:00:04Z") == [id[5], id[4]]
    assert listed(client, until="2026-11-26T13:00:01+01:00") == [id[0]]
    assert listed(client, model="part", version=1, profile="station-3") == id[::-1]
    assert listed(client, decision="anomalous") == listed(client, calibration="cal_1") == []
    assert listed(client, sha256=record(2).sha256) == [id[2]]


def test_pages_follow_each_other_to_the_last(client: TestClient, table: Inspections) -> None:
    table.add([record(n) for n in range(25)])
    seen: list[str] = []
    after: dict[str, str] = {}

    while True:
        page = client.get("/v1/inspections", params={"limit": 10} | after).json()
        seen += [each["id"] for each in page["inspections"]]
        table.add([record(100 + len(seen))])  # which belongs to no page that follows
        if page["next"] is None:
            break
        after = {"after": page["next"]}

    assert seen == [record(n).id for n in range(24, -1, -1)]


def test_a_page_that_holds_exactly_the_rest_is_the_last(
    client: TestClient, table: Inspections
) -> None:
    table.add([record(n) for n in range(10)])

    assert client.get("/v1/inspections?limit=10").json()["next"] is None


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "after=nonsense",
        "decision=ok",
        "label=good",
        "since=0.5",
        "until=1764150000",
        "since=2026-11-26T12:00:00",  # in which zone?
        "min_score=nan",
        "sha256=short",
        "request_id=a%00b",
        "calibration=%00",
        "decison=normal",
    ],
)
def test_a_query_that_means_nothing_is_422(client: TestClient, query: str) -> None:
    for path in ("/v1/inspections", "/v1/inspections/export"):
        assert_problem(client.get(f"{path}?{query}"), 422, query.partition("=")[0])


# The export


def test_the_export_is_the_list_from_its_other_end(client: TestClient, table: Inspections) -> None:
    count = 2 * EXPORTED_TOGETHER + 500
    for start in range(0, count, 500):
        table.add([record(n) for n in range(start, start + 500)])
    whole: list[dict] = []
    after: dict[str, str] = {}
    while not whole or after["after"]:
        page = client.get("/v1/inspections", params={"limit": 1000} | after).json()
        whole += page["inspections"]
        after = {"after": page["next"]}

    lines = export(client, format="jsonl").splitlines()
    rows = list(csv.DictReader(io.StringIO(export(client), newline="")))

    assert [json.loads(line) for line in lines] == whole[::-1]
    assert [row["id"] for row in rows] == [each["id"] for each in whole[::-1]]
    assert len(rows) == count


def test_the_export_has_the_lists_filters(client: TestClient, table: Inspections) -> None:
    table.add([record(n, decision="anomalous" if n % 3 else "normal") for n in range(9)])

    rows = csv.DictReader(io.StringIO(export(client, decision="normal", min_score=0.1)))

    assert [row["id"] for row in rows] == [record(n).id for n in (0, 3, 6)]


def test_an_export_of_nothing_is_a_head_or_nothing(client: TestClient) -> None:
    assert export(client) == ",".join([*Record._fields, "label"]) + "\r\n"
    assert export(client, format="jsonl") == ""


def test_an_export_is_a_file_of_its_type(client: TestClient) -> None:
    for format, media_type in (("csv", "text/csv"), ("jsonl", "application/jsonl")):
        answer = client.get(f"/v1/inspections/export?format={format}")
        assert answer.headers["content-type"].startswith(media_type)
        assert f'filename="inspections.{format}"' in answer.headers["content-disposition"]
    assert_problem(client.get("/v1/inspections/export?format=xlsx"), 422, "xlsx")


# Images


def test_an_archived_image_comes_back_as_it_was_sent(
    settings: Settings, write_bundle: Write, tmp_path: Path
) -> None:
    write_bundle()
    folder = tmp_path / "images"
    told = {"archive": "anomalous", "archive_folder": folder}
    archiving = settings.model_copy(update=told)
    good, bad = encoded(picture()), encoded(spotted(), "JPEG")
    with TestClient(create_app(archiving)) as client:
        good_id, bad_id = (inspected(client, data)["id"] for data in (good, bad))
        wait_for(lambda: list(folder.glob("*/*.jpg")), "not archived")

        answer = client.get(f"/v1/inspections/{bad_id}/image")
        refused = client.get(f"/v1/inspections/{good_id}/image")
        archived = [
            client.get(f"/v1/inspections/{id}").json()["image"]["archived"]
            for id in (good_id, bad_id)
        ]
        next(folder.glob("*/*.jpg")).unlink()
        gone = client.get(f"/v1/inspections/{bad_id}/image")

    assert (answer.content, answer.headers["content-type"]) == (bad, "image/jpeg")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert archived == [False, True]
    assert_problem(refused, 404, good_id, "was not archived", "SKRD4AD_ARCHIVE")
    assert_problem(gone, 404, digest(bad), "any more")


# Feedback


def test_feedback_counts_and_an_earlier_one_is_kept(client: TestClient) -> None:
    id = inspected(client, encoded(spotted()))["id"]
    path = f"/v1/inspections/{id}/feedback"

    first = client.post(path, json={"label": "anomalous", "note": "a scratch"})
    second = client.post(path, json={"label": "normal"})

    assert (first.status_code, second.status_code) == (201, 201)
    assert {k: first.json()[k] for k in ("inspection", "label", "note", "by")} == {
        "inspection": id,
        "label": "anomalous",
        "note": "a scratch",
        "by": "anonymous",
    }
    told = client.get(f"/v1/inspections/{id}").json()
    assert (told["label"], told["feedback"]) == ("normal", [second.json(), first.json()])
    assert client.get("/v1/inspections").json()["inspections"][0]["label"] == "normal"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"label": "ok"}', "ok"),
        (b"{}", "label"),
        (b'{"label": "normal", "remark": "x"}', "remark"),
        (b'{"label": "normal", "note": "' + b"x" * 1001 + b'"}', "1000"),
        (rb'{"label": "normal", "note": "a\u0000b"}', "note"),
        (rb'{"label": "normal", "note": "a\ud800b"}', "body"),
        (b"normal", "body"),
        (b"", "body"),
    ],
)
def test_feedback_that_says_nothing_is_422(client: TestClient, body: bytes, told: str) -> None:
    answer = client.post(f"/v1/inspections/{NOBODY}/feedback", content=body)

    assert_problem(answer, 422, told)


def test_a_body_that_is_no_feedback_is_413_before_it_is_read(client: TestClient) -> None:
    answer = client.post(f"/v1/inspections/{NOBODY}/feedback", content=b"x" * 20_000)

    assert_problem(answer, 413, "16384")


def test_the_record_of_a_model_is_told_with_intervals_and_advice(
    client: TestClient, table: Inspections
) -> None:
    scores = {"normal": (0.1, 0.2, 0.3, 0.7), "anomalous": (0.5, 0.8, 0.9)}
    numbers = iter(range(100))
    for label, told in scores.items():
        for score in told:
            made = record(
                next(numbers), score=score, decision="anomalous" if score >= 0.6 else "normal"
            )
            table.add([made])
            answer = client.post(f"/v1/inspections/{made.id}/feedback", json={"label": label})
            assert answer.status_code == 201

    (told,) = client.get("/v1/models/part/feedback").json()

    assert told["model"] == {"name": "part", "version": 1, "digest": "a" * 64}
    assert (told["normal"], told["anomalous"]) == (4, 3)
    counts = ("true_positives", "false_positives", "true_negatives", "false_negatives")
    assert [told[name] for name in counts] == [2, 1, 3, 1]
    low, high = rate_interval(1, 4)
    assert told["false_positive_rate"] == {"rate": 0.25, "low": low, "high": high}
    low, high = rate_interval(2, 3)
    assert told["detection_rate"] == {"rate": 2 / 3, "low": low, "high": high}
    assert told["threshold_advice"] == {
        "above": 0.3,
        "up_to": 0.5,
        "false_positives": 1,
        "false_negatives": 0,
    }
    assert client.get("/v1/models").json()[0]["threshold"] != 0.5  # nothing was applied


def test_the_record_can_be_of_a_version_or_profile(client: TestClient, table: Inspections) -> None:
    table.add([record(1), record(2, version=2), record(3, profile="left")])
    for number in (1, 2, 3):
        client.post(f"/v1/inspections/{record(number).id}/feedback", json={"label": "normal"})

    def counted(**query: object) -> list[tuple[int, int]]:
        answer = client.get("/v1/models/part/feedback", params=query).json()
        return [(each["model"]["version"], each["normal"]) for each in answer]

    assert counted() == [(2, 1), (1, 2)]
    assert counted(version=1) == [(1, 2)]
    assert counted(profile="left") == [(1, 1)]
    assert counted(version=3) == []


def test_the_record_of_an_unknown_model_is_404_and_of_one_without_feedback_empty(
    client: TestClient,
) -> None:
    assert_problem(client.get("/v1/models/nothing/feedback"), 404, "nothing", "part")
    assert client.get("/v1/models/part/feedback").json() == []


# While the database is away


def test_inspections_go_on_while_the_database_is_away_and_are_all_recorded(
    settings: Settings, write_bundle: Write, postgresql: PostgreSql
) -> None:
    write_bundle()
    away = settings.model_copy(update={"database_url": postgresql.new_database()})
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        ids = [inspected(client, encoded(picture()))["id"]]
        client.get(f"/v1/inspections/{ids[0]}")
        postgresql.stop()
        try:
            ids += [inspected(client, data)["id"] for _, data in normal_pictures(5)]

            assert client.get("/readyz").status_code == 200
            assert metric(client, "skrd4ad_trace_pending") == 5
            wait_for(lambda: metric(client, "skrd4ad_database_up") == 0, "not told")
            for path in ("", "/export", f"/{ids[0]}"):
                answer = client.get(f"/v1/inspections{path}")
                assert_problem(answer, 503)
                assert int(answer.headers["retry-after"]) > 0
        finally:
            postgresql.start()
        wait_for(lambda: metric(client, "skrd4ad_trace_pending") == 0, "not recorded")

        assert listed(client) == sorted(ids, reverse=True)
        assert metric(client, 'skrd4ad_trace_dropped_total{reason="full"}') == 0


def test_what_is_beyond_the_bound_is_dropped_and_inspections_go_on(
    settings: Settings, write_bundle: Write, postgresql: PostgreSql
) -> None:
    write_bundle()
    told = {"database_url": postgresql.new_database(), "trace_max_pending": 3}
    with TestClient(create_app(settings.model_copy(update=told))) as client:
        postgresql.stop()
        try:
            ids = [inspected(client, data)["id"] for _, data in normal_pictures(8)]
        finally:
            postgresql.start()
        wait_for(lambda: metric(client, "skrd4ad_trace_pending") == 0, "not recorded")

        lost = metric(client, 'skrd4ad_trace_dropped_total{reason="full"}')
        there = listed(client)
        assert len(there) == 8 - lost and lost >= 2  # some may be in the batch that is tried
        assert set(ids[-3:]) <= set(there)


def test_an_export_that_breaks_off_cannot_be_taken_for_whole(
    postgresql: PostgreSql, write_bundle: Write, tmp_path: Path
) -> None:
    """A real connection, on which the last chunk is missing."""
    url = postgresql.new_database()
    with closing(Database(url)) as database:
        table = Inspections(database)
        for start in range(0, 30_000, 1000):
            table.add([record(n) for n in range(start, start + 1000)])
    write_bundle()
    server = Server(tmp_path, database_url=url).wait_until_ready()
    try:
        with socket.socket() as connection:
            connection.settimeout(60)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # holds little
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(b"GET /v1/inspections/export HTTP/1.1\r\nHost: t\r\n\r\n")
            answer = connection.recv(1000)
            postgresql.stop()  # the server is ahead of us by what the connection holds
            while part := connection.recv(1 << 20):
                answer += part
    finally:
        postgresql.start()
        server.stop()

    assert answer.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding: chunked" in answer.lower()
    assert not answer.endswith(b"0\r\n\r\n")
    assert answer.count(b"\r\nins_") < 30_000


def metric(client: TestClient | httpx2.Client, line: str) -> float:
    for found in client.get("/metrics").text.splitlines():
        if found.startswith(line + " "):
            return float(found.split()[-1])
    raise AssertionError(line)
