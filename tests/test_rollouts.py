"""Which version serves and which is tried beside it: agreed on by replicas, kept over restarts."""

import threading
from contextlib import closing

import pytest

from service.database import Database
from service.errors import ModelInUse, NothingToRollBack
from service.rollouts import Rollout, Rollouts, Tally
from service.store import Graph

FIRST, SECOND, THIRD = (Graph("part", version, str(version) * 64) for version in (1, 2, 3))
OTHER = Graph("gear", 1, "f" * 64)


@pytest.fixture
def rollouts(database: Database) -> Rollouts:
    return Rollouts(database)


def activate(rollouts: Rollouts, *graphs: Graph, serving: Graph | None = None) -> None:
    for graph in graphs:
        rollouts.activate(graph, by="somebody", serving=serving)


def test_nothing_is_wanted_of_models_that_nobody_decided_about(rollouts: Rollouts) -> None:
    assert rollouts.wanted() == Rollout({}, {})


def test_the_last_activation_of_each_model_counts_after_a_restart(database_url: str) -> None:
    with closing(Database(database_url)) as database:
        activate(Rollouts(database), FIRST, OTHER, THIRD, SECOND)

    with closing(Database(database_url)) as database:
        again = Rollouts(database)
        assert again.wanted().active == {"part": SECOND, "gear": OTHER}
        history = again.history("part", limit=2)
    assert [(change.graph, change.by, change.rolls_back) for change in history] == [
        (SECOND, "somebody", False),
        (THIRD, "somebody", False),
    ]


def test_rolling_back_goes_one_step_further_each_time(rollouts: Rollouts) -> None:
    activate(rollouts, FIRST, SECOND, SECOND, THIRD)

    for expected in (SECOND, FIRST):
        previous = rollouts.previous("part")
        rollouts.roll_back(previous, by="b")
        assert previous == expected and rollouts.wanted().active["part"] == expected

    with pytest.raises(NothingToRollBack, match="no other version of part"):
        rollouts.previous("part")
    assert [change.rolls_back for change in rollouts.history("part", 2)] == [True, True]


def test_what_served_before_the_first_activation_can_be_gone_back_to(rollouts: Rollouts) -> None:
    activate(rollouts, SECOND, serving=FIRST)
    activate(rollouts, THIRD, serving=OTHER)  # of no account any more

    rollouts.roll_back(rollouts.previous("part"), by="b")
    rollouts.roll_back(rollouts.previous("part"), by="b")

    assert rollouts.wanted().active == {"part": FIRST}


def test_pinning_keeps_what_serves_and_never_undoes_a_decision(rollouts: Rollouts) -> None:
    rollouts.pin(FIRST, by="a")
    activate(rollouts, SECOND)
    rollouts.pin(FIRST, by="a")

    assert rollouts.wanted().active == {"part": SECOND}
    assert rollouts.previous("part") == FIRST


def test_a_roll_back_to_what_was_not_before_is_refused(rollouts: Rollouts) -> None:
    activate(rollouts, FIRST, SECOND)

    with pytest.raises(ModelInUse, match="meanwhile"):
        rollouts.roll_back(THIRD, by="b")


def test_of_two_roll_backs_at_once_one_is_refused(rollouts: Rollouts) -> None:
    activate(rollouts, FIRST, SECOND, THIRD)
    refused: list[Exception] = []

    def roll_back() -> None:
        try:
            rollouts.roll_back(SECOND, by="b")
        except ModelInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=roll_back) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(refused) == 1
    assert rollouts.wanted().active == {"part": SECOND}


def test_the_last_shadow_counts_until_it_is_ended(rollouts: Rollouts) -> None:
    rollouts.set_shadow(SECOND, by="a")
    rollouts.set_shadow(THIRD, by="b")

    shadow = rollouts.wanted().shadows["part"]
    assert (shadow.graph, shadow.by) == (THIRD, "b")
    assert rollouts.last_shadow("part") == (shadow, None)

    for _ in range(2):  # as two replicas may
        rollouts.end_shadow("part", by="a")

    assert rollouts.wanted().shadows == {}
    last = rollouts.last_shadow("part")
    assert last is not None
    candidate, until = last
    assert candidate == shadow
    assert until is not None and until >= shadow.at
    assert rollouts.last_shadow("gear") is None


def test_a_shadow_that_is_activated_is_none_any_more(rollouts: Rollouts) -> None:
    rollouts.set_shadow(SECOND, by="a")
    activate(rollouts, THIRD)
    assert rollouts.wanted().shadows["part"].graph == SECOND

    activate(rollouts, SECOND)

    assert rollouts.wanted().shadows == {}


def test_what_several_count_of_a_shadow_is_added_up(rollouts: Rollouts) -> None:
    rollouts.set_shadow(SECOND, by="a")
    first = rollouts.wanted().shadows["part"].id
    rollouts.count(first, {"same": Tally(3, 0.5, 0.25), "failed": Tally(1)})
    rollouts.count(first, {"same": Tally(2, 0.25, 0.25)})

    assert rollouts.counts(first) == {"same": Tally(5, 0.75, 0.5), "failed": Tally(1)}
    rollouts.set_shadow(SECOND, by="a")
    assert rollouts.counts(rollouts.wanted().shadows["part"].id) == {}
