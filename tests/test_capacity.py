"""How many trials run at once: always so many that all of their members are placed, whatever the order."""

from __future__ import annotations

import random

import pytest
import torch

from eat_dist.cluster.capacity import capacity, capacity_of_runs, settled
from eat_dist.cluster.resources import Node, place
from eat_dist.config import ClusterConfig, load_config
from eat_dist.errors import ClusterError, ConfigError
from eat_dist.in_process import members_on

SHARED, WHOLE = ClusterConfig(), ClusterConfig(cpus_per_member=1.0)
TWO, EIGHT = [Node(2, 0)], [Node(4, 0), Node(4, 0)]
GPUS = [Node(0, 0), Node(16, 4), Node(16, 4)]


@pytest.mark.parametrize(
    ("nodes", "members", "config", "concurrent", "each"),
    [
        (TWO, 1, SHARED, 2, (1.0, 0.0)),
        (TWO, 2, SHARED, 1, (1.0, 0.0)),
        (TWO, 3, SHARED, 1, (0.66, 0.0)),  # one trial always runs, be it on shares
        ([Node(5, 0)], 2, SHARED, 2, (1.25, 0.0)),
        (EIGHT, 3, SHARED, 2, (1.33, 0.0)),  # 6 members on two nodes of 4: three each
        (EIGHT, 3, ClusterConfig(cpus_per_member=2.0), 1, (2.0, 0.0)),
        (EIGHT, 1, ClusterConfig(cpus_per_member=3.0), 2, (3.0, 0.0)),
        ([Node(0, 0), Node(64, 0)], 4, SHARED, 16, (1.0, 0.0)),
        (GPUS, 3, SHARED, 2, (0.0, 1.0)),
        (GPUS, 4, SHARED, 2, (0.0, 1.0)),
        (GPUS, 4, ClusterConfig(gpus_per_member=0.5), 4, (0.0, 0.5)),
        (GPUS, 4, ClusterConfig(gpus_per_member=0.4), 4, (0.0, 0.4)),  # 0.4 thrice does not fit one GPU
        (GPUS, 1, ClusterConfig(gpus_per_member=2.0), 4, (0.0, 2.0)),
        (GPUS, 2, ClusterConfig(cpus_per_member=8.0), 2, (8.0, 1.0)),  # the CPUs decide
        (GPUS, 2, ClusterConfig(device="cpu"), 16, (1.0, 0.0)),
    ],
)
def test_auto_takes_as_many_trials_as_fit(
    nodes: list[Node], members: int, config: ClusterConfig, concurrent: int, each: tuple[float, float]
) -> None:
    found = capacity(nodes, members=members, trials=1000, concurrent=None, config=config)

    assert found.concurrent == concurrent
    assert (found.member.cpus, found.member.gpus) == pytest.approx(each)


def test_no_more_trials_run_at_once_than_there_are() -> None:
    assert capacity(GPUS, members=1, trials=3, concurrent=None, config=SHARED).concurrent == 3
    assert capacity(GPUS, members=1, trials=3, concurrent=5, config=SHARED).concurrent == 3


