"""The recorder: batches off the request path, whatever the database does meanwhile."""

import re
import threading
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import PostgreSql, encoded, picture
from test_serve import wait_for

from service import image_archive, retention
from service import trace as trace_module
from service.database import Database
from service.errors import DatabaseAway
from service.image import digest
from service.image_archive import ImageArchive
from service.inspections import Filter, Inspections, moment, new_id
from service.metrics import Metrics
from service.schemas import Inspection
from service.settings import Settings
from service.trace import Trace

DATA = encoded(picture())
EXAMPLE = Inspection.model_validate(Inspection.model_json_schema()["examples"][0])


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def table(database: Database) -> Inspections:
    return Inspections(database)


def recorder(table: Inspections, metrics: Metrics, max_pending: int = 100_000) -> Trace:
    return Trace(table, ImageArchive(Settings(), metrics), metrics, max_pending)


@pytest.fixture
def trace(table: Inspections, metrics: Metrics) -> Trace:
    return recorder(table, metrics)


def inspected(**changed: object) -> Inspection:
    return EXAMPLE.model_copy(update={"id": new_id()} | changed)


def record(trace: Trace, count: int, by: str = "line-3") -> list[str]:
    made = [inspected() for _ in range(count)]
    for one in made:
        trace.record(one, DATA, by)
    return [one.id for one in made]


def recorded(table: Inspections) -> list[str]:
    return [found.record.id for found in table.oldest(Filter(), 100_000)]


def dropped(metrics: Metrics, reason: str) -> float | None:
    return metrics.registry.get_sample_value("skrd4ad_trace_dropped_total", {"reason": reason})


