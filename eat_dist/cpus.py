"""How many CPUs this process may use, which on a shared machine, or in a container, are not those that it has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """The CPUs that this process is bound to, as many as its control groups give it time for; at least 1.

    Args:
        groups: Where Linux shows control groups.
        membership: The file that says which of them this process is in.
    """
    bound_to = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound_to, *_quotas(groups, membership)])))


def _quotas(groups: Path, membership: Path) -> Iterator[float]:
    """CPUs' worth of time, of each control group that has a limit; a container's limit is often that of a parent."""
    with suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            names = controllers.split(",")
            if controllers and "cpu" not in names:
                continue
            inner = PurePosixPath(path.lstrip("/"))
            for group in (inner, *inner.parents):
                if not controllers:  # version 2
                    yield _v2(groups / group)
                else:
                    yield min(_v1(groups / name / group) for name in ("cpu", controllers))


def _v2(group: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    return math.inf


def _v1(group: Path) -> float:
    with suppress(OSError, ValueError):
        quota = int((group / "cpu.cfs_quota_us").read_text())
        return math.inf if quota < 0 else quota / int((group / "cpu.cfs_period_us").read_text())
    return math.inf
