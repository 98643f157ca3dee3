"""Watches whether each model's images still score as its calibration's: recorded inspections, in
the order that they were made -> `drift` -> gauges, and alarms that all services share.

What was recorded is read, not what passes by: services that share a database see all images, and
one that starts anew goes on where it was.
"""

import asyncio
import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from service.alarms import Alarms, DriftEvent
from service.calibration import Calibration
from service.completion import pause
from service.drift import RUN_LENGTH, DriftTest
from service.errors import DatabaseAway
from service.inspections import Filter, Inspections, Record, first_id
from service.metrics import Metrics
from service.model import Model
from service.registry import Registry
from service.store import Graph

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
LAG = timedelta(seconds=5)  # by then other services have recorded what they inspected
REPLAYED = 20_000  # images of a model at most that a service looks back at when it starts
_PAGE = 500  # rows
_PAUSE_S = 0.02  # after each page, so that inspections get their turn


@dataclass(frozen=True)
class Report:
    """A test as it stands."""

    calibration: Calibration
    since: datetime | None  # it was reset; None: since the calibration took effect
    images: int
    statistic: float
    run_length: float
    alarm: DriftEvent | None
    distance: float | None
    histogram: list[int]  # of the recent p-values


@dataclass
class _Watched:
    """A profile's test under the calibration in force for it."""

    calibration: Calibration
    test: DriftTest
    since: datetime | None
    alarm: DriftEvent | None = None

    def report(self) -> Report:
        test = self.test
        return Report(
            self.calibration,
            self.since,
            test.images,
            test.statistic,
            test.run_length,
            self.alarm,
            test.distance,
            test.histogram(),
        )


@dataclass
class _Reading:
    """How far the inspections of a graph were read, and the tests by profile."""

    after: str | None
    watched: dict[str, _Watched]


