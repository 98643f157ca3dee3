"""Inspections beyond the limits are removed, the oldest first."""

from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from conftest import PostgreSql, record
from test_serve import wait_for

from service import retention
from service.database import Database
from service.errors import DatabaseAway
from service.inspections import Filter, Inspections
from service.retention import Retention

NOW = datetime.now(UTC)


@pytest.fixture
def table(database: Database, monkeypatch: pytest.MonkeyPatch) -> Inspections:
    """Inspections of each of the last 50 days, removed a few at a time."""
    monkeypatch.setattr(retention, "_SLICE", 7)
    monkeypatch.setattr(retention, "_PAUSE_S", 0.001)
    table = Inspections(database)
    table.add([record(n, at=NOW - timedelta(days=49.5 - n)) for n in range(50)])
    return table


def left(table: Inspections) -> list[str]:
    return [found.record.request_id for found in table.oldest(Filter(), 100)]


def names(numbers: range) -> list[str]:
    return [f"request-{number}" for number in numbers]


@pytest.mark.parametrize(
    ("max_age_days", "max_count", "stay"),
    [(10, 0, 10), (0, 20, 20), (10, 20, 10), (30, 20, 20), (0, 0, 50), (1000, 1000, 50)],
)
def test_the_stricter_limit_of_age_and_count_decides(
    table: Inspections, max_age_days: float, max_count: int, stay: int
) -> None:
    removed = Retention(table, max_age_days, max_count).apply()

    assert removed == 50 - stay
    assert left(table) == names(range(50 - stay, 50))


def test_it_is_applied_without_being_asked(table: Inspections) -> None:
    applied = Retention(table, 0, 5)
    applied.start()

    wait_for(lambda: len(left(table)) == 5, "not removed")

    applied.close()
    assert left(table) == names(range(45, 50))


def test_several_services_may_do_it_at_once(table: Inspections) -> None:
    several = [Retention(table, 0, 5) for _ in range(4)]
    for each in several:
        each.start()

    wait_for(lambda: len(left(table)) == 5, "not removed")

    for each in several:
        each.close()
    assert left(table) == names(range(45, 50))


def test_a_database_that_is_away_is_asked_again(
    postgresql: PostgreSql, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "INTERVAL_S", 0.05)
    with closing(Database(postgresql.new_database())) as database:
        table = Inspections(database)
        table.add([record(n) for n in range(5)])
        applied = Retention(table, 0, 2)
        postgresql.stop()
        try:
            with pytest.raises(DatabaseAway):
                applied.apply()
            applied.start()
            wait_for(lambda: "stay for now" in caplog.text, "not told")
        finally:
            postgresql.start()

        wait_for(lambda: len(left(table)) == 2, "not removed")
        applied.close()
