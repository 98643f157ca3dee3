"""What must survive a restart: calibrations, and which of them is in force."""

import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import sqlalchemy as sa

from service.calibration import Calibration
from service.contamination import Tail
from service.database import Database
from service.errors import (
    CalibrationFinished,
    CalibrationInUse,
    InvalidParameter,
    NothingToRollBack,
    TooFewSamples,
    UnknownCalibration,
    UnknownSample,
)
from service.store import MAPS_KEPT, Graph, Made, Sample, Store, StoredCalibration

HERE = Graph("part", 1, "a" * 64)
# Another model, another version, another graph: each differs from HERE in one thing.
ELSEWHERE = [Graph("gear", 1, "a" * 64), Graph("part", 2, "a" * 64), Graph("part", 1, "b" * 64)]


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


def sample(number: int, score: float | None = None, map: bytes | None = None) -> Sample:
    score = 0.1 + number / 100 if score is None else score
    pixels = f"{number + 10**6:064x}"
    return Sample(f"{number}.png", f"{number:064x}", score, pixels, "cpu in float32", map=map)


def made(scores: np.ndarray, activate: bool = False) -> Made:
    return Made(Calibration("", 0.05, scores), Tail(0.5, 1), activate)


def made_and_activated(scores: np.ndarray) -> Made:
    return made(scores, activate=True)


def add(
    store: Store, graph: Graph = HERE, profile: str = "", activate: bool = True
) -> StoredCalibration:
    make = made_and_activated if activate else made
    stored, _ = store.add(
        graph, [sample(i) for i in range(20)], make, profile=profile, by="somebody"
    )
    return stored


def test_a_calibration_is_the_same_after_a_restart(database_url: str) -> None:
    with closing(Database(database_url)) as database:
        added = add(Store(database))

    with closing(Database(database_url)) as database:
        again = Store(database)
        found, active = again.find(), again.active(HERE)
        calibration = again.calibration(added.id)

    assert found == [added] and active == {"": added.id}
    assert added.finish is not None and calibration.threshold == added.finish.threshold
    assert calibration.p_value(0.105) == pytest.approx(20 / 21)
    assert (added.created_by, added.active) == ("somebody", True)
    assert abs(datetime.now(UTC) - added.created) < timedelta(minutes=1)


def test_the_threshold_that_was_told_is_kept_whatever_would_be_computed_today(
    database: Database,
) -> None:
    store = Store(database)
    added = add(store)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE calibrations SET threshold = 0.75"))

    assert store.calibration(added.id).threshold == 0.75


# Filling one


def test_a_calibration_is_filled_over_time_and_finished(store: Store) -> None:
    opened = store.open(HERE, by="a")
    for part in range(0, 20, 5):
        assert store.add_samples(opened.id, [sample(i) for i in range(part, part + 5)]) == []
    assert (opened.finish, store.active(HERE)) == (None, {})

    finished = store.finish(opened.id, made_and_activated, by="b")

    assert finished.finish is not None
    assert (finished.finish.samples, finished.finish.tail) == (20, Tail(0.5, 1))
    assert store.active(HERE) == {"": opened.id}
    assert (finished.created_by, store.history()[0].by) == ("a", "b")
    assert store.engines(opened.id) == ["cpu in float32"]


def test_a_sample_counts_once_by_file_and_by_pixels(store: Store) -> None:
    id = store.open(HERE, by="a").id
    first, same_file = sample(1), sample(1)
    same_pixels = Sample("copy.bmp", "f" * 64, 0.3, first.pixels_sha256)

    assert store.add_samples(id, [first]) == []
    assert store.add_samples(id, [same_file, same_pixels, sample(2)]) == [same_file, same_pixels]

    assert [found.name for found in store.samples(id)] == ["2.png", "1.png"]
    assert store.digests(id) == {sample(1).sha256, sample(2).sha256}


def test_the_same_sample_belongs_to_any_number_of_calibrations(store: Store) -> None:
    first, second = store.open(HERE, by="a").id, store.open(HERE, by="a").id

    assert store.add_samples(first, [sample(1)]) == store.add_samples(second, [sample(1)]) == []


def test_two_who_send_the_same_samples_at_once_add_them_once(store: Store) -> None:
    id = store.open(HERE, by="a").id
    taken: list[Sample] = []

    def send() -> None:
        for number in range(30):
            taken.extend(store.add_samples(id, [sample(number)]))

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert store.counts(id).counted == 30
    assert len(taken) == 60


def test_an_excluded_sample_counts_no_more_and_can_be_taken_in_again(store: Store) -> None:
    id = store.open(HERE, by="a").id
    store.add_samples(id, [sample(i) for i in range(20)])

    store.exclude(id, sample(19).sha256, True)

    assert store.scores(id).max() == pytest.approx(0.28)
    assert vars(store.counts(id)) == {"counted": 19, "excluded": 1}
    assert store.samples(id, 1)[0].excluded
    store.exclude(id, sample(19).sha256, False)
    assert store.scores(id).max() == pytest.approx(0.29)


