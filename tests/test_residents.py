"""Which models stay in memory, told from the order in which they were used."""

from dataclasses import dataclass, field
from typing import Any, cast

from service.model import Key, Model
from service.residents import Residents


@dataclass
class Queue:
    busy: bool = False


@dataclass
class Loaded:
    """As much of a model as matters here."""

    key: Key
    batcher: Queue = field(default_factory=Queue)


def residents(limit: int, *keys: Key, busy: tuple[Key, ...] = ()) -> Residents:
    found = Residents(limit)
    for key in keys:
        found.add(cast(Model, cast(Any, Loaded(key, Queue(key in busy)))))
    return found


A, B, C = ("a", 1), ("b", 1), ("c", 1)
ACTIVE = {"a": 1, "b": 1, "c": 1}


def test_without_a_limit_active_versions_and_one_more_of_each_stay() -> None:
    found = residents(0, A, B, ("a", 2), ("a", 3), ("b", 2), ("a", 4))

    assert found.surplus(ACTIVE, ()) == [("a", 2), ("a", 3)]


def test_without_a_limit_what_is_kept_is_not_the_one_more() -> None:
    found = residents(0, A, ("a", 2), ("a", 3))

    assert found.surplus(ACTIVE, {("a", 2)}) == []


def test_the_least_recently_used_go_first() -> None:
    found = residents(2, A, B, C)
    assert found.surplus(ACTIVE, ()) == [A]

    found.use(A)

    assert found.surplus(ACTIVE, ()) == [B]


def test_asking_for_what_is_not_loaded_changes_nothing() -> None:
    found = residents(2, A, B, C)

    assert found.use(("d", 1)) is None
    assert found.surplus(ACTIVE, ()) == [A]


def test_idle_ones_go_before_those_that_answer_somebody() -> None:
    assert residents(2, A, B, C, busy=(A,)).surplus(ACTIVE, ()) == [B]
    assert residents(1, A, B, C, busy=(A,)).surplus(ACTIVE, ()) == [B, A]


def test_what_was_used_last_stays_even_alone_and_idle() -> None:
    assert residents(1, A, B, busy=(A,)).surplus(ACTIVE, ()) == [A]


def test_what_is_kept_comes_on_top_of_the_limit() -> None:
    assert residents(1, A, B, C).surplus(ACTIVE, {A}) == [B]
    assert residents(1, A, B).surplus(ACTIVE, {A}) == []


def test_other_versions_count_as_well() -> None:
    assert residents(2, A, B, ("a", 2)).surplus(ACTIVE, ()) == [A]
