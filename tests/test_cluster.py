"""Placement arithmetic and the coordinator, without a cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from eat_dist.cluster.answer import Answer
from eat_dist.cluster.coordinator import CoordinatorState, RunAbortedError, StaleGenerationError
from eat_dist.cluster.resources import Node, place
from eat_dist.config import ClusterConfig
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
