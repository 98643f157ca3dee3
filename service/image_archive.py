"""The images that are kept: of all inspections, of the anomalous ones, or of a share of them.

    <folder>/<first two letters of the SHA-256>/<SHA-256>.<jpg, png, ...>

One thread writes them, off the request path, and one removes the oldest beyond size and age, by
when an image was inspected last. The folder never grows beyond its size: sooner an image is left
out, and counted.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from re import compile

from service.calibration import Decision
from service.errors import ImageNotKept, SettingsError
from service.image import digest, read_header
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

CLOSE_S = 3.0  # for what is queued when the service stops
PENDING_BYTES = 256 * 2**20  # of images that wait to be written
_SWEEP_INTERVAL_S = 600.0  # for age, and for what other services wrote
_SWEEP_AT, _SWEEP_TO = 0.95, 0.9  # of the allowed bytes: each sweep looks at every file
_LEFTOVER_S = 3600.0  # nobody is still writing a file that long
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp"}
_MEDIA_TYPES = {suffix: f"image/{format.lower()}" for format, suffix in _SUFFIXES.items()}
_NAME = compile(r"[0-9a-f]{64}\.(jpg|png|bmp|tif|webp)")
_LEFTOVER = compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8}")


class Taken:
    """An image that was handed over."""

    __slots__ = ("failed",)

    def __init__(self) -> None:
        self.failed = False


@dataclass(frozen=True)
class _File:
    seen: float  # when its image was inspected last, in seconds of the epoch
    size: int
    path: str


_Item = tuple[bytes, str, Taken]


class ImageArchive:
    """A folder of images; `offer` is called on the event loop, `read` on any thread.

    Raises SettingsError where the folder can't be written to.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._kind, self._share = settings.archive, settings.archive_share
        self._folder, self._metrics = settings.archive_folder, metrics
        self._max_bytes = settings.archive_max_bytes
        self._max_age_s = settings.archive_max_age_days * 86400
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        # Each is changed by one thread alone, so that neither waits for a lock.
        self._offered_bytes = self._done_bytes = 0
        self._size = threading.Lock()  # of _bytes and _written_bytes
        self._bytes = self._written_bytes = 0
        self._swept, self._sweep_now, self._closing = (threading.Event() for _ in range(3))
        self._trouble = ""
        self._writer = threading.Thread(target=self._write_on, name="archive", daemon=True)
        self._sweeper = threading.Thread(target=self._sweep_on, name="sweep", daemon=True)
        metrics.archive_pending.set_function(lambda: self._offered_bytes - self._done_bytes)
        metrics.archive_bytes.set_function(lambda: self._bytes)
        if self._kind != "none":
            self._check_folder()

    def start(self) -> None:
        if self._kind != "none":
            self._sweeper.start()
            self._writer.start()

    def offer(self, data: bytes, sha256: str, decision: Decision) -> Taken | None:
        """Takes an encoded image that is to be kept; never waits.

        None where it isn't, or where too much waits already, which is counted.
        """
        if not self._wants(sha256, decision):
            return None
        pending = self._offered_bytes - self._done_bytes
        if pending and pending + len(data) > PENDING_BYTES:
            self._metrics.archive_dropped.labels("queue").inc()
            return None
        taken = Taken()
        self._offered_bytes += len(data)
        self._queue.put((data, sha256, taken))
        return taken

    def read(self, sha256: str) -> tuple[bytes, str]:
        """An image and its media type; raises ImageNotKept where it isn't there any more."""
        for suffix, media_type in _MEDIA_TYPES.items():
            try:
                data = self._path(sha256, suffix).read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ImageNotKept(f"image {sha256} can't be read: {error}") from error
            if digest(data) != sha256:  # files are not forced to the disk before a power cut
                raise ImageNotKept(f"image {sha256} is damaged")
            return data, media_type
        raise ImageNotKept(
            f"image {sha256} was archived, and is not in {self._folder} any more: what is beyond "
            f"{self._max_bytes} bytes or {self._max_age_s / 86400:g} days is removed"
        )

    def close(self) -> None:
        """Writes what is queued, for as long as CLOSE_S; the rest is told as not archived."""
        self._closing.set()
        self._sweep_now.set()
        if not self._writer.is_alive():
            return
        self._queue.put(None)
        self._writer.join(CLOSE_S)
        left = 0
        with suppress(Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    item[2].failed = True
                    left += 1
        if left:
            log.error("%d images are not archived: %s is slow", left, self._folder)

    def sweep(self) -> None:
        """Removes what is too old, and the oldest where the rest is too much."""
        with self._size:
            before = self._written_bytes
        files = sorted(self._files(), key=lambda file: file.seen)
        total = sum(file.size for file in files)
        too_old = time.time() - self._max_age_s if self._max_age_s else 0
        allowed = self._max_bytes
        if total > _SWEEP_AT * self._max_bytes:
            allowed = int(_SWEEP_TO * self._max_bytes)
        for file in files:
            if file.seen >= too_old and total <= allowed:
                break
            with suppress(FileNotFoundError):  # another service shares the folder
                os.unlink(file.path)
            total -= file.size
        with self._size:  # what was written meanwhile may count twice, until the next sweep
            self._bytes = total + self._written_bytes - before

    def _check_folder(self) -> None:
        probe = self._folder / f".{secrets.token_hex(4)}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise SettingsError(f"archive_folder {self._folder}: {error.strerror}") from error

    def _wants(self, sha256: str, decision: Decision) -> bool:
        if self._kind == "sampled":
            # By the image itself: all services and every inspection of it decide alike.
            return int(sha256[:8], 16) < self._share * 2**32
        return self._kind == "all" or (self._kind == "anomalous" and decision == "anomalous")

    def _write_on(self) -> None:
        self._swept.wait()  # so that it is known how much is there
        while (item := self._queue.get()) is not None:
            size = len(item[0])
            self._keep(*item)
            del item  # up to MAX_IMAGE_BYTES, which needn't stay until the next one comes
            self._done_bytes += size

    def _keep(self, data: bytes, sha256: str, taken: Taken) -> None:
        try:
            path = self._path(sha256, _SUFFIXES[read_header(data).format])
            if _touched(path):
                return
            if not self._has_room(len(data)):
                self._fail(taken, "full")
                return
            path.parent.mkdir(exist_ok=True)
            _write_whole(path, data)
        except Exception as error:  # a full disk, a folder that went away: the next may be kept
            self._fail(taken, "failed")
            self._tell(f"{self._folder}: {type(error).__name__}: {error}")
            return
        with self._size:
            self._bytes += len(data)
            self._written_bytes += len(data)
        self._metrics.archive_written.inc()
        self._tell("")

    def _has_room(self, size: int) -> bool:
        with self._size:
            after = self._bytes + size
        if after > _SWEEP_AT * self._max_bytes:
            self._sweep_now.set()
        return after <= self._max_bytes

    def _fail(self, taken: Taken, reason: str) -> None:
        taken.failed = True
        self._metrics.archive_dropped.labels(reason).inc()

    def _tell(self, trouble: str) -> None:
        if trouble and not self._trouble:
            log.error("images can't be archived: %s", trouble)
        elif self._trouble and not trouble:
            log.info("images are archived again")
        self._trouble = trouble

    def _sweep_on(self) -> None:
        while not self._closing.is_set():
            self._sweep_now.clear()
            try:
                self.sweep()
            except OSError as error:
                log.error("the archive can't be swept: %s", error)
            self._swept.set()
            self._sweep_now.wait(_SWEEP_INTERVAL_S)
        self._swept.set()

    def _files(self) -> Iterator[_File]:
        """Ours, whatever else is in the folder; leftovers of a crash are removed on the way."""
        for folder in self._folder.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if _NAME.fullmatch(entry.name):
                        yield _File(status.st_mtime, status.st_size, entry.path)
                    elif (
                        _LEFTOVER.fullmatch(entry.name)
                        and status.st_mtime < time.time() - _LEFTOVER_S
                    ):
                        os.unlink(entry.path)

    def _path(self, sha256: str, suffix: str) -> Path:
        return self._folder / sha256[:2] / f"{sha256}{suffix}"


def _touched(path: Path) -> bool:
    """Whether the file is there; then its image has been seen now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _write_whole(path: Path, data: bytes) -> None:
    draft = path.parent / f".{path.stem}.{secrets.token_hex(4)}"
    try:
        draft.write_bytes(data)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
