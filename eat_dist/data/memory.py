"""Image sets decoded once into memory, and whether they fit there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from eat_dist.cpus import usable_cpus
from eat_dist.data.images import LabelledImages
from eat_dist.data.parallel import workers
from eat_dist.data.shards import ShardImages

_CACHED = ("active_file", "inactive_file")


def in_memory(images: ShardImages, *, threads: int | None = None) -> LabelledImages:
    """Decode a set once, as a model sees it at inference: [N, C, H, W] bytes, with the digest of the set itself.

    Args:
        images: Images in shards.
        threads: That decode; default: one a CPU.

    Raises:
        DataError: An image is damaged.
    """
    with workers(threads or usable_cpus()) as pool:
        pixels = images.decoded(torch.arange(len(images)), pool)
    return LabelledImages(
        pixels, images.labels, images.class_names, images.names, images.is_query, known_digest=images.digest()
    )


def fits_in_memory(bytes_needed: int) -> bool:
    """Whether that many bytes are at most half of what is available now."""
    return bytes_needed <= available_memory() // 2


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still take: of the machine, and within the limits of its control groups.

    Args:
        proc: Where Linux tells of processes.
        cgroups: Where it tells of control groups, version 1 or 2.
    """
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        of_machine = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):  # not Linux: how much of the memory is free is unknown
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([of_machine, *_within_limits(proc, cgroups)])


def _within_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each limit leaves, of the process's own group and of those that it is within."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        root = cgroups / controllers
        limit_name, usage_name = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        own = root / path.lstrip("/")
        for group in (own, *own.parents[: len(own.parts) - len(root.parts)]):
            try:
                limit, usage = (int((group / f"memory.{name}").read_text()) for name in (limit_name, usage_name))
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not told, or no limit ("max")
                continue
            # Cached files make room. Version 1 counts those of the groups within under total_….
            cached = (statistics.get(f"total_{name}", statistics.get(name, 0)) for name in _CACHED)
            yield max(limit - usage + sum(map(int, cached)), 0)
