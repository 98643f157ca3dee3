"""What changes after export and must survive: calibrations, their samples, which one is in force.

A calibration is opened, filled, looked at and finished; then it never changes. Its samples' scores
are kept, not the pictures; of the highest scores the anomaly maps are, to be looked at.
"""

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
import sqlalchemy as sa

from service.calibration import Calibration
from service.contamination import Tail
from service.database import Database, activations, calibrations, lock, samples
from service.errors import (
    CalibrationFinished,
    CalibrationInUse,
    InvalidParameter,
    NothingToRollBack,
    UnknownCalibration,
    UnknownSample,
)

T = TypeVar("T")
MAPS_KEPT = 32  # of a calibration: of its highest scores
_INSERTED_TOGETHER = 500  # rows; databases limit a statement's parameters


@dataclass(frozen=True)
class Graph:
    """What a calibration is bound to: no other graph, version or model ever gets it."""

    model: str
    version: int
    digest: str

    @classmethod
    def of(cls, row: Any) -> "Graph":
        """That of a table's row."""
        return cls(row.model, row.version, row.digest)

    def rows_of(self, table: sa.Table) -> list[sa.ColumnElement[bool]]:
        """The condition for its rows of a table."""
        return [table.c[name] == value for name, value in vars(self).items()]


@dataclass(frozen=True)
class Sample:
    """One normal image of a calibration."""

    name: str
    sha256: str  # of the bytes that were sent
    score: float
    pixels_sha256: str | None = None  # of what the graph saw; None: kept by an older service
    engine: str | None = None  # provider and precision that scored it
    excluded: bool = False  # by somebody who looked at it
    map: bytes | None = field(default=None, repr=False)  # packed, see `heatmap`


@dataclass(frozen=True)
class Finish:
    """What a finished calibration promises."""

    at: datetime
    target_fpr: float
    confidence: float | None
    achievable_fpr: float
    threshold: float
    samples: int
    quantiles: dict[str, float]
    tail: Tail | None  # None: finished by an older service


@dataclass(frozen=True)
class StoredCalibration:
    """A calibration without its samples."""

    id: str
    created: datetime
    created_by: str
    graph: Graph
    profile: str  # "": the model's own
    source: str | None
    finish: Finish | None  # None: open
    active: bool
    deleted: datetime | None
    deleted_by: str | None


@dataclass(frozen=True)
class Activation:
    """A change of what is in force for a graph and profile."""

    at: datetime
    by: str
    graph: Graph
    profile: str
    calibration: str | None  # None: the bundle's own threshold, or the model's for a profile
    threshold: float | None  # of the calibration
    rolls_back: bool


@dataclass(frozen=True)
class Counts:
    """Of a calibration's samples."""

    counted: int
    excluded: int


@dataclass(frozen=True)
class Made:
    """A calibration made of scores, not stored yet."""

    calibration: Calibration
    tail: Tail
    activate: bool


Finisher = Callable[[np.ndarray], Made]  # of scores (n,)


