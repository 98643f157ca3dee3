"""What must survive a restart."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from service.calibration import Calibration
from service.errors import SettingsError
from service.store import Graph, Sample, Store, StoredCalibration, new_id

HERE = Graph("part", 1, "a" * 64)
# Another model, another version, another graph: each differs from HERE in one thing.
ELSEWHERE = [Graph("gear", 1, "a" * 64), Graph("part", 2, "a" * 64), Graph("part", 1, "b" * 64)]


def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'new' / 'folder' / 'state.sqlite'}"


def add(store: Store, graph: Graph = HERE, activate: bool = True) -> StoredCalibration:
    samples = [Sample(f"{i}.png", f"{i:064x}", 0.1 + i / 100) for i in range(20)]
    calibration = Calibration(new_id(), 0.05, np.array([s.score for s in samples]))
    return store.add(graph, calibration, samples, activate=activate)


def active_id(store: Store, graph: Graph = HERE) -> str | None:
    calibration = store.active(graph)
    return calibration.id if calibration else None


def test_a_calibration_is_the_same_after_a_restart(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    added = add(store)
    store.close()

    again = Store(url(tmp_path))

    active = again.active(HERE)
    assert active is not None
    assert (active.id, active.threshold) == (added.id, added.threshold)
    assert active.p_value(0.105) == pytest.approx(20 / 21)
    assert again.list() == [added]


def test_the_threshold_that_was_told_is_kept_whatever_would_be_computed_today(
    tmp_path: Path,
) -> None:
    store = Store(url(tmp_path))
    add(store)
    with sqlite3.connect(tmp_path / "new" / "folder" / "state.sqlite") as database:
        database.execute("UPDATE calibrations SET threshold = 0.75")
    database.close()

    active = store.active(HERE)

    assert active is not None and active.threshold == 0.75


def test_a_new_database_is_told_and_an_old_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Store(url(tmp_path)).close()
    assert "new database" in caplog.text
    caplog.clear()

    Store(url(tmp_path)).close()

    assert caplog.text == ""


def test_activating_one_replaces_the_one_before(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    first, second = add(store), add(store)

    assert active_id(store) == second.id
    assert {c.id: c.active for c in store.list()} == {first.id: False, second.id: True}


def test_one_that_is_not_activated_is_kept_and_changes_nothing(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    first = add(store)
    add(store, activate=False)

    assert active_id(store) == first.id
    assert len(store.list()) == 2


def test_an_earlier_one_can_be_activated_again(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    first, second = add(store), add(store)

    found = store.get(first.id)
    assert found is not None
    store.activate(found)

    assert active_id(store) == first.id
    assert {c.id: c.active for c in store.list()} == {first.id: True, second.id: False}
    assert store.get("cal_unknown") is None


@pytest.mark.parametrize("other", ELSEWHERE)
def test_a_calibration_never_touches_another_graph(tmp_path: Path, other: Graph) -> None:
    store = Store(url(tmp_path))
    mine = add(store)

    assert active_id(store, other) is None
    theirs = add(store, other)

    assert active_id(store) == mine.id
    assert active_id(store, other) == theirs.id


def test_the_list_is_newest_first_by_model_and_limited(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    first, second, third = add(store), add(store), add(store)

    assert [c.id for c in store.list("part")] == [third.id, second.id, first.id]
    assert [c.id for c in store.list("part", limit=2)] == [third.id, second.id]
    assert store.list("other") == []


def test_a_database_that_cannot_be_opened_is_named_without_its_password(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")

    with pytest.raises(SettingsError, match=r"database sqlite:.*file/state.sqlite"):
        Store(f"sqlite:///{blocked}/state.sqlite")
    with pytest.raises(SettingsError) as refusal:
        Store("nosuchdatabase://user:secret@host/db")
    assert "secret" not in str(refusal.value)


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="no SQLAlchemy URL"):
        Store("nonsense")
