"""Inspections that are too old, or too many, are removed: the oldest first, in slices, so that who
writes never waits long. Several services on one database may all do it."""

import logging
import threading
from datetime import UTC, datetime, timedelta

from service.errors import DatabaseAway
from service.inspections import Inspections, first_id

log = logging.getLogger(__name__)

INTERVAL_S = 600.0  # to find out how many there are takes a second for ten millions
CLOSE_S = 1.0
_SLICE = 1000  # rows of a transaction: about 0.1 s
_PAUSE_S = 0.2  # between two, in which whoever waits for SQLite's lock gets it


class Retention:
    """Limits of age and count on one thread; 0 is none."""

    def __init__(self, inspections: Inspections, max_age_days: float, max_count: int) -> None:
        self._inspections = inspections
        self._max_age_days, self._max_count = max_age_days, max_count
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """What is being removed just now is removed; the rest another time."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    def apply(self) -> int:
        """Removes what is beyond the limits, and tells how many; raises DatabaseAway."""
        end, removed, part = self._end(), 0, _SLICE
        while end and part == _SLICE and not self._closing.wait(_PAUSE_S if removed else 0):
            part = self._inspections.remove_before(end, _SLICE)
            removed += part
        return removed

    def _end(self) -> str | None:
        """The id before which all are removed."""
        ends = []
        if self._max_age_days:
            ends.append(first_id(datetime.now(UTC) - timedelta(days=self._max_age_days)))
        if self._max_count and (oldest := self._inspections.oldest_of(self._max_count)):
            ends.append(oldest)
        return max(ends, default=None)

    def _run(self) -> None:
        while True:
            try:
                if removed := self.apply():
                    log.info("removed %d inspections beyond the limits", removed)
            except DatabaseAway as error:
                log.warning("inspections beyond the limits stay for now: %s", error)
            except Exception:
                log.exception("inspections beyond the limits could not be removed; trying again")
            if self._closing.wait(INTERVAL_S):
                return
