"""What was recorded is tested for drift, by all services alike, and stays told after a restart."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from service import watch as watching
from service.alarms import Alarms
from service.calibration import Calibration
from service.database import Database
from service.drift import DriftTest
from service.inspections import Inspections, Record
from service.metrics import Metrics
from service.store import Graph
from service.watch import Watch

START = datetime(2026, 11, 26, 12, tzinfo=UTC)
GRAPH = Graph("part", 1, "a" * 64)


@dataclass(eq=False)
class FakeModel:
    """As much of a loaded model as is watched."""

    graph: Graph
    own: Calibration | None
    calibrations: dict[str, Calibration]

    @property
    def name(self) -> str:
        return self.graph.model

    @property
    def bundle(self) -> SimpleNamespace:
        return SimpleNamespace(version=self.graph.version, digest=self.graph.digest)

    @property
    def calibration(self) -> Calibration | None:
        return self.calibrations.get("") or self.own


class Line:
    """Inspections that are recorded one second after another, and those who watch them."""

    def __init__(self, database: Database) -> None:
        self.table, self.alarms = Inspections(database), Alarms(database)
        self.model = FakeModel(GRAPH, normal_calibration("bundle"), {})
        self.models = [self.model]
        self.metrics = Metrics()
        self.count = 0
        self.rng = np.random.default_rng(0)

    def watch(self, run_length: float = 10_000.0) -> Watch:
        registry = SimpleNamespace(loaded=lambda: self.models, serves=lambda model: True)
        return Watch(registry, self.table, self.alarms, self.metrics, run_length)  # type: ignore[arg-type]

    @property
    def now(self) -> datetime:
        return START + timedelta(seconds=self.count) + watching.LAG

    def catch_up(self, watch: Watch) -> None:
        watch.catch_up(now=self.now)

    def record(self, scores: np.ndarray, **values: object) -> None:
        records = []
        for score in scores:
            at = START + timedelta(seconds=self.count)
            id = f"ins_{round(at.timestamp() * 1000):012x}{self.count:016x}"
            records.append(record(id, at, float(score), **values))
            self.count += 1
        self.table.add(records)

    def normals(self, count: int, factor: float = 1.0) -> np.ndarray:
        """Scores that the calibrations below decide normal."""
        drawn = self.rng.normal(0.3, 0.02, 2 * count)
        return np.asarray(factor * drawn[drawn < 0.34][:count])


def record(id: str, at: datetime, score: float, **values: object) -> Record:
    told: dict[str, object] = {
        "id": id,
        "at": at,
        "request_id": "r",
        "by": "anonymous",
        "model": "part",
        "version": 1,
        "digest": "a" * 64,
        "calibration": "bundle",
        "profile": "",
        "sha256": "f" * 64,
        "bytes": 1,
        "width": 1,
        "height": 1,
        "score": score,
        "threshold": 0.4,
        "threshold_source": "bundle",
        "p_value": 0.5,
        "decision": "normal",
        **dict.fromkeys(("decode_ms", "queue_ms", "infer_ms", "render_ms", "total_ms"), 1.0),
        "archived": False,
    }
    return Record(**told | values)  # type: ignore[arg-type]


def normal_calibration(id: str, seed: int = 1, profile: str = "") -> Calibration:
    scores = np.random.default_rng(seed).normal(0.3, 0.02, 300)
    return Calibration(id, 0.01, scores, profile=profile)


@pytest.fixture
def line(database: Database, monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr(watching, "_PAUSE_S", 0.0)
    monkeypatch.setattr(watching, "_PAGE", 50)
    return Line(database)


def test_it_is_the_test_of_what_was_recorded_in_its_order(line: Line) -> None:
    scores = line.normals(330)
    watch = line.watch()
    for start in (0, 7, 200):  # caught up in several pieces
        line.record(scores[start : {0: 7, 7: 200, 200: 330}[start]])
        line.catch_up(watch)

    report = watch.look(line.model, "")

    expected = DriftTest(normal_calibration("bundle"), f"{'a' * 64}//bundle/None", 10_000.0)
    for score in scores:
        expected.update(float(score))
    assert report is not None and report.alarm is None
    assert (report.images, report.statistic) == (expected.images, expected.statistic)
    assert report.histogram == expected.histogram() and report.distance == expected.distance
    assert sum(report.histogram) == 200


@pytest.mark.parametrize(
    "values",
    [
        {"decision": "anomalous"},
        {"threshold_source": "request"},
        {"calibration": "cal_before"},
        {"calibration": None},
        {"version": 2},
        {"digest": "b" * 64},
        {"model": "gear"},
    ],
)
def test_what_the_calibration_in_force_did_not_decide_normal_does_not_enter(
    line: Line, values: dict[str, object]
) -> None:
    watch = line.watch()
    line.record(line.normals(20, 0.5), **values)
    line.record(line.normals(10))

    line.catch_up(watch)

    report = watch.look(line.model, "")
    assert report is not None and report.images == 10


def test_a_change_raises_an_alarm_that_is_kept_and_shown(line: Line, caplog) -> None:
    watch = line.watch()
    line.record(line.normals(100))
    line.catch_up(watch)
    line.record(line.normals(200, 0.9))

    line.catch_up(watch)

    report = watch.look(line.model, "")
    assert report is not None and report.alarm is not None
    assert 100 < report.alarm.images <= 200
    assert "no longer score as those of bundle did" in caplog.text
    sample = line.metrics.registry.get_sample_value
    labels = {"model": "part", "profile": ""}
    assert sample("skrd4ad_drift_alarm", labels) == 1
    assert sample("skrd4ad_drift_images", labels) == report.images
    (event,) = line.alarms.history(GRAPH)
    assert (event.kind, event.by, event.calibration) == ("alarm", "", "bundle")


def test_an_alarm_outlives_restarts_and_what_was_recorded(line: Line) -> None:
    first = line.watch()
    line.record(line.normals(100))
    line.record(line.normals(200, 0.9))
    line.catch_up(first)
    line.table.remove_before("ins_f", 1000)

    again = line.watch()
    line.record(line.normals(10))
    line.catch_up(again)

    report = again.look(line.model, "")
    assert report is not None and report.alarm is not None and report.images == 10
    assert len(line.alarms.history(GRAPH)) == 1  # not raised anew


def test_another_service_shows_the_same_alarm_and_reset(line: Line) -> None:
    one, other = line.watch(), line.watch(run_length=1e9)  # which would never find it by itself
    line.record(line.normals(100))
    line.record(line.normals(200, 0.9))
    line.catch_up(one)
    line.catch_up(other)
    seen = other.look(line.model, "")
    assert seen is not None and seen.alarm is not None

    other.reset(line.model, "", by="somebody")
    line.catch_up(one)

    for watch in (one, other):
        report = watch.look(line.model, "")
        assert report is not None and report.alarm is None and report.since is not None
    assert [(e.kind, e.by) for e in line.alarms.history(GRAPH)] == [
        ("reset", "somebody"),
        ("alarm", ""),
    ]


def test_after_a_reset_a_new_test_begins_with_what_is_inspected_then(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = line.watch()
    line.record(line.normals(100))
    line.record(line.normals(200, 0.9))
    line.catch_up(watch)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return line.now - watching.LAG

    monkeypatch.setattr("service.alarms.datetime", Clock)
    report = watch.reset(line.model, "", by="somebody")
    assert report is not None and (report.images, report.alarm) == (0, None)
    line.record(line.normals(100))
    line.catch_up(watch)
    again = line.watch()
    line.catch_up(again)

    for one in (watch, again):
        report = one.look(line.model, "")
        assert report is not None and (report.images, report.alarm) == (100, None)


def test_a_new_calibration_begins_a_new_test(line: Line) -> None:
    watch = line.watch()
    line.record(line.normals(100))
    line.record(line.normals(200, 0.9))
    line.catch_up(watch)

    line.model.calibrations = {"": normal_calibration("cal_2", 2)}
    line.catch_up(watch)
    line.record(line.normals(30), calibration="cal_2")
    line.record(line.normals(5))  # decided before it was in force, recorded after
    line.catch_up(watch)

    report = watch.look(line.model, "")
    assert report is not None and report.calibration.id == "cal_2"
    assert (report.images, report.alarm) == (30, None)


def test_a_profile_with_a_calibration_has_a_test_of_its_own(line: Line) -> None:
    left, right = (normal_calibration(f"cal_{side}", 3, side) for side in ("left", "right"))
    line.model.calibrations = {"left": left, "right": right}
    watch = line.watch()
    line.record(line.normals(100), profile="left", calibration="cal_left")
    line.record(line.normals(100), profile="right", calibration="cal_right")
    line.record(line.normals(100, 0.9), profile="right", calibration="cal_right")

    line.catch_up(watch)

    reports = {profile: watch.look(line.model, profile) for profile in ("", "left", "right")}
    alarmed = {profile: report.alarm is not None for profile, report in reports.items() if report}
    assert alarmed == {"": False, "left": False, "right": True}
    images = {profile: report.images for profile, report in reports.items() if report}
    assert images == {"": 0, "left": 100, "right": images["right"]}
    told = line.metrics.registry.get_sample_value
    assert told("skrd4ad_drift_alarm", {"model": "part", "profile": "right"}) == 1
    assert told("skrd4ad_drift_alarm", {"model": "part", "profile": "left"}) == 0

    line.models = []
    line.catch_up(watch)
    assert told("skrd4ad_drift_alarm", {"model": "part", "profile": "right"}) is None


def test_profiles_without_one_are_tested_together_as_they_were_calibrated(line: Line) -> None:
    """Three stations, each half a standard deviation from the next, in turns."""
    mixed = np.random.default_rng(5)
    stations = (0.29, 0.3, 0.31)
    scores = np.concatenate([mixed.normal(mean, 0.02, 100) for mean in stations])
    line.model.own = Calibration("bundle", 0.01, scores)
    watch = line.watch()
    for _ in range(200):
        for number, mean in enumerate(stations):
            drawn = mixed.normal(mean, 0.02, 20)
            line.record(drawn[drawn < 0.33][:1], profile=f"station-{number}")

    line.catch_up(watch)

    reports = [watch.look(line.model, f"station-{number}") for number in range(3)]
    assert all(report is not None and report.alarm is None for report in reports)
    assert {report.images for report in reports if report} == {600}


def test_an_alarm_of_a_test_that_was_reset_meanwhile_is_not_raised(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another service is a moment behind: it read what is in force before the reset."""
    one, other = line.watch(), line.watch()
    line.record(line.normals(100))
    line.catch_up(one)
    line.catch_up(other)
    line.record(line.normals(200, 0.9))
    line.catch_up(one)
    one.reset(line.model, "", by="somebody")

    monkeypatch.setattr(other, "_follow", lambda model: None)
    line.catch_up(other)

    assert [event.kind for event in line.alarms.history(GRAPH)] == ["reset", "alarm"]
    report = other.look(line.model, "")
    assert report is not None and report.alarm is None


