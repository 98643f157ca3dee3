"""How many cores this process may keep busy: more threads than that stand in each other's way."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available() -> int:
    """Cores of the affinity mask (taskset, cpusets), or the CPU quota of a container where that is
    less, rounded up; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, quota())))


def quota(own_cgroups: Path = OWN_CGROUPS, cgroups: Path = CGROUPS) -> float:
    """Cores' worth of time that Linux's control groups grant: the least of this process's own
    group and those above it; infinite without a limit, or without control groups."""
    try:
        lines = own_cgroups.read_text().splitlines()
    except OSError:
        return math.inf
    least = math.inf
    for line in lines:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroups
        elif "cpu" in controllers.split(","):
            root = cgroups / "cpu"
        else:
            continue
        group = root / path.lstrip("/")
        # A container sees its own group as the root, whatever path the host has for it.
        for folder in (group, *group.parents):
            least = min(least, _granted(folder))
            if folder == root:
                break
    return least


def _granted(group: Path) -> float:
    """Version 2 has "quota period" in one file, or "max"; version 1 a file for each, or -1."""
    try:
        if (file := group / "cpu.max").exists():
            granted, period = file.read_text().split()
        else:
            granted = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(granted) / int(period) if int(granted) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file, "max", or not what we know
        return math.inf
