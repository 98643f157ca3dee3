"""Every inspection is recorded, off the request path: a bounded buffer, and one thread that writes
it in batches.

    inspection ──► buffer ──► batch, every half second ──► database
    event loop     deque      writer thread                one transaction

Where the database is slow or away the buffer fills. Beyond its bound the oldest are dropped and
counted: what was inspected last is what somebody with the part in hand asks about.
"""

import logging
import threading
import time
from collections import deque
from contextlib import suppress

import sqlalchemy as sa

from service.errors import DatabaseAway
from service.image_archive import ImageArchive, Taken
from service.inspections import Inspections, Record, moment
from service.metrics import Metrics
from service.schemas import Inspection

log = logging.getLogger(__name__)

WRITE_INTERVAL_S = 0.5  # with the time of a write, less than the second that a crash may lose
FLUSH_S = 5.0  # for the last batches when the service stops
_FLUSH_WAIT_S = 1.0  # of somebody who asks for what was inspected just now
_RETRY_S = 0.1  # when the service stops while the database is away
_BATCH = 1000  # rows of a transaction: tens of milliseconds in which other writers wait

_Item = tuple[Record, Taken | None]


class Trace:
    """Records inspections; `record` is called on the event loop, the rest on any thread."""

    def __init__(
        self,
        inspections: Inspections,
        archive: ImageArchive,
        metrics: Metrics,
        max_pending: int,
    ) -> None:
        self._inspections, self._archive, self._metrics = inspections, archive, metrics
        self._max_pending = max_pending
        self._pending: deque[_Item] = deque()
        self._writing = threading.Lock()  # of _parts
        self._parts: list[list[_Item]] = []  # of the batch that is being written
        self._closing = threading.Event()
        self._trouble = ""
        # It ends with the process where a database keeps it waiting for longer than `close` does.
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        metrics.trace_pending.set_function(lambda: self.pending)

    @property
    def pending(self) -> int:
        """Inspections that are not written yet."""
        return len(self._pending) + sum(len(part) for part in list(self._parts))

    def start(self) -> None:
        self._thread.start()

    def record(self, inspection: Inspection, data: bytes, by: str) -> None:
        """Takes note of an inspection of the encoded image `data`; never waits, never raises."""
        taken = self._archive.offer(data, inspection.image.sha256, inspection.decision)
        self._pending.append((_record(inspection, len(data), by, taken is not None), taken))
        if len(self._pending) > self._max_pending:
            with suppress(IndexError):  # the writer took the last
                self._pending.popleft()
                self._metrics.trace_dropped.labels("full").inc()

    def flush(self) -> None:
        """Writes what is pending now; raises DatabaseAway, and keeps what is not written.

        Leaves it to the writer where that has been at it for a second.
        """
        if self._writing.acquire(timeout=_FLUSH_WAIT_S):
            try:
                self._write_pending()
            finally:
                self._writing.release()

    def close(self) -> None:
        """Writes what is left, for as long as FLUSH_S, and tells what couldn't be."""
        self._closing.set()
        self._thread.join(FLUSH_S)
        if self.pending:
            log.error("%d inspections are not recorded: %s", self.pending, self._trouble or "slow")

    def _run(self) -> None:
        while not self._closing.wait(WRITE_INTERVAL_S):
            self._try_to_write()
        deadline = time.monotonic() + FLUSH_S
        while not self._try_to_write() and time.monotonic() < deadline:
            time.sleep(_RETRY_S)

    def _try_to_write(self) -> bool:
        """Whether all was written. This thread goes on whatever happens, and tells it once."""
        try:
            with self._writing:
                self._write_pending()
        except DatabaseAway as error:
            self._tell(str(error))
        except Exception as error:  # a right that is missing, a server that only reads, a bug
            self._tell(f"{type(error).__name__}: {error}", error)
        else:
            self._tell("")
        return not self.pending

    def _tell(self, trouble: str, unexpected: Exception | None = None) -> None:
        if trouble and not self._trouble:
            told = "inspections can't be recorded, and are kept for now: %s"
            log.error(told, trouble, exc_info=unexpected)
        elif self._trouble and not trouble:
            log.info("inspections are recorded again")
        self._trouble = trouble

    def _write_pending(self) -> None:
        """What is pending now; what comes in meanwhile is left for the next time."""
        for _ in range(1 + len(self._pending) // _BATCH):
            while self._parts:
                self._write_part()
            self._parts = [self._take()]
        while self._parts:
            self._write_part()

    def _take(self) -> list[_Item]:
        batch: list[_Item] = []
        with suppress(IndexError):
            while len(batch) < _BATCH:
                batch.append(self._pending.popleft())
        return batch

    def _write_part(self) -> None:
        """Writes the last part, or halves it until the row at fault is alone and can be left out.

        What is raised is no row's fault, and every part stays.
        """
        part = self._parts[-1]
        try:
            if part:
                self._inspections.add([_with_archived(record, taken) for record, taken in part])
        except Exception as error:
            if not _is_a_rows_fault(error):
                raise
            self._parts.pop()
            if len(part) == 1:
                self._refuse(part[0][0], error)
            else:
                middle = len(part) // 2
                self._parts += [part[middle:], part[:middle]]
        else:
            self._parts.pop()
            self._metrics.trace_written.inc(len(part))

    def _refuse(self, record: Record, error: Exception) -> None:
        self._metrics.trace_dropped.labels("refused").inc()
        log.error("inspection %s can't be recorded: %s", record.id, str(error).splitlines()[0])


def _record(inspection: Inspection, size: int, by: str, archived: bool) -> Record:
    model, image, timing = inspection.model, inspection.image, inspection.timing_ms
    return Record(
        inspection.id,
        moment(inspection.id),
        inspection.request_id,
        by,
        model.name,
        model.version,
        model.digest,
        inspection.calibration.id if inspection.calibration else None,
        inspection.profile or "",
        image.sha256,
        size,
        image.width,
        image.height,
        inspection.score,
        inspection.threshold,
        inspection.threshold_source,
        inspection.p_value,
        inspection.decision,
        timing.decode,
        timing.queue,
        timing.infer,
        timing.render,
        timing.total,
        archived,
    )


def _with_archived(record: Record, taken: Taken | None) -> Record:
    """By now the archive mostly knows whether it could write the image."""
    return record._replace(archived=False) if taken and taken.failed else record


def _is_a_rows_fault(error: Exception) -> bool:
    """Whether the values are refused (a NUL in PostgreSQL's text, no number where one must be):
    trying again won't help, and the other rows can be written."""
    if isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, (sa.exc.DataError, sa.exc.IntegrityError))
    return isinstance(error, (sa.exc.StatementError, ValueError, TypeError, OverflowError))
