"""Placement arithmetic and the coordinator, without a cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from eat_dist.cluster.answer import Answer
from eat_dist.cluster.coordinator import CoordinatorState, RunAbortedError, StaleGenerationError
from eat_dist.cluster.grid import lay_grid
from eat_dist.cluster.resources import Node, Placement, place, place_members
from eat_dist.config import ClusterConfig, RunConfig, override
from eat_dist.errors import ClusterError, MemberLateError, NonFiniteLossError
from eat_dist.robustness.statistics import (
    ClassCounts,
    EnsembleStatistics,
    MemberStatistics,
    Policy,
    Received,
    merge,
)

POLICY = Policy(members=2, num_classes=3, rule="uniform", peers=1, temperature=1.0, momentum=0.9)


@pytest.mark.parametrize(
    ("nodes", "members", "share"),
    [
        ([Node(2, 0)], 2, 1.0),
        ([Node(2, 0)], 3, 0.66),
        ([Node(2, 0)], 8, 0.25),
        # 3 members at 2 CPUs each would fit the sum of 6, but a member never spans nodes: one on each, one left over.
        ([Node(3, 0), Node(3, 0)], 3, 1.5),
        ([Node(0, 0), Node(8, 0)], 4, 2.0),
    ],
)
def test_without_gpus_members_share_the_cpus_equally(nodes: list[Node], members: int, share: float) -> None:
    placement = place(nodes, members=members, config=ClusterConfig())

    assert placement.cpus == pytest.approx(share)
    assert placement.gpus == 0
    assert placement.backend == "gloo"


def test_with_gpus_every_member_gets_a_whole_one_and_nccl() -> None:
    placement = place([Node(16, 2), Node(16, 2)], members=4, config=ClusterConfig())

    assert (placement.gpus, placement.backend) == (1.0, "cpu:gloo,cuda:nccl")
    assert placement.resources == {"GPU": 1.0}


def test_members_that_share_a_gpu_exchange_over_gloo() -> None:
    placement = place([Node(16, 1)], members=4, config=ClusterConfig(gpus_per_member=0.25))

    assert (placement.gpus, placement.backend) == (0.25, "gloo")


@pytest.mark.parametrize(
    ("nodes", "config", "message"),
    [
        ([Node(8, 2)], ClusterConfig(), "3 members need 1 GPU each; the cluster has 2 GPUs and 8 CPUs .*room for 2"),
        ([Node(8, 0)], ClusterConfig(device="cuda"), "need 1 GPU each; the cluster has 0 GPUs"),
        ([Node(2, 0)], ClusterConfig(cpus_per_member=1.0), "need 1 CPU each; .* 2 CPUs on 1 node.*room for 2"),
        ([Node(1.5, 0), Node(1.5, 0)], ClusterConfig(cpus_per_member=1.0), "room for 2"),
        ([Node(0.2, 0)], ClusterConfig(), "would get 0.06 each, below 0.1"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_the_arithmetic(
    nodes: list[Node], config: ClusterConfig, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        place(nodes, members=3, config=config)


@pytest.mark.parametrize(
    ("share", "nodes", "room"),
    [
        (0.5, [Node(8, 1)], 2),
        (0.25, [Node(8, 2), Node(8, 1)], 12),
        (0.4, [Node(8, 2)], 4),  # not 5: the fifth would have to be put together from two GPUs
        (0.6, [Node(8, 4)], 4),
        (0.34, [Node(8, 3)], 6),
        (1 / 3, [Node(8, 1)], 3),
        (1 / 6, [Node(8, 1)], 6),  # Ray counts ten-thousandths and cuts off the rest: six times 0.1666
        (0.1429, [Node(8, 1)], 6),  # seven times that is more than one
        (2.0, [Node(8, 3), Node(8, 1), Node(8, 4)], 3),
    ],
)
def test_shares_of_a_gpu_come_from_one_gpu_each(share: float, nodes: list[Node], room: int) -> None:
    config = ClusterConfig(gpus_per_member=share)

    assert place(nodes, members=room, config=config).gpus == share
    with pytest.raises(ClusterError, match=f"room for {room}"):
        place(nodes, members=room + 1, config=config)


@pytest.mark.parametrize(("share", "workers"), [(1.0, 1), (2.0, 1), (0.6, 1), (0.5, 2), (0.4, 2), (0.34, 2), (0.25, 4)])
def test_the_memory_of_a_gpu_is_divided_by_the_workers_that_it_can_hold(share: float, workers: int) -> None:
    assert Placement(0.0, share, 1, "gloo").workers_a_gpu == workers
    assert Placement(1.0, 0.0, 1, "gloo").workers_a_gpu == 0


def test_gpus_above_one_are_whole() -> None:
    with pytest.raises(ValueError, match=r"above one GPU it must be a whole number .* got 1\.5"):
        ClusterConfig(gpus_per_member=1.5)


def of_replicas(members: int, replicas: int) -> RunConfig:
    sizes = [f"ensemble.members={members}", f"cluster.replicas_per_member={replicas}", "data.batch_size=48"]
    return override(RunConfig(), *sizes)


@pytest.mark.parametrize("counts", [[8], [4, 4], [2, 2, 2, 2], [3, 3, 3], [1] * 8, [0, 5, 3], [7, 2], [16, 1]])
@pytest.mark.parametrize(("members", "replicas"), [(1, 2), (2, 2), (4, 2), (2, 4), (1, 8), (3, 3), (2, 3)])
def test_as_many_workers_as_members_times_replicas_are_placed(counts: list[int], members: int, replicas: int) -> None:
    """A whole GPU each: they fit if and only if there are M × R GPUs. On CPUs they always do, in equal shares."""
    nodes, workers = [Node(4.0, count) for count in counts], members * replicas
    config = of_replicas(members, replicas)
    if sum(counts) >= workers:
        assert place_members(nodes, config).gpus == 1.0
    else:
        expected = f"^{workers} replicas \\({members} members of {replicas}\\) need 1 GPU each.*room for {sum(counts)}"
        with pytest.raises(ClusterError, match=expected) as caught:
            place_members(nodes, config)
        assert "Lower ensemble.members, cluster.replicas_per_member or cluster.gpus_per_member" in str(caught.value)

    cpu_nodes = [Node(count, 0) for count in counts]
    share = place_members(cpu_nodes, config).cpus
    assert sum(int(count / share + 1e-6) for count in counts) >= workers
    larger = share + 0.01
    assert sum(int(count / larger + 1e-6) for count in counts) < workers


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_the_grid_keeps_as_many_members_whole_on_a_node_as_there_can_be(replicas: int) -> None:
    for counts in (*itertools.product(range(5), repeat=3), (8, 8), (3, 5, 1, 7)):
        nodes = [f"node {number}" for number, count in enumerate(counts) for _ in range(count)]
        nodes = nodes[: len(nodes) // replicas * replicas]
        grid = lay_grid(nodes, replicas)

        assert sorted(worker for member in grid for worker in member) == list(range(len(nodes)))
        assert all(len(member) == replicas and list(member) == sorted(member) for member in grid)
        whole = sum(len({nodes[worker] for worker in member}) == 1 for member in grid)
        assert whole == sum(count // replicas for count in Counter(nodes).values())


def test_the_grid_lays_neighbours_together_and_mends_what_does_not_divide() -> None:
    assert lay_grid(["a"] * 3, 1) == ((0,), (1,), (2,))
    assert lay_grid(["a", "a", "b", "b"], 2) == ((0, 1), (2, 3))
    # In order of rank both members would lie on two nodes: (a, b) and (b, c).
    assert lay_grid(["a", "b", "b", "c"], 2) == ((0, 3), (1, 2))


def statistics(member: int, iteration: int, fooled_rate: float = 0.5) -> MemberStatistics:
    return MemberStatistics(member, iteration, batch_size=4, adversarial_loss=1.0, fooled_rate=fooled_rate)


async def both(state: CoordinatorState, generation: int, iteration: int, previous: EnsembleStatistics | None) -> Any:
    calls = [state.merge(generation, rank, statistics(rank, iteration), previous) for rank in range(2)]
    return await asyncio.gather(*calls)


def test_every_member_gets_the_same_merged_statistics() -> None:
    state, start = CoordinatorState(POLICY, 5), EnsembleStatistics.initial(POLICY)
    first, second = (answer.applied_to(start) for answer in asyncio.run(both(state, 1, 0, start)))

    assert first.to_json() == second.to_json() == state.ensemble.to_json()
    assert first.iteration == 1
    assert [entry.member for entry in first.members] == [0, 1]


@pytest.mark.parametrize(
    ("rule", "peers"), [("none", 1), ("uniform", 1), ("hardest", 2), ("class_risk", 3), ("relay", 1)]
)
def test_answers_make_up_the_merged_statistics_bit_for_bit(rule: str, peers: int) -> None:
    policy = Policy(members=4, num_classes=7, rule=rule, peers=peers, temperature=1.0, momentum=0.9)
    draw = np.random.default_rng(0)
    merged = held = EnsembleStatistics.initial(policy)
    for iteration in range(8):
        gathered = []
        for rank in range(4):
            labels = draw.integers(7, size=3)
            received = tuple(Received(j, draw.random(), draw.random()) for j in policy.plan(iteration).sources[rank])
            counts = ClassCounts.of(draw.random(3) < 0.5, labels)
            rate = None if iteration < 2 else draw.random()  # not measured at first: stays NaN
            gathered.append(MemberStatistics(rank, iteration, 3, fooled_rate=rate, received=received, by_class=counts))
        before, merged = merged, merge(merged, gathered, policy=policy)
        held = Answer.of(before, merged).to(1).applied_to(held)

        assert held.transfer_matrix.tobytes() == merged.transfer_matrix.tobytes()
        assert held.class_risk.tobytes() == merged.class_risk.tobytes()
        assert held.to_json() == merged.to_json()
        assert held.members == ()


def test_every_member_sees_all_losses_if_one_is_not_finite() -> None:
    def answer(loss: float) -> Answer:
        gathered = [statistics(0, 0), dataclasses.replace(statistics(1, 0), adversarial_loss=loss)]
        start = EnsembleStatistics.initial(POLICY)
        return Answer.of(start, merge(start, gathered, policy=POLICY)).to(1)

    assert [entry.member for entry in answer(math.inf).members] == [0, 1]
    assert answer(1.0).members == ()


def test_a_late_member_is_named() -> None:
    state = CoordinatorState(POLICY, timeout=0.05)

    with pytest.raises(MemberLateError, match=r"member 1 did not hand in 'statistics' number 0 within 0\.05 s"):
        asyncio.run(state.merge(1, 0, statistics(0, 0), EnsembleStatistics.initial(POLICY)))


def test_of_a_members_replicas_the_firsts_statistics_count_and_all_get_the_answer() -> None:
    async def story() -> None:
        state = CoordinatorState(POLICY, 5, replicas=2)
        start = EnsembleStatistics.initial(POLICY)
        # The fooled rates of the second replicas differ here, which they never do, to show that they are not used.
        handed_in = [statistics(member, 0, rate) for member, rate in ((0, 0.25), (0, 0.9), (1, 0.75), (1, 0.9))]
        answers = await asyncio.gather(*(state.merge(1, place, s, start) for place, s in enumerate(handed_in)))
        assert [answer.applied_to(start).to_json() for answer in answers] == [state.ensemble.to_json()] * 4
        assert [entry.fooled_rate for entry in answers[0].members] == [0.25, 0.75]
        agreed = await asyncio.gather(*(state.gather(1, "resume", 0, place, place) for place in range(4)))
        assert agreed == [[0, 2]] * 4

    asyncio.run(story())


def test_a_late_replica_is_named() -> None:
    async def story() -> None:
        state = CoordinatorState(POLICY, 0.05, replicas=2)
        await asyncio.gather(*(state.gather(1, "checkpoint", 0, place, {}) for place in (0, 1, 2)))

    with pytest.raises(MemberLateError, match=r"^member 1 \(replica 1\) did not hand in 'checkpoint' number 0"):
        asyncio.run(story())


def test_a_new_generation_replaces_the_old_one_and_brings_its_own_statistics() -> None:
    async def story() -> EnsembleStatistics:
        state = CoordinatorState(POLICY, 5)
        await both(state, 1, 0, EnsembleStatistics.initial(POLICY))
        orphan = asyncio.create_task(state.merge(1, 0, statistics(0, 1), None))
        await asyncio.sleep(0)
        merged, _ = await both(state, 2, 0, EnsembleStatistics.initial(POLICY))  # from the checkpoint, so 0 again
        with pytest.raises(StaleGenerationError):
            await orphan
        with pytest.raises(StaleGenerationError):
            await state.merge(1, 1, statistics(1, 1), None)
        return merged

    assert asyncio.run(story()).iteration == 1


def test_who_waits_is_told_when_another_member_stops_the_run() -> None:
    async def story() -> None:
        state = CoordinatorState(POLICY, 5)
        waiting = asyncio.create_task(state.gather(1, "checkpoint", 0, 0, {}))
        await asyncio.sleep(0)
        await state.abort(NonFiniteLossError("member 1: the clean loss is nan"))
        with pytest.raises(RunAbortedError, match="member 1: the clean loss is nan"):
            await waiting
        _, failure = await state.outcome()
        assert isinstance(failure, NonFiniteLossError)

    asyncio.run(story())


def test_progress_is_handed_out_from_where_the_driver_has_been() -> None:
    async def story() -> list[int]:
        state = CoordinatorState(POLICY, 5)
        await both(state, 1, 0, EnsembleStatistics.initial(POLICY))
        await both(state, 1, 1, None)
        return [entry.iteration for entry in await state.since(1)]

    assert asyncio.run(story()) == [2]


def test_members_that_start_again_are_never_stale_whatever_the_clocks_say() -> None:
    async def story() -> None:
        ahead = time.time_ns() + 90 * 10**9
        state = CoordinatorState(POLICY, 5)
        await state.join(ahead, 0, "node A")
        again = await state.new_generation()
        await state.join(again, 0, "node B")
        with pytest.raises(StaleGenerationError):
            await state.join(ahead, 0, "node A")
        restarted = CoordinatorState(POLICY, 5)  # which has forgotten every number
        assert await restarted.new_generation() > ahead - 90 * 10**9

    asyncio.run(story())