@pytest.mark.parametrize("concurrent", [1, 2, 4, 8])
def test_members_that_share_the_cpus_get_the_share_of_all_trials_at_once(concurrent: int) -> None:
    found = capacity(EIGHT, members=2, trials=9, concurrent=concurrent, config=SHARED)

    assert (found.concurrent, found.member.cpus) == (concurrent, 8 / (2 * concurrent))
    assert found.member.threads == max(1, 4 // concurrent)


@pytest.mark.parametrize(
    ("nodes", "members", "concurrent", "config", "message"),
    [
        (GPUS, 4, 3, SHARED, r"12 members \(3 trials at once × 4\) need 1 GPU each; .* 8 GPUs .*room for 8. Lower --c"),
        (TWO, 1, 8, WHOLE, r"8 members \(8 trials at once × 1\) need 1 CPU each; .*room for 2. Lower --concurrent"),
        (TWO, 3, 8, SHARED, r"24 members \(8 trials at once × 3\) on 2 CPUs would get 0.08 each"),
        (TWO, 3, 1, WHOLE, r"3 members need 1 CPU each; .*Lower ensemble.members"),
        (GPUS, 9, None, SHARED, r"9 members need 1 GPU each; .*room for 8. Lower ensemble.members"),
        ([Node(0, 0)], 1, None, WHOLE, "room for 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(
    nodes: list[Node], members: int, concurrent: int | None, config: ClusterConfig, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        capacity(nodes, members=members, trials=100, concurrent=concurrent, config=config)


@pytest.mark.parametrize(("trials", "concurrent"), [(0, None), (-1, None), (3, 0)])
def test_no_trials_at_all_is_an_error(trials: int, concurrent: int | None) -> None:
    with pytest.raises(ConfigError, match="at least one trial"):
        capacity(TWO, members=1, trials=trials, concurrent=concurrent, config=SHARED)


def test_members_of_concurrent_trials_fit_in_whatever_order_they_come() -> None:
    """Members are placed one by one on a random node that has room, trials mixed: none is ever left over."""
    source = random.Random(0)
    for _ in range(300):
        nodes = [Node(source.randint(0, 16), source.choice([0, 0, 1, 4])) for _ in range(source.randint(1, 4))]
        config = ClusterConfig(
            cpus_per_member=source.choice([None, 0.5, 1.0, 3.0]), gpus_per_member=source.choice([0.25, 0.4, 1.0])
        )
        members = source.randint(1, 4)
        try:
            found = capacity(nodes, members=members, trials=20, concurrent=None, config=config)
        except ClusterError:
            continue
        cpus = [node.cpus for node in nodes]
        gpus = [[1.0] * int(node.gpus) for node in nodes]
        for placed in range(found.concurrent * members):
            able = [
                (node, gpu)
                for node in range(len(nodes))
                for gpu in (range(len(gpus[node])) if found.member.gpus else [-1])
                if cpus[node] >= found.member.cpus - 1e-6 and (gpu < 0 or gpus[node][gpu] >= found.member.gpus - 1e-6)
            ]
            assert able, f"member {placed} of {found} on {nodes} has no place"
            node, gpu = source.choice(able)
            cpus[node] -= found.member.cpus
            if gpu >= 0:
                gpus[node][gpu] -= found.member.gpus


def test_a_trial_takes_what_was_worked_out_for_all_of_them() -> None:
    found = capacity(TWO, members=1, trials=4, concurrent=4, config=SHARED)
    config = settled(SHARED, found.member)

    assert (config.cpus_per_member, config.threads_per_member) == (0.5, 1)
    on_gpus = capacity(GPUS, members=1, trials=4, concurrent=4, config=SHARED)
    assert settled(SHARED, on_gpus.member).cpus_per_member is None


@pytest.mark.parametrize("backend", ["ray", "local"])
@pytest.mark.parametrize(
    ("planned", "later", "device"),
    [
        (GPUS, [Node(16, 0)], "cuda"),  # its GPUs are gone for the moment
        ([Node(16, 0)], [Node(16, 0), Node(8, 1)], "cpu"),  # one GPU has joined, fewer than there are members
        ([Node(16, 0)], [Node(16, 0), Node(8, 8)], "cpu"),
    ],
)
def test_what_nodes_come_and_go_changes_the_device_of_no_trial(
    planned: list[Node], later: list[Node], device: str, backend: str
) -> None:
    config = load_config(None, [f"cluster.backend={backend}", "ensemble.members=2"])
    sections = [capacity_of_runs(planned, config, runs=4, concurrent=None).cluster]
    if backend == "ray":  # a sweep's trials are never local
        sections.append(settled(SHARED, capacity(planned, members=2, trials=4, concurrent=None, config=SHARED).member))

    for section in sections:
        assert section.device == device
        if device == "cpu":
            assert place(later, members=2, config=section).gpus == 0
        else:  # what a trial waits for, and then lacks
            with pytest.raises(ClusterError, match="2 members need 1 GPU each; the cluster has 0 GPUs"):
                place(later, members=2, config=section)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.4, 1 / 3, 0.25, 0.1, 1 / 49])
def test_the_memory_of_a_gpu_is_divided_by_the_members_of_all_runs_that_it_holds(share: float) -> None:
    config = load_config(None, ["cluster.backend=local", "ensemble.members=3", f"cluster.gpus_per_member={share}"])
    runs = capacity_of_runs([Node(64, 1)], config, runs=1000, concurrent=None).concurrent

    assert members_on(torch.device("cuda"), config) == 3 * runs
    assert members_on(torch.device("cpu"), config) == 3