def test_what_does_not_enter_is_not_looked_through_again(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = line.watch()
    line.record(line.normals(3))
    line.record(line.normals(500), version=2)
    line.catch_up(watch)
    asked: list[str | None] = []
    oldest = line.table.oldest

    def remember(*arguments, after: str | None, **more):
        asked.append(after)
        return oldest(*arguments, after=after, **more)

    monkeypatch.setattr(line.table, "oldest", remember)
    line.catch_up(watch)

    newest = line.table.newest(watching.Filter(), 1)[0].record.id
    assert asked[0] is not None and asked[0] > newest


def test_a_model_without_a_calibration_is_not_tested(line: Line) -> None:
    line.model.own = None
    watch = line.watch()
    line.record(line.normals(10), calibration=None)

    line.catch_up(watch)

    assert watch.look(line.model, "") is None
    assert watch.reset(line.model, "", by="somebody") is None


def test_what_others_may_still_record_is_left_for_later(line: Line) -> None:
    watch = line.watch()
    line.record(line.normals(20))

    watch.catch_up(now=line.now - timedelta(seconds=5))

    report = watch.look(line.model, "")
    assert report is not None and report.images == 15
    line.catch_up(watch)
    report = watch.look(line.model, "")
    assert report is not None and report.images == 20


def test_a_service_that_starts_looks_back_at_no_more_than_it_can(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REPLAYED", 101)
    line.record(line.normals(300))
    watch = line.watch()

    line.catch_up(watch)

    report = watch.look(line.model, "")
    assert report is not None and report.images == 100
