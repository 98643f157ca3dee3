"""Recorded inspections and what people said of them: written in batches, found, counted, removed.

An id begins with its moment, so that the order of ids is the order of time, on one service and on
several that share a database; lists are paged by it, and stay as they are while new ones come in.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa

from service.calibration import Decision
from service.database import Database, feedback, inspections
from service.errors import UnknownInspection

ID_PATTERN = "^ins_[0-9a-f]{28}$"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class Record(NamedTuple):
    """One inspection, as its row has it."""

    id: str
    at: datetime
    request_id: str
    by: str
    model: str
    version: int
    digest: str
    calibration: str | None
    profile: str
    sha256: str  # of the bytes that were sent
    bytes: int
    width: int
    height: int
    score: float
    threshold: float
    threshold_source: str
    p_value: float | None
    decision: Decision
    decode_ms: float
    queue_ms: float
    infer_ms: float
    render_ms: float
    total_ms: float
    archived: bool  # its image was handed to the archive


@dataclass(frozen=True)
class Filter:
    """Which inspections; None leaves a condition out."""

    model: str | None = None
    version: int | None = None
    profile: str | None = None  # "": none was named
    decision: Decision | None = None
    label: Decision | None = None  # that was given last
    calibration: str | None = None
    request_id: str | None = None
    sha256: str | None = None
    since: datetime | None = None
    until: datetime | None = None  # before it
    min_score: float | None = None
    max_score: float | None = None


@dataclass(frozen=True)
class Found:
    """A recorded inspection, and what the last who looked at it said."""

    record: Record
    label: Decision | None


@dataclass(frozen=True)
class Feedback:
    """What somebody said of an inspection."""

    inspection: str
    label: Decision
    note: str
    by: str
    at: datetime


@dataclass(frozen=True)
class Labelled:
    """Of an inspection that somebody looked at, what its model's record is counted from."""

    version: int
    digest: str
    score: float
    decision: Decision  # that was made
    label: Decision


