"""A database that is made, brought up to date or refused; on SQLite and on PostgreSQL."""

import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from conftest import PostgreSql

from service.database import Database, activations, calibrations, metadata
from service.errors import DatabaseAway, SettingsError
from service.store import Graph, Store

GRAPH = Graph("part", 1, "a" * 64)


def tables(database: Database) -> set[str]:
    with database.read() as connection:
        return set(sa.inspect(connection).get_table_names())


def test_migrations_make_the_tables_that_the_code_has(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    assert set(metadata.tables) <= tables(database)


def test_a_new_database_is_told_and_an_old_one_is_not(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    Database(database_url).close()
    assert "new database" in caplog.text
    caplog.clear()

    Database(database_url).close()

    assert "new database" not in caplog.text


def as_it_was(connection: sa.Connection) -> None:
    """The table of the first services, with two calibrations of a graph."""
    old = sa.Table(
        "calibrations",
        sa.MetaData(),
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("target_fpr", sa.Float, nullable=False),
        sa.Column("achievable_fpr", sa.Float, nullable=False),
        sa.Column("threshold", sa.Float, nullable=False),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.Column("quantiles", sa.JSON, nullable=False),
        sa.Column("samples", sa.JSON, nullable=False),
        sa.Index("calibrations_by_graph", "model", "version", "digest", "active"),
        sa.Index("calibrations_by_time", "created"),
    )
    old.create(connection)
    scores = [0.1 + i / 100 for i in range(20)]
    for number, active in ((1, False), (2, True)):
        row = {
            "id": f"cal_{number}",
            "created": f"2026-11-0{number}T10:15:00.5+00:00",
            **vars(GRAPH),
            "active": active,
            "target_fpr": 0.05,
            "achievable_fpr": 1 / 21,
            "threshold": 0.75 + number,
            "sample_count": 20,
            "quantiles": {"min": 0.1, "max": 0.29},
            "samples": [
                {"name": f"{i}.png", "sha256": f"{i:064x}", "score": score}
                for i, score in enumerate(scores)
            ],
        }
        connection.execute(old.insert().values(**row))


def raw_engine(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


def test_calibrations_of_the_first_services_are_kept_and_still_in_force(
    database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "state").mkdir(exist_ok=True)
    engine = raw_engine(database_url)
    with engine.begin() as connection:
        as_it_was(connection)
    engine.dispose()

    database = Database(database_url)
    request.addfinalizer(database.close)
    store = Store(database)
    newest, oldest = store.find()
    assert (newest.id, newest.active, oldest.id, oldest.active) == ("cal_2", True, "cal_1", False)
    assert newest.created == datetime(2026, 11, 2, 10, 15, 0, 500_000, UTC)
    assert newest.finish is not None and newest.finish.samples == 20
    assert store.active(GRAPH) == {"": "cal_2"}
    calibration = store.calibration("cal_2")
    assert calibration.threshold == 2.75
    assert calibration.p_value(0.105) == pytest.approx(20 / 21)
    assert [sample.name for sample in store.samples("cal_1", 2)] == ["19.png", "18.png"]


def test_a_database_of_a_newer_service_is_refused_and_left_alone(database_url: str) -> None:
    Database(database_url).close()
    engine = raw_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(SettingsError, match="a newer version of the service made it"):
        Database(database_url)

    with engine.begin() as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "9999"
    engine.dispose()


def test_services_that_start_together_on_a_new_database_all_start(database_url: str) -> None:
    """Processes, since Alembic's own state is one for each."""
    code = "import sys; from service.database import Database; Database(sys.argv[1]).close()"
    command = [sys.executable, "-c", code, database_url]

    starting = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        for _ in range(4)
    ]

    for process in starting:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said


def test_a_service_starts_while_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.database._BUSY_S", 0)
    path = tmp_path / "state.sqlite"
    Database(f"sqlite:///{path}").close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    Database(f"sqlite:///{path}").close()

    other.close()


def test_a_migration_waits_for_another_longer_than_a_writer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.database._BUSY_S", 0.01)
    path = tmp_path / "state.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("PRAGMA journal_mode=WAL")
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.5, other.execute, ("ROLLBACK",))
    release.start()

    database = Database(f"sqlite:///{path}")

    assert "calibrations" in tables(database)
    release.join()
    other.close()
    database.close()


def test_a_failed_write_leaves_nothing_behind(database: Database) -> None:
    row = {"id": "cal_1", "created": datetime.now(UTC), "created_by": "x", "profile": ""}

    with pytest.raises(ZeroDivisionError), database.write() as connection:
        connection.execute(calibrations.insert().values(**row, **vars(GRAPH)))
        raise ZeroDivisionError

    with database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(calibrations)) == 0


def test_moments_come_back_in_utc_whatever_zone_they_were_told_in(database: Database) -> None:
    told = datetime(2026, 11, 26, 15, 30, 0, 123_456, timezone(timedelta(hours=2)))
    change = {"at": told, "by": "x", "profile": "", "rolls_back": False}
    with database.write() as connection:
        connection.execute(activations.insert().values(**change, **vars(GRAPH)))

    with database.read() as connection:
        kept = connection.scalar(sa.select(activations.c.at))

    assert kept == told and kept.utcoffset() == timedelta(0)


def test_writers_wait_for_each_other(database: Database) -> None:
    entered = threading.Barrier(8)

    def insert(number: int) -> None:
        entered.wait(10)
        for part in range(5):
            row = {"at": datetime.now(UTC), "by": f"{number}-{part}", "rolls_back": False}
            with database.write() as connection:
                connection.scalar(sa.select(sa.func.count()).select_from(activations))
                connection.execute(activations.insert().values(**row, profile="", **vars(GRAPH)))

    threads = [threading.Thread(target=insert, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    with database.read() as connection:
        assert len(set(connection.scalars(sa.select(activations.c.by)))) == 40


def test_a_server_that_goes_away_is_told_as_such_and_used_again_when_it_is_back(
    postgresql: PostgreSql, request: pytest.FixtureRequest
) -> None:
    database = Database(postgresql.new_database())
    request.addfinalizer(database.close)
    try:
        postgresql.stop()
        with pytest.raises(DatabaseAway, match="postgresql://postgres@127.0.0.1"):
            tables(database)
    finally:
        postgresql.start()

    assert "calibrations" in tables(database)


def test_a_locked_sqlite_file_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.database._BUSY_S", 0.1)
    path = tmp_path / "state.sqlite"
    database = Database(f"sqlite:///{path}")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(DatabaseAway, match="locked"), database.write():
        pass

    other.execute("ROLLBACK")
    other.close()
    with database.write():
        pass
    database.close()


def test_a_database_that_cannot_be_opened_is_named_without_its_password(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")

    with pytest.raises(SettingsError, match=r"database sqlite:.*file/state.sqlite"):
        Database(f"sqlite:///{blocked}/state.sqlite")
    with pytest.raises(SettingsError, match="nobody") as refusal:
        Database("postgresql://nobody:secret@127.0.0.1:1/none")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url, reason",
    [
        ("nonsense", "no SQLAlchemy URL"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("mysql://user:secret@host/db", "mysql is none of sqlite, postgresql"),
    ],
)
def test_a_url_of_no_database_that_is_served_is_refused(url: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as refusal:
        Database(url)
    assert "secret" not in str(refusal.value)