def written(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("skrd4ad_trace_written_total")


def pending(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("skrd4ad_trace_pending")


def test_an_inspection_is_recorded_as_it_was_answered(trace: Trace, table: Inspections) -> None:
    one = inspected()

    trace.record(one, DATA, "line-3")
    trace.flush()

    found = table.get(one.id).record
    assert (found.at, found.by, found.bytes) == (moment(one.id), "line-3", len(DATA))
    assert (found.model, found.version, found.digest) == tuple(vars(one.model).values())
    assert (found.width, found.height, found.sha256) == tuple(vars(one.image).values())
    assert (found.request_id, found.profile, found.calibration) == (one.request_id, "", "bundle")
    for name in ("score", "threshold", "threshold_source", "p_value", "decision"):
        assert getattr(found, name) == getattr(one, name)
    for stage, milliseconds in one.timing_ms:
        assert getattr(found, f"{stage}_ms") == milliseconds
    assert not found.archived


def test_an_inspection_without_a_calibration_is_recorded_as_well(
    trace: Trace, table: Inspections
) -> None:
    one = inspected(calibration=None, p_value=None, profile="left", threshold_source="request")

    trace.record(one, DATA, "line-3")
    trace.flush()

    found = table.get(one.id).record
    assert (found.calibration, found.p_value, found.profile) == (None, None, "left")


def test_what_was_recorded_is_written_without_being_asked(
    trace: Trace, table: Inspections, metrics: Metrics
) -> None:
    trace.start()
    ids = record(trace, 3)

    wait_for(lambda: pending(metrics) == 0, "not written")

    assert recorded(table) == sorted(ids)
    assert written(metrics) == 3
    trace.close()


def test_a_stop_writes_all_that_is_left(trace: Trace, table: Inspections, metrics: Metrics) -> None:
    trace.start()
    ids = record(trace, 2500)  # more than a batch

    trace.close()

    assert recorded(table) == sorted(ids)
    assert (written(metrics), pending(metrics)) == (2500, 0)


def test_beyond_the_bound_the_oldest_are_dropped_and_counted(
    table: Inspections, metrics: Metrics
) -> None:
    trace = recorder(table, metrics, max_pending=10)

    ids = record(trace, 25)

    assert (pending(metrics), dropped(metrics, "full")) == (10, 15)
    trace.flush()
    assert recorded(table) == sorted(ids[-10:])
    assert (written(metrics), dropped(metrics, "full")) == (10, 15)


def test_every_inspection_is_written_or_counted_while_both_sides_are_busy(
    table: Inspections, metrics: Metrics
) -> None:
    trace = recorder(table, metrics, max_pending=50)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            trace.flush()

    writer = threading.Thread(target=write)
    writer.start()
    record(trace, 3000)
    stop.set()
    writer.join(60)
    trace.flush()

    lost = dropped(metrics, "full")
    assert lost is not None and written(metrics) == 3000 - lost == len(recorded(table))


def test_the_container_leaves_time_to_write_all_after_the_last_answer() -> None:
    compose = (Path(__file__).parent.parent / "docker-compose.yml").read_text()
    (grace_s,) = re.findall(r"stop_grace_period: (\d+)s", compose)

    writing_s = trace_module.FLUSH_S + image_archive.CLOSE_S + retention.CLOSE_S
    assert Settings().request_timeout_s + writing_s < float(grace_s)


# A database that refuses


def poisoned(database: Database) -> dict[str, object]:
    """What this kind of database refuses in a text, or where a number must be."""
    if database.shown.startswith("sqlite"):
        return {"score": float("nan")}  # which SQLite takes for null
    return {"request_id": "a\0b"}


def test_a_row_that_is_refused_never_keeps_the_others(
    trace: Trace,
    table: Inspections,
    database: Database,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids = record(trace, 7)
    bad = [inspected(**poisoned(database)) for _ in range(2)]
    for one in bad:
        trace.record(one, DATA, "line-3")
    ids += record(trace, 8)

    trace.flush()

    assert recorded(table) == sorted(ids)
    assert (written(metrics), dropped(metrics, "refused"), pending(metrics)) == (15, 2, 0)
    for one in bad:
        assert f"inspection {one.id} can't be recorded" in caplog.text


@pytest.mark.parametrize("value", ["a\ud800b", 2**70])
def test_values_that_no_database_takes_are_refused_alike(
    trace: Trace, table: Inspections, metrics: Metrics, value: object
) -> None:
    ids = record(trace, 3)
    column = "request_id" if isinstance(value, str) else "image"
    image = EXAMPLE.image.model_copy(update={"width": value})
    trace.record(inspected(**{column: value if column == "request_id" else image}), DATA, "a")

    trace.flush()

    assert recorded(table) == sorted(ids)
    assert dropped(metrics, "refused") == 1


def test_what_is_no_rows_fault_loses_no_row(
    trace: Trace,
    table: Inspections,
    database: Database,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A table that somebody took away, say, or a right."""
    caplog.set_level("INFO")
    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE inspections RENAME TO elsewhere"))
    trace.start()
    ids = record(trace, 5)
    wait_for(lambda: "can't be recorded, and are kept for now" in caplog.text, "not told")

    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE elsewhere RENAME TO inspections"))
    wait_for(lambda: pending(metrics) == 0, "not written")
    trace.close()

    assert recorded(table) == sorted(ids)
    assert dropped(metrics, "refused") == 0
    assert "inspections are recorded again" in caplog.text


# A database that is away


def test_what_is_inspected_while_the_database_is_away_is_recorded_when_it_is_back(
    postgresql: PostgreSql, metrics: Metrics
) -> None:
    with closing(Database(postgresql.new_database())) as database:
        table = Inspections(database)
        trace = recorder(table, metrics)
        ids = record(trace, 3)
        trace.flush()
        postgresql.stop()
        try:
            ids += record(trace, 4)
            for _ in range(2):
                with pytest.raises(DatabaseAway):
                    trace.flush()
            assert (pending(metrics), written(metrics)) == (4, 3)
        finally:
            postgresql.start()

        ids += record(trace, 2)
        trace.flush()

        assert recorded(table) == sorted(ids)
        assert (pending(metrics), written(metrics), dropped(metrics, "full")) == (0, 9, 0)


def test_a_stop_while_the_database_is_away_ends_and_tells_what_is_lost(
    postgresql: PostgreSql,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(trace_module, "FLUSH_S", 0.3)
    with closing(Database(postgresql.new_database())) as database:
        trace = recorder(Inspections(database), metrics)
        trace.start()
        postgresql.stop()
        try:
            record(trace, 4)
            trace.close()
        finally:
            postgresql.start()

    assert "4 inspections are not recorded: database postgresql://" in caplog.text


def test_a_commit_whose_answer_was_lost_is_sent_again_and_counts_once(
    trace: Trace, table: Inspections, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, lost = table.add, [True]

    def add_and_lose(rows: list) -> None:
        add(rows)
        if lost.pop():
            lost.append(False)
            raise DatabaseAway("the connection broke")

    monkeypatch.setattr(table, "add", add_and_lose)
    ids = record(trace, 4)

    with pytest.raises(DatabaseAway):
        trace.flush()
    trace.flush()

    assert recorded(table) == sorted(ids)
    assert (written(metrics), pending(metrics)) == (4, 0)


# Images


def test_the_record_says_whether_the_image_was_archived(
    table: Inspections, metrics: Metrics, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    archive = ImageArchive(Settings(archive="anomalous", archive_folder=folder), metrics)
    trace = Trace(table, archive, metrics, 100)
    kept, other = encoded(picture(0.3)), encoded(picture(0.5))
    (folder / digest(other)[:2]).write_text("no folder")  # its image can't be written
    images = {
        name: EXAMPLE.image.model_copy(update={"sha256": digest(data)})
        for name, data in (("kept", kept), ("failed", other), ("normal", DATA))
    }
    archive.start()
    made = {name: inspected(image=image) for name, image in images.items()}
    made["normal"] = made["normal"].model_copy(update={"decision": "normal"})

    for name, data in (("kept", kept), ("failed", other), ("normal", DATA)):
        trace.record(made[name], data, "line-3")
    archive.close()
    trace.flush()

    found = {name: table.get(one.id).record.archived for name, one in made.items()}
    assert found == {"kept": True, "failed": False, "normal": False}
