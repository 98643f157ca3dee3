"""Drift alarms and who took them back: kept, so that all services tell the same after a restart."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from service.database import Database, drift_events, lock
from service.store import Graph

Kind = Literal["alarm", "reset"]


@dataclass(frozen=True)
class DriftEvent:
    """An alarm of a profile's test under a calibration, or a reset, after which a new one began."""

    at: datetime
    by: str  # "": the test itself
    graph: Graph
    profile: str
    calibration: str
    kind: Kind
    images: int  # that had been tested
    statistic: float


class Alarms:
    """The table; every method raises DatabaseAway where the database is."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def last(self, graph: Graph) -> dict[tuple[str, str], DriftEvent]:
        """The last event of each profile and calibration of a graph."""
        with self._database.read() as connection:
            return self._last(connection, graph)

    def raise_alarm(
        self,
        graph: Graph,
        profile: str,
        calibration: str,
        *,
        since: datetime | None,
        images: int,
        statistic: float,
    ) -> DriftEvent | None:
        """The alarm of a test that began at the reset of `since`, raised by this service or another
        one before it; None where the test was reset meanwhile."""
        with self._database.write() as connection:
            lock(connection, drift_events)
            last = self._last(connection, graph).get((profile, calibration))
            if last and last.kind == "alarm":
                return last
            if (last.at if last else None) != since:
                return None
            event = DriftEvent(
                datetime.now(UTC), "", graph, profile, calibration, "alarm", images, statistic
            )
            _insert(connection, event)
        return event

    def reset(
        self,
        graph: Graph,
        profile: str,
        calibration: str,
        *,
        images: int,
        statistic: float,
        by: str,
    ) -> DriftEvent:
        event = DriftEvent(
            datetime.now(UTC), by, graph, profile, calibration, "reset", images, statistic
        )
        with self._database.write() as connection:
            _insert(connection, event)
        return event

    def history(self, graph: Graph, limit: int = 100) -> list[DriftEvent]:
        """Newest first."""
        query = sa.select(drift_events).where(*graph.rows_of(drift_events))
        query = query.order_by(drift_events.c.id.desc()).limit(limit)
        with self._database.read() as connection:
            return [_event(row) for row in connection.execute(query)]

    def _last(self, connection: sa.Connection, graph: Graph) -> dict[tuple[str, str], DriftEvent]:
        c = drift_events.c
        newest = (
            sa.select(sa.func.max(c.id))
            .where(*graph.rows_of(drift_events))
            .group_by(c.profile, c.calibration)
        )
        rows = connection.execute(sa.select(drift_events).where(c.id.in_(newest)))
        return {(row.profile, row.calibration): _event(row) for row in rows}


def _insert(connection: sa.Connection, event: DriftEvent) -> None:
    row = vars(event) | vars(event.graph)
    del row["graph"]
    connection.execute(drift_events.insert().values(**row))


def _event(row: Any) -> DriftEvent:
    return DriftEvent(
        at=row.at,
        by=row.by,
        graph=Graph.of(row),
        profile=row.profile,
        calibration=row.calibration,
        kind=row.kind,
        images=row.images,
        statistic=row.statistic,
    )
