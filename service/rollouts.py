"""Which version of each model serves, and which one is tried beside it: for all replicas, and over
restarts.

Changes are only ever added; the last one of a model counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from service.database import Database, lock, model_activations, model_shadows, shadow_counts
from service.errors import ModelInUse, NothingToRollBack
from service.store import Graph, standing


@dataclass(frozen=True)
class Candidate:
    """A version that is tried beside the active one, since a moment."""

    id: int
    at: datetime
    by: str
    graph: Graph

    @classmethod
    def of(cls, row: Any) -> "Candidate":
        return cls(row.id, row.at, row.by, Graph.of(row))


@dataclass(frozen=True)
class Rollout:
    """What is wanted of every model that anybody decided about."""

    active: Mapping[str, Graph]
    shadows: Mapping[str, Candidate]


@dataclass(frozen=True)
class ModelActivation:
    """A change of which version serves."""

    at: datetime
    by: str
    graph: Graph
    rolls_back: bool


@dataclass(frozen=True)
class Tally:
    """Images with the same outcome, and the sums of how far both versions were apart on them."""

    images: int = 0
    score_difference: float = 0.0
    p_value_difference: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.images + other.images,
            self.score_difference + other.score_difference,
            self.p_value_difference + other.p_value_difference,
        )


class Rollouts:
    """Every method raises DatabaseAway where the database is."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def wanted(self) -> Rollout:
        with self._database.read() as connection:
            active = {row.model: Graph.of(row) for row in _latest(connection, model_activations)}
            shadows = {
                row.model: Candidate.of(row)
                for row in _latest(connection, model_shadows)
                if row.version is not None
            }
        return Rollout(active, shadows)

    def activate(self, graph: Graph, *, by: str, serving: Graph | None) -> None:
        """Let a version serve; one that was tried beside is no longer.

        `serving` is what served so far: without it, nobody could roll back to what no row names.
        """
        with self._database.write() as connection:
            lock(connection, model_activations)
            self._activate(connection, graph, by, serving)

    def pin(self, serving: Graph, *, by: str) -> None:
        """Keep what serves where nobody decided yet: the next start would take the newest."""
        with self._database.write() as connection:
            lock(connection, model_activations)
            if not _rows(connection, serving.model):
                _add(connection, model_activations, by, **vars(serving), rolls_back=False)

    def previous(self, model: str) -> Graph:
        """What served before the last activation that still stands; raises NothingToRollBack."""
        with self._database.read() as connection:
            return _previous(connection, model)

    def roll_back(self, to: Graph, *, by: str) -> None:
        """Let serve what was before, which is `to`.

        Raises NothingToRollBack, or ModelInUse where something else was before by now.
        """
        with self._database.write() as connection:
            lock(connection, model_activations)
            if _previous(connection, to.model) != to:
                raise ModelInUse(f"somebody changed which version of {to.model} serves meanwhile")
            self._activate(connection, to, by, None, rolls_back=True)

    def history(self, model: str, limit: int) -> list[ModelActivation]:
        """Changes of which version serves, newest first."""
        query = (
            sa.select(model_activations)
            .where(model_activations.c.model == model)
            .order_by(model_activations.c.id.desc())
            .limit(limit)
        )
        with self._database.read() as connection:
            return [
                ModelActivation(row.at, row.by, Graph.of(row), row.rolls_back)
                for row in connection.execute(query)
            ]

    def last_shadow(self, model: str) -> tuple[Candidate, datetime | None] | None:
        """What is tried beside a model, or was last, and until when; None: nothing ever."""
        c = model_shadows.c
        changes = sa.select(model_shadows).where(c.model == model)
        begun = changes.where(c.version.is_not(None)).order_by(c.id.desc()).limit(1)
        with self._database.read() as connection:
            last = connection.execute(begun).first()
            if last is None:
                return None
            end = connection.execute(changes.where(c.id > last.id).order_by(c.id)).first()
        return Candidate.of(last), end.at if end else None

    def set_shadow(self, graph: Graph, *, by: str) -> None:
        """Try a version beside the active one, in place of another; counting starts anew."""
        with self._database.write() as connection:
            _add(connection, model_shadows, by, **vars(graph))

    def end_shadow(self, model: str, *, by: str) -> None:
        with self._database.write() as connection:
            _add(connection, model_shadows, by, model=model)

    def count(self, shadow: int, tallies: Mapping[str, Tally]) -> None:
        """Add to what was counted of a shadow, by outcome."""
        c = shadow_counts.c
        with self._database.write() as connection:
            for outcome, tally in tallies.items():
                row = {"shadow": shadow, "outcome": outcome}
                new = self._database.insert_new(shadow_counts)
                connection.execute(new.values(**row, **vars(Tally())))
                added = {name: c[name] + value for name, value in vars(tally).items()}
                update = shadow_counts.update().where(c.shadow == shadow, c.outcome == outcome)
                connection.execute(update.values(**added))

    def counts(self, shadow: int) -> dict[str, Tally]:
        """What all replicas counted of a shadow, by outcome."""
        query = sa.select(shadow_counts).where(shadow_counts.c.shadow == shadow)
        with self._database.read() as connection:
            return {
                row.outcome: Tally(row.images, row.score_difference, row.p_value_difference)
                for row in connection.execute(query)
            }

    def _activate(
        self,
        connection: sa.Connection,
        graph: Graph,
        by: str,
        serving: Graph | None,
        *,
        rolls_back: bool = False,
    ) -> None:
        if serving not in (None, graph) and not _rows(connection, graph.model):
            _add(connection, model_activations, by, **vars(serving), rolls_back=False)
        _add(connection, model_activations, by, **vars(graph), rolls_back=rolls_back)
        shadow = {row.model: row for row in _latest(connection, model_shadows)}.get(graph.model)
        if shadow is not None and shadow.version == graph.version:
            _add(connection, model_shadows, by, model=graph.model)


def _add(connection: sa.Connection, table: sa.Table, by: str, **values: object) -> None:
    connection.execute(table.insert().values(at=datetime.now(UTC), by=by, **values))


def _latest(connection: sa.Connection, table: sa.Table) -> sa.CursorResult[Any]:
    """The last row of every model."""
    last = sa.select(sa.func.max(table.c.id)).group_by(table.c.model)
    return connection.execute(sa.select(table).where(table.c.id.in_(last)))


def _rows(connection: sa.Connection, model: str) -> list[Any]:
    table = model_activations
    query = sa.select(table).where(table.c.model == model).order_by(table.c.id)
    return list(connection.execute(query))


def _previous(connection: sa.Connection, model: str) -> Graph:
    changes = [(Graph.of(row), bool(row.rolls_back)) for row in _rows(connection, model)]
    stack = standing(changes[1:], changes[0][0]) if changes else []
    if len(stack) < 2:
        raise NothingToRollBack(f"no other version of {model} served before")
    return stack[-2]
