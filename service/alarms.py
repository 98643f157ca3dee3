"""Drift alarms and who took them back: kept, so that all services tell the same after a restart."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sa

from service.database import Database, drift_events
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
        c = drift_events.c
        newest = sa.select(sa.func.max(c.id)).where(*_of(graph)).group_by(c.profile, c.calibration)
        return {
            (event.profile, event.calibration): event
            for event in self._read(sa.select(drift_events).where(c.id.in_(newest)))
        }

    def add(
        self,
        kind: Kind,
        graph: Graph,
        profile: str,
        calibration: str,
        *,
        images: int,
        statistic: float,
        by: str = "",
    ) -> DriftEvent:
        event = DriftEvent(
            datetime.now(UTC), by, graph, profile, calibration, kind, images, statistic
        )
        row = vars(event) | vars(graph)
        del row["graph"]
        with self._database.write() as connection:
            connection.execute(drift_events.insert().values(**row))
        return event

    def history(self, graph: Graph, limit: int = 100) -> list[DriftEvent]:
        """Newest first."""
        query = sa.select(drift_events).where(*_of(graph))
        return list(self._read(query.order_by(drift_events.c.id.desc()).limit(limit)))

    def _read(self, query: sa.Select[tuple[object, ...]]) -> Sequence[DriftEvent]:
        with self._database.read() as connection:
            return [
                DriftEvent(
                    at=row.at,
                    by=row.by,
                    graph=Graph(row.model, row.version, row.digest),
                    profile=row.profile,
                    calibration=row.calibration,
                    kind=row.kind,
                    images=row.images,
                    statistic=row.statistic,
                )
                for row in connection.execute(query)
            ]


def _of(graph: Graph) -> list[sa.ColumnElement[bool]]:
    return [drift_events.c[name] == value for name, value in vars(graph).items()]
