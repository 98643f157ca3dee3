"""Recorded inspections: written, found page by page, judged, removed; on SQLite and PostgreSQL."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from conftest import record

from service.database import Database, feedback, inspections
from service.errors import UnknownInspection
from service.inspections import (
    Filter,
    Found,
    Inspections,
    Labelled,
    Record,
    first_id,
    moment,
    new_id,
)

ALL = Filter()


@pytest.fixture
def table(database: Database) -> Inspections:
    return Inspections(database)


def ids(found: list[Found]) -> list[str]:
    return [each.record.id for each in found]


def pages(ask: Callable[[str | None], list[Found]]) -> Iterator[list[str]]:
    """Every page, until an empty one."""
    last = None
    while page := ids(ask(last)):
        yield page
        last = page[-1]


# Ids


def test_ids_are_in_the_order_of_their_moments_and_never_the_same() -> None:
    made = [new_id() for _ in range(10_000)]

    assert len(set(made)) == len(made)
    assert [moment(id) for id in sorted(made)] == sorted(moment(id) for id in made)
    assert abs(moment(made[-1]) - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize("microsecond", [0, 1, 999, 1000, 123_000, 123_456])
def test_a_moment_parts_earlier_ids_from_the_others(microsecond: int) -> None:
    told = datetime(2026, 11, 26, 15, 30, 0, microsecond, timezone(timedelta(hours=2)))

    first = first_id(told)

    for number in range(-3, 4):
        at = told.replace(microsecond=0) + timedelta(milliseconds=microsecond // 1000 + number)
        assert (record(at=at).id >= first) == (at >= told)


# Written and found


def test_a_record_comes_back_as_it_was(table: Inspections) -> None:
    plain = record(1)
    bare = record(2, calibration=None, p_value=None, profile="", archived=True)

    table.add([plain, bare])

    assert table.get(plain.id) == Found(plain, None)
    assert table.get(bare.id) == Found(bare, None)
    assert moment(plain.id) == plain.at


def test_the_record_has_the_columns_of_its_table() -> None:
    assert Record._fields == tuple(inspections.c.keys())


def test_what_is_there_already_is_left_as_it_is_and_the_rest_is_added(table: Inspections) -> None:
    """A batch is sent again where the answer to its commit was lost."""
    table.add([record(1), record(2)])

    table.add([record(2, score=9.0), record(3)])

    assert ids(table.newest(ALL, 10)) == [record(n).id for n in (3, 2, 1)]
    assert table.get(record(2).id).record == record(2)


def test_a_batch_is_written_whole_or_not_at_all(table: Inspections) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        table.add([record(1), record(2, decision=None)])

    assert table.newest(ALL, 10) == []


def test_an_inspection_that_is_not_there_is_named(table: Inspections) -> None:
    with pytest.raises(UnknownInspection, match=record(1).id):
        table.get(record(1).id)


FILTERS = [
    (Filter(model="gear"), [1]),
    (Filter(version=7), [2]),
    (Filter(profile="left"), [3]),
    (Filter(profile=""), [4]),
    (Filter(decision="anomalous"), [5]),
    (Filter(calibration="cal_1"), [6]),
    (Filter(request_id="mine"), [7]),
    (Filter(sha256="f" * 64), [8]),
    (Filter(since=record(8).at), [9, 8]),
    (Filter(until=record(1).at), [0]),
    (Filter(since=record(3).at, until=record(5).at), [4, 3]),
    (Filter(min_score=0.75), [9]),
    (Filter(max_score=0.25), [0]),
    (Filter(min_score=0.75, max_score=0.75), [9]),
    (Filter(model="gear", decision="anomalous"), []),
    (ALL, list(range(9, -1, -1))),
]


def test_filters_leave_what_they_name(table: Inspections) -> None:
    changed = {
        0: {"score": 0.25},
        1: {"model": "gear"},
        2: {"version": 7},
        3: {"profile": "left"},
        4: {"profile": ""},
        5: {"decision": "anomalous"},
        6: {"calibration": "cal_1"},
        7: {"request_id": "mine"},
        8: {"sha256": "f" * 64},
        9: {"score": 0.75},
    }
    table.add([record(number, **changed[number]) for number in range(10)])

    for filter, numbers in FILTERS:
        expected = [record(number).id for number in numbers]
        assert ids(table.newest(filter, 10)) == expected, filter
        assert ids(table.oldest(filter, 10)) == expected[::-1], filter


def test_pages_hold_each_inspection_once_while_new_ones_come_in(table: Inspections) -> None:
    table.add([record(number) for number in range(100)])
    coming = iter(range(100, 200))
    seen: list[str] = []

    for page in pages(lambda last: table.newest(ALL, 7, before=last)):
        assert len(page) <= 7
        seen += page
        table.add([record(next(coming)) for _ in range(5)])

    assert seen == [record(number).id for number in range(99, -1, -1)]


def test_pages_from_the_oldest_on_end_where_they_are_told_to(table: Inspections) -> None:
    table.add([record(number) for number in range(20)])

    found = pages(lambda last: table.oldest(ALL, 4, after=last, before=record(10).id))

    assert [id for page in found for id in page] == [record(number).id for number in range(10)]


# Feedback


def test_the_last_word_counts_and_all_are_kept(table: Inspections) -> None:
    id = record(1).id
    table.add([record(1), record(2)])

    table.label(id, "anomalous", "a scratch", by="a")
    last = table.label(id, "normal", "dust", by="b")

    assert table.get(id).label == "normal"
    assert [(said.by, said.label, said.note) for said in table.feedback(id)] == [
        ("b", "normal", "dust"),
        ("a", "anomalous", "a scratch"),
    ]
    assert table.feedback(id)[0] == last
    assert table.get(record(2).id).label is None


def test_labels_are_filtered_by_the_last_word(table: Inspections) -> None:
    table.add([record(number) for number in range(4)])
    table.label(record(1).id, "anomalous", "", by="a")
    table.label(record(2).id, "anomalous", "", by="a")
    table.label(record(2).id, "normal", "", by="a")
    table.label(record(2).id, "normal", "once more", by="a")

    assert ids(table.newest(Filter(label="anomalous"), 10)) == [record(1).id]
    assert ids(table.oldest(Filter(label="normal"), 10)) == [record(2).id]


def test_feedback_on_an_inspection_that_is_not_there_is_refused(table: Inspections) -> None:
    with pytest.raises(UnknownInspection):
        table.label(record(1).id, "normal", "", by="a")


def test_labelled_inspections_are_those_of_the_model_with_their_last_label(
    table: Inspections,
) -> None:
    table.add(
        [
            record(1, decision="anomalous", score=0.9),
            record(2, version=2, profile="left"),
            record(3, model="gear"),
            record(4),
        ]
    )
    for number in (1, 2, 3):
        table.label(record(number).id, "anomalous", "", by="a")
    table.label(record(1).id, "normal", "", by="a")

    first = Labelled(1, record(1).digest, 0.9, "anomalous", "normal")
    second = Labelled(2, record(2).digest, record(2).score, "normal", "anomalous")
    assert sorted(table.labelled("part"), key=lambda one: one.version) == [first, second]
    assert table.labelled("part", version=2) == [second]
    assert table.labelled("part", profile="left") == [second]
    assert table.labelled("nothing") == []


# Removed


def test_the_oldest_are_removed_some_at_a_time_with_what_was_said_of_them(
    table: Inspections, database: Database
) -> None:
    table.add([record(number) for number in range(10)])
    for number in (0, 9):
        table.label(record(number).id, "normal", "", by="a")
    end = table.oldest_of(4)
    assert end == record(6).id

    removed = [table.remove_before(end, 4) for _ in range(3)]

    assert removed == [4, 2, 0]
    assert ids(table.newest(ALL, 10)) == [record(number).id for number in (9, 8, 7, 6)]
    with database.read() as connection:
        assert connection.scalars(sa.select(feedback.c.inspection)).all() == [record(9).id]


def test_fewer_than_are_allowed_have_no_end(table: Inspections) -> None:
    table.add([record(number) for number in range(3)])

    assert table.oldest_of(4) is None
    assert table.oldest_of(3) == record(0).id
