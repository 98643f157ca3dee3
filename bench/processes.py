"""Time and memory of a process and all its descendants, from Linux's /proc."""

import os
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(pid: int) -> list[int]:
    """The process and its descendants; those that have gone meanwhile are left out."""
    found = [pid]
    for parent in found:
        for listed in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in _read(listed).split()]
    return found


def cpu_s(pid: int) -> float:
    """Processor time that the tree has used, with children that ended and were waited for."""
    return sum(sum(map(int, _stat(each)[11:15])) for each in tree(pid)) * TICK_S


def resident_mb(pid: int) -> float:
    """Resident memory of the tree in MB; pages that its processes share count for each."""
    pages = (_read(Path(f"/proc/{each}/statm")).split() for each in tree(pid))
    return sum(int(fields[1]) for fields in pages if fields) * PAGE / 1e6


def reset_peak_mb(pid: int) -> float:
    """Resident memory of the process alone in MB, from which its peak is counted anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_mb(pid)


def peak_mb(pid: int) -> float:
    """The most resident memory in MB that the process had since its start or `reset_peak_mb`."""
    lines = _read(Path(f"/proc/{pid}/status")).splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name, which may hold blanks itself."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields or ["0"] * 15


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