class Inspections:
    """The tables; every method raises DatabaseAway where the database is."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, records: Sequence[Record]) -> None:
        """All of them or none; those that are there already stay as they are."""
        with self._database.write() as connection:
            self._database.insert_rows(connection, inspections, records)

    def get(self, id: str) -> Found:
        """Raises UnknownInspection."""
        with self._database.read() as connection:
            row = connection.execute(_select().where(inspections.c.id == id)).first()
        if row is None:
            raise _unknown(id)
        return _found(row)

    def newest(self, filter: Filter, limit: int, before: str | None = None) -> list[Found]:
        """Newest first, of those before the id `before` where one is given."""
        return self._page(filter, limit, inspections.c.id.desc(), before=before)

    def oldest(
        self, filter: Filter, limit: int, *, after: str | None = None, before: str | None = None
    ) -> list[Found]:
        """Oldest first, of those between the ids."""
        return self._page(filter, limit, inspections.c.id, after=after, before=before)

    def label(self, id: str, label: Decision, note: str, *, by: str) -> Feedback:
        """Says what an inspected part really was; raises UnknownInspection."""
        given = Feedback(id, label, note, by, datetime.now(UTC))
        there = sa.select(inspections.c.id).where(inspections.c.id == id)
        with self._database.write() as connection:
            # Kept from retention until this is committed; else the key would fail in its stead.
            if connection.scalar(there.with_for_update(key_share=True, read=True)) is None:
                raise _unknown(id)
            connection.execute(feedback.insert().values(**vars(given)))
        return given

    def feedback(self, id: str) -> list[Feedback]:
        """All that was said of an inspection, the last first."""
        query = (
            sa.select(*(column for column in feedback.c if column.name != "id"))
            .where(feedback.c.inspection == id)
            .order_by(feedback.c.id.desc())
        )
        with self._database.read() as connection:
            return [Feedback(**row) for row in connection.execute(query).mappings()]

    def labelled(
        self, model: str, version: int | None = None, profile: str | None = None
    ) -> list[Labelled]:
        """What was said last of each inspection of a model that somebody looked at."""
        last = sa.select(sa.func.max(feedback.c.id)).group_by(feedback.c.inspection)
        columns = [inspections.c[name] for name in ("version", "digest", "score", "decision")]
        query = (
            sa.select(*columns, feedback.c.label)
            .join(feedback, feedback.c.inspection == inspections.c.id)
            .where(feedback.c.id.in_(last))
            .where(*_conditions(Filter(model=model, version=version, profile=profile)))
        )
        with self._database.read() as connection:
            return [Labelled(**row) for row in connection.execute(query).mappings()]

    def oldest_of(self, count: int, filter: Filter = Filter()) -> str | None:
        """The oldest id of the `count` newest; None where there are fewer."""
        query = sa.select(inspections.c.id).where(*_conditions(filter))
        query = query.order_by(inspections.c.id.desc())
        with self._database.read() as connection:
            return connection.scalar(query.limit(1).offset(count - 1))

    def remove_before(self, id: str, limit: int) -> int:
        """Removes the oldest of those before `id`, at most `limit`, and tells how many."""
        # Rows that another service is removing are left to it, rather than waited for.
        oldest = (
            sa.select(inspections.c.id)
            .where(inspections.c.id < id)
            .order_by(inspections.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            removed = connection.execute(inspections.delete().where(inspections.c.id.in_(oldest)))
            return removed.rowcount

    def _page(
        self,
        filter: Filter,
        limit: int,
        order: sa.ColumnElement[Any],
        *,
        after: str | None = None,
        before: str | None = None,
    ) -> list[Found]:
        query = _select().where(*_conditions(filter)).order_by(order).limit(limit)
        if after is not None:
            query = query.where(inspections.c.id > after)
        if before is not None:
            query = query.where(inspections.c.id < before)
        with self._database.read() as connection:
            return [_found(row) for row in connection.execute(query)]


def new_id() -> str:
    """Of now: 48 bits of milliseconds, and 64 that no other service draws."""
    return f"ins_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


def moment(id: str) -> datetime:
    """When an id was made, to the millisecond."""
    return _EPOCH + int(id[4:16], 16) * _MILLISECOND


def first_id(moment: datetime) -> str:
    """What no id of this moment or later is below, and every earlier one is."""
    milliseconds = -((_EPOCH - moment) // _MILLISECOND)  # rounded up
    return f"ins_{max(0, milliseconds):012x}"


def _select() -> sa.Select[Any]:
    """Rows with the label that was given last."""
    return sa.select(*inspections.c, _last_label())


def _last_label() -> sa.ScalarSelect[Any]:
    return (
        sa.select(feedback.c.label)
        .where(feedback.c.inspection == inspections.c.id)
        .order_by(feedback.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )


def _conditions(filter: Filter) -> Iterator[sa.ColumnElement[bool]]:
    c = inspections.c
    exact = ("model", "version", "profile", "decision", "calibration", "request_id", "sha256")
    for name in exact:
        value = getattr(filter, name)
        if value is not None:
            yield c[name] == value
    if filter.label is not None:  # few have any: those are looked up first
        yield c.id.in_(sa.select(feedback.c.inspection).where(feedback.c.label == filter.label))
        yield _last_label() == filter.label
    if filter.since is not None:
        yield c.id >= first_id(filter.since)
    if filter.until is not None:
        yield c.id < first_id(filter.until)
    if filter.min_score is not None:
        yield c.score >= filter.min_score
    if filter.max_score is not None:
        yield c.score <= filter.max_score


def _found(row: Any) -> Found:
    return Found(Record(*row[:-1]), row[-1])


def _unknown(id: str) -> UnknownInspection:
    return UnknownInspection(
        f"there is no inspection {id!r}: one is recorded within a second of its answer, and "
        "removed when it is too old or there are too many"
    )