class Watch:
    """Tests every loaded model. `catch_up` is for one thread, the rest for any."""

    def __init__(
        self,
        registry: Registry,
        inspections: Inspections,
        alarms: Alarms,
        metrics: Metrics,
        run_length: float = RUN_LENGTH,
    ) -> None:
        self._registry, self._inspections, self._alarms = registry, inspections, alarms
        self._metrics, self._run_length = metrics, run_length
        self._readings: dict[Graph, _Reading] = {}
        self._published: set[tuple[str, str]] = set()
        self._trouble = False
        self._lock = threading.Lock()  # of the readings

    async def run(self, stop: asyncio.Event) -> None:
        """Catch up again and again until `stop`; not cancelled, as `Registry.follow` is not."""
        while not stop.is_set():
            try:
                await asyncio.to_thread(self.catch_up, stop)
                self._trouble = False
            except Exception as error:
                self._tell(error)
            await pause(stop, INTERVAL_S)

    def catch_up(self, stop: asyncio.Event | None = None, now: datetime | None = None) -> None:
        """Test what was recorded since the last time; raises DatabaseAway."""
        end = first_id((now or datetime.now(UTC)) - LAG)
        loaded = {model.graph: model for model in self._registry.loaded()}
        with self._lock:
            self._readings = {g: r for g, r in self._readings.items() if g in loaded}
        for model in loaded.values():
            self._follow(model)
            while not (stop and stop.is_set()) and self._read_page(model, end):
                time.sleep(_PAUSE_S)
        self._publish(list(loaded.values()))

    def look(self, model: Model, profile: str) -> Report | None:
        """The test of a profile, or the model's, for one without a calibration of its own; None
        where there is no calibration, or it was not caught up yet."""
        with self._lock:
            reading = self._readings.get(model.graph)
            watched = reading.watched.get(_tested_as(model, profile)) if reading else None
            return watched.report() if watched else None

    def reset(self, model: Model, profile: str, *, by: str) -> Report | None:
        """Begin a new test, as the cause of an alarm was mended, say; None as for `look`.

        Other services follow when they catch up. Raises DatabaseAway.
        """
        before, profile = self.look(model, profile), _tested_as(model, profile)
        if before is None:
            return None
        event = self._alarms.reset(
            model.graph,
            profile,
            before.calibration.id,
            images=before.images,
            statistic=before.statistic,
            by=by,
        )
        with self._lock:
            watched = _begin(model.graph, profile, before.calibration, event, self._run_length)
            self._readings[model.graph].watched[profile] = watched
            return watched.report()

    def _follow(self, model: Model) -> None:
        """Take up the calibrations in force, and alarms and resets of other services."""
        events = self._alarms.last(model.graph)
        reading = self._readings.get(model.graph) or self._start(model)
        with self._lock:
            self._readings[model.graph] = reading
            in_force = {"": model.calibration, **model.calibrations}
            reading.watched = {p: w for p, w in reading.watched.items() if p in in_force}
            for profile, calibration in in_force.items():
                if calibration is None:
                    continue
                event = events.get((profile, calibration.id))
                watched = reading.watched.get(profile)
                if watched is None or _is_over(watched, calibration, event):
                    watched = _begin(model.graph, profile, calibration, event, self._run_length)
                    reading.watched[profile] = watched
                if event and event.kind == "alarm":
                    watched.alarm = watched.alarm or event

    def _start(self, model: Model) -> _Reading:
        return _Reading(self._inspections.oldest_of(REPLAYED, _normal(model)), {})

    def _read_page(self, model: Model, end: str) -> bool:
        """Whether there may be more."""
        reading = self._readings[model.graph]
        found = self._inspections.oldest(_normal(model), _PAGE, after=reading.after, before=end)
        alarmed: dict[str, Report] = {}
        with self._lock:
            for record in (each.record for each in found):
                reading.after = record.id
                watched = self._watched(model, reading, record)
                if watched is None:
                    continue
                watched.test.update(record.score)
                if watched.test.alarm and watched.alarm is None:
                    alarmed.setdefault(record.profile, watched.report())
        for profile, report in alarmed.items():
            self._raise_alarm(model, profile, report)
        if len(found) == _PAGE:
            return True
        reading.after = end  # past what doesn't enter, which isn't looked through again
        return False

    def _watched(self, model: Model, reading: _Reading, record: Record) -> _Watched | None:
        """Whose test an image enters: the calibration in force decided it, for its profile or, as
        one of all those without their own, for the model."""
        watched = reading.watched.get(_tested_as(model, record.profile))
        if (
            watched is None
            or record.calibration != watched.calibration.id
            or record.digest != model.bundle.digest
            or record.threshold_source == "request"
            or (watched.since is not None and record.at < watched.since)
        ):
            return None
        return watched

    def _raise_alarm(self, model: Model, profile: str, report: Report) -> None:
        event = self._alarms.raise_alarm(
            model.graph,
            profile,
            report.calibration.id,
            since=report.since,
            images=report.images,
            statistic=report.statistic,
        )
        if event is None:
            return  # somebody has reset the test meanwhile: it begins anew
        log.warning(
            "%s version %d%s: images decided normal no longer score as those of %s did, after %d "
            "images",
            model.name,
            model.bundle.version,
            f", profile {profile}" if profile else "",
            report.calibration.id,
            report.images,
        )
        with self._lock:
            if watched := self._readings[model.graph].watched.get(profile):
                watched.alarm = event

    def _tell(self, error: Exception) -> None:
        """Once, until it was well again; in full where it is no database's fault."""
        if not self._trouble:
            known = isinstance(error, DatabaseAway)
            log.error("drift is not tested for now: %s", error, exc_info=None if known else error)
        self._trouble = True

    def _publish(self, models: list[Model]) -> None:
        """Gauges of the versions that serve where a request names none."""
        metrics = self._metrics
        gauges = (metrics.drift_alarm, metrics.drift_statistic, metrics.drift_images)
        published = set()
        for model in models:
            if not self._registry.serves(model):
                continue
            for profile in list(self._readings[model.graph].watched):
                report = self.look(model, profile)
                if report is None:
                    continue
                labels = (model.name, profile)
                values = (report.alarm is not None, report.statistic, report.images)
                for gauge, value in zip(gauges, values, strict=True):
                    gauge.labels(*labels).set(value)
                published.add(labels)
        for labels in self._published - published:
            for gauge in gauges:
                gauge.remove(*labels)
        self._published = published


def _tested_as(model: Model, profile: str) -> str:
    """Profiles without a calibration of their own are tested together, as the model's calibration
    took its samples: each of them alone may differ from all of them together, unchanged."""
    return profile if profile in model.calibrations else ""


def _normal(model: Model) -> Filter:
    return Filter(model=model.name, version=model.bundle.version, decision="normal")


def _is_over(watched: _Watched, calibration: Calibration, event: DriftEvent | None) -> bool:
    """Another calibration is in force, or somebody reset the test."""
    if watched.calibration.id != calibration.id:
        return True
    return event is not None and event.kind == "reset" and event.at != watched.since


def _begin(
    graph: Graph,
    profile: str,
    calibration: Calibration,
    event: DriftEvent | None,
    run_length: float,
) -> _Watched:
    since = event.at if event and event.kind == "reset" else None
    seed = f"{graph.digest}/{profile}/{calibration.id}/{since}"
    alarm = event if event and event.kind == "alarm" else None
    return _Watched(calibration, DriftTest(calibration, seed, run_length), since, alarm)
