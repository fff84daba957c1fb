"""Image sets decoded once into memory, where they fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from eat_dist.data.images import LabelledImages
from eat_dist.data.parallel import usable_cpus, workers
from eat_dist.data.shards import ShardImages

_CGROUPS = Path("/sys/fs/cgroup")


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
    """Whether that many bytes are at most half of the memory that is available to this process now."""
    return bytes_needed <= min(_of_machine(), *_of_cgroups()) // 2


def _of_machine() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # not Linux: how much is free is unknown


def _of_cgroups() -> list[int]:
    """What the limits of this process's control groups (version 1 or 2) and of those around them leave."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        limit_name, usage_name, cache_name = names if controllers else ("max", "current", "inactive_file")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit = int((folder / f"memory.{limit_name}").read_text())
                usage = int((folder / f"memory.{usage_name}").read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file, or no limit ("max")
                continue
            left.append(max(limit - usage + int(statistics.get(cache_name, 0)), 0))  # cached files make room
    return left