class Store:
    """Calibrations and activations; every method raises DatabaseAway where the database is."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def open(
        self, graph: Graph, profile: str = "", *, by: str, source: str | None = None
    ) -> StoredCalibration:
        """A new calibration without samples, or with those of `source`, excluded ones included.

        Raises UnknownCalibration, or InvalidParameter where `source` is another graph's.
        """
        id = new_id()
        with self._database.write() as connection:
            _open(connection, id, graph, profile, by, source)
            if source is not None:
                _copy_samples(connection, source, id, graph)
            return _get(connection, id)

    def digests(self, id: str) -> set[str]:
        """Of the files that the calibration has as samples."""
        query = sa.select(samples.c.sha256).where(samples.c.calibration == id)
        with self._database.read() as connection:
            return set(connection.scalars(query))

    def add_samples(self, id: str, new: Sequence[Sample]) -> list[Sample]:
        """Adds samples to an open calibration, and returns those that it has already, by file or
        by pixels.

        Raises UnknownCalibration or CalibrationFinished.
        """
        with self._database.write() as connection:
            check_open(_stored(_locked(connection, id), set()))
            return self._add(connection, id, new)

    def exclude(self, id: str, sha256: str, excluded: bool) -> None:
        """Leaves a sample out of an open calibration, or takes it in again.

        Raises UnknownCalibration, UnknownSample or CalibrationFinished.
        """
        with self._database.write() as connection:
            check_open(_stored(_locked(connection, id), set()))
            changed = connection.execute(
                samples.update().where(*_is_sample(id, sha256)).values(excluded=excluded)
            )
            if not changed.rowcount:
                raise UnknownSample(f"calibration {id} has no sample {sha256}")

    def finish(self, id: str, make: Finisher, *, by: str) -> StoredCalibration:
        """Finishes a calibration with what `make` gives for its scores, all or nothing.

        Raises what `make` raises, UnknownCalibration or CalibrationFinished.
        """
        with self._database.write() as connection:
            check_open(_stored(_locked(connection, id), set()))
            _finish(connection, id, make, by)
            return _get(connection, id)

    def add(
        self, graph: Graph, new: Sequence[Sample], make: Finisher, *, profile: str = "", by: str
    ) -> tuple[StoredCalibration, list[Sample]]:
        """A calibration opened, filled and finished at once, all or nothing, and the samples that
        were there already; raises as `finish`."""
        id = new_id()
        with self._database.write() as connection:
            _open(connection, id, graph, profile, by, None)
            taken = self._add(connection, id, new)
            _finish(connection, id, make, by)
            return _get(connection, id), taken

    def get(self, id: str) -> StoredCalibration:
        """Raises UnknownCalibration. A deleted one is still found."""
        with self._database.read() as connection:
            return _get(connection, id)

    def find(
        self, model: str | None = None, profile: str | None = None, limit: int = 100
    ) -> list[StoredCalibration]:
        """Calibrations, or those of a model or profile, newest first; deleted ones left out."""
        query = sa.select(calibrations).where(calibrations.c.deleted.is_(None))
        if model is not None:
            query = query.where(calibrations.c.model == model)
        if profile is not None:
            query = query.where(calibrations.c.profile == profile)
        query = query.order_by(calibrations.c.created.desc(), calibrations.c.id).limit(limit)
        with self._database.read() as connection:
            active = _active_ids(connection)
            return [_stored(row, active) for row in connection.execute(query)]

    def samples(
        self, id: str, limit: int = 100, offset: int = 0, *, excluded: bool = True
    ) -> list[Sample]:
        """Samples without their maps, highest score first, with or without those that are
        excluded; raises UnknownCalibration."""
        columns = [column for column in samples.c if column.name not in ("calibration", "map")]
        query = (
            sa.select(*columns)
            .where(samples.c.calibration == id)
            .order_by(samples.c.score.desc(), samples.c.sha256)
            .limit(limit)
            .offset(offset)
        )
        if not excluded:
            query = query.where(samples.c.excluded.is_(False))
        with self._database.read() as connection:
            _get(connection, id)
            return [Sample(**row) for row in connection.execute(query).mappings()]

    def sample(self, id: str, sha256: str) -> Sample:
        """One sample with its map; raises UnknownSample."""
        columns = [column for column in samples.c if column.name != "calibration"]
        query = sa.select(*columns).where(*_is_sample(id, sha256))
        with self._database.read() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise UnknownSample(f"calibration {id} has no sample {sha256}")
        return Sample(**row)

    def scores(self, id: str) -> np.ndarray:
        """Scores (n,) of the samples that count."""
        with self._database.read() as connection:
            return _scores(connection, id)

    def counts(self, id: str) -> Counts:
        query = sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(sa.cast(samples.c.excluded, sa.Integer)), 0),
        ).where(samples.c.calibration == id)
        with self._database.read() as connection:
            total, excluded = connection.execute(query).one()
        return Counts(total - excluded, excluded)

    def engines(self, id: str) -> list[str]:
        """What its samples were scored by."""
        query = (
            sa.select(samples.c.engine)
            .where(samples.c.calibration == id, samples.c.engine.is_not(None))
            .distinct()
            .order_by(samples.c.engine)
        )
        with self._database.read() as connection:
            return [str(engine) for engine in connection.scalars(query)]

    def activate(self, id: str, *, by: str) -> None:
        """Puts a finished calibration in force for its graph and profile.

        Raises UnknownCalibration, or CalibrationFinished where it isn't.
        """
        with self._database.write() as connection:
            lock(connection, activations)  # before the row, as whoever rolls back does
            row = _locked(connection, id)
            if row.finished is None:
                raise CalibrationFinished(f"calibration {id} is open: finish it first")
            _activate(connection, Graph.of(row), row.profile, id, by)

    def deactivate(self, graph: Graph, profile: str = "", *, by: str) -> None:
        """Leaves a graph's profile without a calibration of its own.

        Raises NothingToRollBack for a profile that has none: it may be misspelt.
        """
        with self._database.write() as connection:
            lock(connection, activations)
            in_force = connection.execute(_latest().where(*graph.rows_of(activations))).all()
            if profile and profile not in {row.profile for row in in_force if row.calibration}:
                raise NothingToRollBack(
                    f"profile {profile} of {graph.model} version {graph.version} has no "
                    "calibration in force"
                )
            _activate(connection, graph, profile, None, by)

    def roll_back(self, graph: Graph, profile: str = "", *, by: str) -> str | None:
        """Puts in force what was before the last activation that still stands, and returns it.

        Raises NothingToRollBack.
        """
        with self._database.write() as connection:
            lock(connection, activations)
            stack = _standing(connection, graph, profile)
            if len(stack) < 2:
                raise NothingToRollBack(
                    f"nothing was in force before for {graph.model} version {graph.version}"
                    + (f", profile {profile}" if profile else "")
                )
            _activate(connection, graph, profile, stack[-2], by, rolls_back=True)
            return stack[-2]

    def delete(self, id: str, *, by: str) -> None:
        """Removes an open calibration; a finished one leaves the lists, and can still be traced.

        Raises UnknownCalibration, or CalibrationInUse where it is in force.
        """
        with self._database.write() as connection:
            lock(connection, activations)
            row = _locked(connection, id)
            if row.finished is None:
                connection.execute(calibrations.delete().where(calibrations.c.id == id))
                return
            if id in _active_ids(connection):
                raise CalibrationInUse(
                    f"calibration {id} is in force: activate another one, or deactivate it, first"
                )
            gone = {"deleted": _now(), "deleted_by": by}
            connection.execute(calibrations.update().where(calibrations.c.id == id).values(**gone))
            connection.execute(samples.update().where(samples.c.calibration == id).values(map=None))

    def active(self, graph: Graph) -> dict[str, str]:
        """Ids of the calibrations in force for a graph, by profile."""
        with self._database.read() as connection:
            rows = connection.execute(_latest().where(*graph.rows_of(activations)))
            return {row.profile: row.calibration for row in rows if row.calibration is not None}

    def calibration(self, id: str) -> Calibration:
        """A finished calibration to decide by, with the threshold that was told when it was made.

        Raises UnknownCalibration.
        """
        with self._database.read() as connection:
            row = _row(connection, id)
            return Calibration(
                row.id,
                row.target_fpr,
                _scores(connection, id),
                confidence=row.confidence,
                profile=row.profile,
                made=row.finished,
                kept_threshold=row.threshold,
            )

    def history(self, model: str | None = None, limit: int = 100) -> list[Activation]:
        """Changes of what is in force, newest first."""
        query = (
            sa.select(activations, calibrations.c.threshold)
            .join(calibrations, activations.c.calibration == calibrations.c.id, isouter=True)
            .order_by(activations.c.id.desc())
            .limit(limit)
        )
        if model is not None:
            query = query.where(activations.c.model == model)
        with self._database.read() as connection:
            return [
                Activation(
                    row.at,
                    row.by,
                    Graph.of(row),
                    row.profile,
                    row.calibration,
                    row.threshold,
                    row.rolls_back,
                )
                for row in connection.execute(query)
            ]

    def stamp(self) -> tuple[int, int]:
        """Changes whenever an activation is stored, by this service or another."""
        query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.max(activations.c.id), 0))
        with self._database.read() as connection:
            count, last = connection.execute(query).one()
        return count, last

    def _add(self, connection: sa.Connection, id: str, new: Sequence[Sample]) -> list[Sample]:
        insert = self._database.insert_new(samples).returning(samples.c.sha256)
        taken = []
        for start in range(0, len(new), _INSERTED_TOGETHER):
            part = new[start : start + _INSERTED_TOGETHER]
            rows = [{"calibration": id, **vars(sample)} for sample in part]
            inserted = set(connection.scalars(insert.values(rows)))
            for sample in part:
                if sample.sha256 in inserted:
                    inserted.remove(sample.sha256)  # if it comes again, that is a duplicate
                else:
                    taken.append(sample)
        highest = (
            sa.select(samples.c.sha256)
            .where(samples.c.calibration == id)
            .order_by(samples.c.excluded, samples.c.score.desc(), samples.c.sha256)
            .limit(MAPS_KEPT)
        )
        beyond = [samples.c.calibration == id, samples.c.map.is_not(None)]
        connection.execute(
            samples.update().where(*beyond, samples.c.sha256.not_in(highest)).values(map=None)
        )
        return taken


def new_id() -> str:
    return f"cal_{secrets.token_hex(8)}"


def _now() -> datetime:
    return datetime.now(UTC)


def _is_sample(id: str, sha256: str) -> list[sa.ColumnElement[bool]]:
    return [samples.c.calibration == id, samples.c.sha256 == sha256]


def _row(connection: sa.Connection, id: str, *, lock: bool = False) -> Any:
    query = sa.select(calibrations).where(calibrations.c.id == id)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise UnknownCalibration(f"there is no calibration {id!r}")
    return row


def _locked(connection: sa.Connection, id: str) -> Any:
    """The row, which nobody else changes before this transaction ends."""
    row = _row(connection, id, lock=True)
    if row.deleted is not None:
        raise UnknownCalibration(f"calibration {id} was deleted on {row.deleted:%Y-%m-%d}")
    return row


def check_open(calibration: StoredCalibration) -> None:
    """Raises CalibrationFinished."""
    if calibration.finish is not None:
        raise CalibrationFinished(
            f"calibration {calibration.id} is finished and never changes: open a new one with "
            f"source={calibration.id}, which has its samples"
        )


def _open(
    connection: sa.Connection, id: str, graph: Graph, profile: str, by: str, source: str | None
) -> None:
    made = {"id": id, "created": _now(), "created_by": by, "profile": profile, "source": source}
    connection.execute(calibrations.insert().values(**made, **vars(graph)))


def _copy_samples(connection: sa.Connection, source: str, id: str, graph: Graph) -> None:
    row = _row(connection, source)
    if Graph.of(row) != graph:
        raise InvalidParameter(
            f"calibration {source} is of {row.model} version {row.version} ({row.digest[:12]}…), "
            "whose scores say nothing about another graph"
        )
    names = [column.name for column in samples.c if column.name != "calibration"]
    copies = sa.select(sa.literal(id), *(samples.c[name] for name in names)).where(
        samples.c.calibration == source
    )
    connection.execute(samples.insert().from_select(["calibration", *names], copies))


def _scores(connection: sa.Connection, id: str) -> np.ndarray:
    query = sa.select(samples.c.score).where(
        samples.c.calibration == id, samples.c.excluded.is_(False)
    )
    return np.array(connection.scalars(query).all(), np.float64)


def _finish(connection: sa.Connection, id: str, make: Finisher, by: str) -> None:
    made = make(_scores(connection, id))
    connection.execute(
        calibrations.update()
        .where(calibrations.c.id == id)
        .values(
            finished=_now(),
            target_fpr=made.calibration.target_fpr,
            confidence=made.calibration.confidence,
            achievable_fpr=made.calibration.achievable_fpr,
            threshold=made.calibration.threshold,
            sample_count=made.calibration.samples,
            quantiles=made.calibration.quantiles(),
            tail=vars(made.tail),
        )
    )
    if made.activate:
        row = _row(connection, id)
        _activate(connection, Graph.of(row), row.profile, id, by)


def _get(connection: sa.Connection, id: str) -> StoredCalibration:
    return _stored(_row(connection, id), _active_ids(connection))


def _stored(row: Any, active: set[str]) -> StoredCalibration:
    finish = None
    if row.finished is not None:
        finish = Finish(
            row.finished,
            row.target_fpr,
            row.confidence,
            row.achievable_fpr,
            row.threshold,
            row.sample_count,
            row.quantiles,
            Tail(**row.tail) if row.tail else None,
        )
    return StoredCalibration(
        id=row.id,
        created=row.created,
        created_by=row.created_by,
        graph=Graph.of(row),
        profile=row.profile,
        source=row.source,
        finish=finish,
        active=row.id in active,
        deleted=row.deleted,
        deleted_by=row.deleted_by,
    )


def _latest() -> sa.Select[Any]:
    """The last activation of every graph and profile."""
    c = activations.c
    last = sa.select(sa.func.max(c.id)).group_by(c.model, c.version, c.digest, c.profile)
    return sa.select(activations).where(c.id.in_(last))


def _active_ids(connection: sa.Connection) -> set[str]:
    return {row.calibration for row in connection.execute(_latest()) if row.calibration}


def _activate(
    connection: sa.Connection,
    graph: Graph,
    profile: str,
    id: str | None,
    by: str,
    *,
    rolls_back: bool = False,
) -> None:
    changed = {"at": _now(), "by": by, "profile": profile, "rolls_back": rolls_back}
    connection.execute(activations.insert().values(calibration=id, **changed, **vars(graph)))


def _standing(connection: sa.Connection, graph: Graph, profile: str) -> list[str | None]:
    """What was put in force and not rolled back since, oldest first; first of all the bundle's own.

    Calibrations that were deleted meanwhile can't be gone back to and are left out.
    """
    query = (
        sa.select(activations.c.calibration, activations.c.rolls_back, calibrations.c.deleted)
        .join(calibrations, activations.c.calibration == calibrations.c.id, isouter=True)
        .where(*graph.rows_of(activations), activations.c.profile == profile)
        .order_by(activations.c.id)
    )
    changes = [
        ((row.calibration, row.deleted is not None), bool(row.rolls_back))
        for row in connection.execute(query)
    ]
    return [id for id, deleted in standing(changes, (None, False)) if not deleted]


def standing(changes: Iterable[tuple[T, bool]], first: T) -> list[T]:
    """What was put in force and not rolled back since, oldest first; `first` of all.

    Of (what was put in force, whether that rolled back) in the order of the changes.
    """
    stack = [first]
    for value, rolls_back in changes:
        if rolls_back:  # and past what was deleted by then
            stack.pop()
            while len(stack) > 1 and stack[-1] != value:
                stack.pop()
        elif value != stack[-1]:
            stack.append(value)
    return stack