def test_a_finished_calibration_never_changes(store: Store) -> None:
    id = add(store).id

    for change in (
        lambda: store.add_samples(id, [sample(99)]),
        lambda: store.exclude(id, sample(1).sha256, True),
        lambda: store.finish(id, made, by="a"),
    ):
        with pytest.raises(CalibrationFinished, match=f"source={id}"):
            change()

    assert store.counts(id).counted == 20


def test_a_new_one_begins_with_anothers_samples_and_leaves_that_alone(store: Store) -> None:
    first = add(store)
    second = store.open(HERE, by="b", source=first.id)
    store.exclude(second.id, sample(19).sha256, True)
    store.add_samples(second.id, [sample(30, score=0.05)])

    finished = store.finish(second.id, made, by="b")

    assert finished.finish is not None and first.finish is not None
    assert (finished.finish.samples, finished.source) == (20, first.id)
    assert finished.finish.threshold < first.finish.threshold
    assert store.counts(first.id).counted == 20


def test_scores_of_another_graph_are_no_source(store: Store) -> None:
    first = add(store)

    for other in ELSEWHERE:
        with pytest.raises(InvalidParameter, match="another graph"):
            store.open(other, by="b", source=first.id)

    assert len(store.find()) == 1


def test_one_that_cannot_be_finished_stays_open(store: Store) -> None:
    id = store.open(HERE, by="a").id
    store.add_samples(id, [sample(i) for i in range(10)])

    with pytest.raises(TooFewSamples):
        store.finish(id, made_and_activated, by="a")

    assert (store.get(id).finish, store.active(HERE)) == (None, {})


def test_one_that_fails_at_once_leaves_nothing(store: Store) -> None:
    with pytest.raises(TooFewSamples):
        store.add(HERE, [sample(1)], made_and_activated, by="a")

    assert store.find() == []


def test_maps_are_kept_of_the_highest_scores_alone(store: Store) -> None:
    id = store.open(HERE, by="a").id
    for part in range(0, 60, 20):
        store.add_samples(id, [sample(i, map=b"map") for i in range(part, part + 20)])

    kept = [store.sample(id, sample(i).sha256).map is not None for i in range(60)]

    assert kept == [False] * (60 - MAPS_KEPT) + [True] * MAPS_KEPT
    assert store.samples(id, 1)[0].map is None  # lists don't carry them


def test_what_is_not_there_is_named(store: Store) -> None:
    id = store.open(HERE, by="a").id

    with pytest.raises(UnknownCalibration, match="'cal_unknown'"):
        store.get("cal_unknown")
    with pytest.raises(UnknownCalibration):
        store.samples("cal_unknown")
    with pytest.raises(UnknownSample, match="f" * 64):
        store.sample(id, "f" * 64)
    with pytest.raises(UnknownSample):
        store.exclude(id, "f" * 64, True)


# In force


def test_activating_one_replaces_the_one_before(store: Store) -> None:
    first, second = add(store), add(store)

    assert store.active(HERE) == {"": second.id}
    assert {c.id: c.active for c in store.find()} == {first.id: False, second.id: True}


def test_one_that_is_not_activated_is_kept_and_changes_nothing(store: Store) -> None:
    first = add(store)
    add(store, activate=False)

    assert store.active(HERE) == {"": first.id}
    assert len(store.find()) == 2


def test_an_earlier_one_can_be_activated_again(store: Store) -> None:
    first, second = add(store), add(store)

    store.activate(first.id, by="a")

    assert store.active(HERE) == {"": first.id}
    assert {c.id: c.active for c in store.find()} == {first.id: True, second.id: False}


def test_an_open_one_cannot_be_activated(store: Store) -> None:
    id = store.open(HERE, by="a").id

    with pytest.raises(CalibrationFinished, match="is open"):
        store.activate(id, by="a")


@pytest.mark.parametrize("other", ELSEWHERE)
def test_a_calibration_never_touches_another_graph(store: Store, other: Graph) -> None:
    mine = add(store)

    assert store.active(other) == {}
    theirs = add(store, other)

    assert store.active(HERE) == {"": mine.id}
    assert store.active(other) == {"": theirs.id}


def test_profiles_have_each_their_own(store: Store) -> None:
    model, left, right = add(store), add(store, profile="left"), add(store, profile="right")
    assert store.active(HERE) == {"": model.id, "left": left.id, "right": right.id}

    store.deactivate(HERE, "left", by="a")

    assert store.active(HERE) == {"": model.id, "right": right.id}
    assert [c.id for c in store.find(profile="right")] == [right.id]
    assert store.calibration(right.id).profile == "right"


