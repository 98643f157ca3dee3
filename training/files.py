"""Files that are written whole or not at all, and one process at a time."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import TrainingError


def replace(path: Path, content: bytes) -> None:
    """Write a file, also across a power cut; raises OSError, and leaves what was there."""
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, flag: str) -> None:
    """As `replace`; raises TrainingError that names the flag. What is no UTF-8 is spelled out."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise TrainingError(f"{flag} {path}: can't be written: {error.strerror}") from error


def write_json(path: Path, record: Any, flag: str) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(record, indent=2) + "\n", flag)


def check_writable(path: Path, flag: str) -> None:
    """Before the work whose result goes there; raises TrainingError. What is there stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise TrainingError(f"{flag} {path}: is a folder; name a file")
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise TrainingError(f"{flag} {path}: can't be written: {error.strerror}") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """False where another process has claimed this file or folder; a kill gives it free."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)
