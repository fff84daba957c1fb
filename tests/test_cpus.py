"""A process takes the CPUs that it may use, not those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from eat_dist.config import override
from eat_dist.cpus import usable_cpus
from small_runs import small_config, train_locally

V2 = "0::/kubepods/pod1/container\n"
V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"


def usable(folder: Path, membership: str, files: dict[str, str]) -> int:
    for name, content in files.items():
        (folder / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / name).write_text(content)
    (folder / "membership").write_text(membership)
    return usable_cpus(folder / "cgroup", folder / "membership")


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        (V2, {"kubepods/pod1/container/cpu.max": "100000 100000\n"}),
        (V2, {"kubepods/pod1/container/cpu.max": "max 100000\n", "kubepods/pod1/cpu.max": "150000 100000\n"}),
        ("0::/\n", {"cpu.max": "20000 100000\n"}),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "100000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}),
        (V1, {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "5000\n", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "5000"}),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}),
    ],
    ids=["v2", "v2, the parent's", "v2, a namespace", "v1", "v1, both controllers", "v1, a container's mount"],
)
def test_a_control_groups_limit_counts_in_whole_cpus(membership: str, files: dict[str, str], tmp_path: Path) -> None:
    assert usable(tmp_path, membership, files) == 1


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        (V2, {"kubepods/pod1/container/cpu.max": "max 100000\n"}),
        (V2, {"kubepods/pod1/container/cpu.max": "99999999 100000\n"}),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}),
        (V1, {"memory/docker/abc/cpu.max": "100000 100000\n"}),
        (V2, {"kubepods/pod1/container/cpu.max": "not a number\n"}),
        ("what is this\n", {}),
        (V2, {}),
    ],
    ids=["v2, none", "v2, above", "v1, none", "of another controller", "unreadable", "no membership", "no files"],
)
def test_without_a_lower_limit_all_cpus_that_the_process_is_bound_to_count(
    membership: str, files: dict[str, str], tmp_path: Path
) -> None:
    assert usable(tmp_path, membership, files) == len(os.sched_getaffinity(0))


def test_cpus_that_the_process_is_not_bound_to_do_not_count(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable(tmp_path, V2, {}) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_members_in_one_process_share_the_cpus_that_it_may_use(tmp_path: Path) -> None:
    """On a node of which a job has a part, more threads would wait for each other by spinning."""
    config = override(small_config(), "ensemble.members=1", "defense.name=natural", "cluster.threads_per_member=null")
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(before)})
    try:
        train_locally(config, tmp_path)
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