def test_rolling_back_goes_one_step_back_each_time(store: Store) -> None:
    first, second, third = add(store), add(store), add(store)
    store.activate(third.id, by="a")  # which is in force already, and no step

    assert store.roll_back(HERE, by="a") == second.id
    assert store.roll_back(HERE, by="a") == first.id
    assert store.roll_back(HERE, by="a") is None  # the bundle's own
    with pytest.raises(NothingToRollBack, match="part version 1"):
        store.roll_back(HERE, by="a")

    assert store.active(HERE) == {}
    add(store)
    assert store.roll_back(HERE, by="a") is None


def test_rolling_back_a_profile_leaves_the_model_alone(store: Store) -> None:
    model, left = add(store), add(store, profile="left")

    assert store.roll_back(HERE, "left", by="a") is None

    assert store.active(HERE) == {"": model.id}
    with pytest.raises(NothingToRollBack, match="profile right"):
        store.roll_back(HERE, "right", by="a")
    assert left.profile == "left"


def test_rolling_back_passes_over_what_was_deleted(store: Store) -> None:
    first, second, _ = add(store), add(store), add(store)
    store.delete(second.id, by="a")

    assert store.roll_back(HERE, by="a") == first.id
    assert store.roll_back(HERE, by="a") is None


def test_rolling_back_after_a_deletion_goes_where_it_says(store: Store) -> None:
    first, second = add(store), add(store)
    store.deactivate(HERE, by="a")
    store.delete(second.id, by="a")
    assert store.roll_back(HERE, by="a") == first.id
    assert store.roll_back(HERE, by="a") is None

    add(store)
    assert store.roll_back(HERE, by="a") is None  # as was in force before it


def test_changes_at_once_never_deadlock(store: Store) -> None:
    one, other = add(store), add(store)
    spare = [add(store, activate=False) for _ in range(5)]
    failed: list[Exception] = []

    def act(change: Callable[[int], object]) -> None:
        for number in range(15):
            try:
                change(number)
            except (NothingToRollBack, CalibrationInUse, UnknownCalibration):
                pass
            except Exception as error:
                failed.append(error)

    changes: list[Callable[[int], object]] = [
        lambda number: store.activate((one, other)[number % 2].id, by="a"),
        lambda number: store.roll_back(HERE, by="b"),
        lambda number: store.delete(spare[number % 5].id, by="c"),
    ]
    threads = [threading.Thread(target=act, args=(change,)) for change in changes * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert failed == []


def test_history_tells_who_put_what_in_force_when(store: Store) -> None:
    first, second = add(store), add(store, profile="left")
    store.activate(first.id, by="b")
    store.roll_back(HERE, "left", by="c")
    add(store, ELSEWHERE[0])

    told = store.history("part")

    assert [(a.by, a.profile, a.calibration, a.rolls_back) for a in told] == [
        ("c", "left", None, True),
        ("b", "", first.id, False),
        ("somebody", "left", second.id, False),
        ("somebody", "", first.id, False),
    ]
    assert told[0].at >= told[-1].at
    assert len(store.history()) == 5 and len(store.history(limit=2)) == 2


def test_the_stamp_changes_with_what_is_in_force_and_with_nothing_else(store: Store) -> None:
    seen = {store.stamp()}
    first = add(store)
    seen.add(store.stamp())
    store.deactivate(HERE, by="a")
    seen.add(store.stamp())
    store.activate(first.id, by="a")
    seen.add(store.stamp())
    store.roll_back(HERE, by="a")
    seen.add(store.stamp())
    assert len(seen) == 5

    before = store.stamp()
    add(store, activate=False)
    assert store.stamp() == before


# Lists and deletion


def test_the_list_is_newest_first_by_model_and_limited(store: Store) -> None:
    first, second, third = add(store), add(store), add(store)

    assert [c.id for c in store.find("part")] == [third.id, second.id, first.id]
    assert [c.id for c in store.find("part", limit=2)] == [third.id, second.id]
    assert store.find("other") == []


def test_one_in_force_cannot_be_deleted(store: Store) -> None:
    added = add(store)

    with pytest.raises(CalibrationInUse, match=added.id):
        store.delete(added.id, by="a")

    assert store.active(HERE) == {"": added.id}


def test_a_deleted_one_leaves_the_list_and_can_still_be_traced(store: Store) -> None:
    added = add(store)
    store.deactivate(HERE, by="a")

    store.delete(added.id, by="b")

    assert store.find() == []
    found = store.get(added.id)
    assert (found.deleted_by, found.finish) == ("b", added.finish)
    assert len(store.samples(added.id)) == 20
    for again in (lambda: store.activate(added.id, by="a"), lambda: store.delete(added.id, by="a")):
        with pytest.raises(UnknownCalibration, match="was deleted"):
            again()


def test_a_deleted_open_one_is_gone_with_its_samples(store: Store, database: Database) -> None:
    id = store.open(HERE, by="a").id
    store.add_samples(id, [sample(1)])

    store.delete(id, by="a")

    with pytest.raises(UnknownCalibration):
        store.get(id)
    with database.read() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM samples")) == 0
