"""What the coordinator costs an iteration, against the number of members.

    python benchmarks/coordinator_scale.py --members 2 4 8 16 32 64 128

The coordinator is the actor of a training run, and members reach it by the exchange of a training run; but they only
sleep, then hand in statistics of a realistic size and wait for the merged ones. They are threads of a few processes,
for a hundred and more processes do not fit a small machine; so the time an iteration takes beyond the sleep holds the
members' own work, too, on the same cores. The coordinator's CPU time is its own alone. Sizes are those of Ray's own
serialisation.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import psutil
import ray

from eat_dist.cluster.coordinator import CoordinatorState, start_coordinator
from eat_dist.cluster.exchange import RayExchange
from eat_dist.robustness.statistics import ClassCounts, EnsembleStatistics, MemberStatistics, Policy, Received

TIMEOUT_S = 300.0
# The first iterations open connections; they are left out.
WARM_UP = 5


def policy_of(members: int, classes: int) -> Policy:
    return Policy(members, num_classes=classes, rule="uniform", peers=1, temperature=1.0, momentum=0.9)


def measured(rank: int, iteration: int, policy: Policy, batch_size: int) -> MemberStatistics:
    """What a member of a real run hands in: every field filled, counts of the classes of a plainly drawn batch."""
    draw = np.random.default_rng((rank, iteration))
    labels = draw.integers(policy.num_classes, size=batch_size)
    fooled = draw.random(batch_size) < 0.3
    received = tuple(
        Received(sender, float(draw.random()), float(draw.random())) for sender in policy.plan(iteration).sources[rank]
    )
    losses = (float(draw.random()) for _ in range(4))
    return MemberStatistics(
        rank, iteration, batch_size, next(losses), next(losses), float(fooled.mean()), next(losses), next(losses),
        received, ClassCounts.of(fooled, labels), 0.001, 0.002, 0.003, 2.0,
    )  # fmt: skip


class Sleepers:
    """Some of the members, a thread each, in one process."""

    def run(  # noqa: PLR0917  (a remote call)
        self, coordinator: Any, ranks: list[int], policy: Policy, iterations: int, sleep: float, batch_size: int
    ) -> list[float]:
        """Seconds each iteration took, by the process's first member."""
        taken: list[float] = []
        grid = [[worker] for worker in range(policy.members)]

        def member(rank: int) -> None:
            exchange = RayExchange(coordinator, rank=rank, replica=0, grid=grid, generation=1, timeout=TIMEOUT_S)
            ensemble = EnsembleStatistics.initial(policy)
            for iteration in range(iterations):
                statistics_of_iteration = measured(rank, iteration, policy, batch_size)
                begin = time.perf_counter()
                time.sleep(sleep)
                ensemble = exchange.submit(statistics_of_iteration, ensemble).wait()
                if rank == ranks[0]:
                    taken.append(time.perf_counter() - begin)

        threads = [threading.Thread(target=member, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return taken


@dataclass(frozen=True)
class Cost:
    """Of one iteration.

    Attributes:
        beyond_sleep: Milliseconds it took beyond the members' sleep.
        cpu: Milliseconds of CPU time in the coordinator's process.
        bytes_in: To the coordinator, from all members.
        bytes_out: From the coordinator, to all members.
    """

    beyond_sleep: float
    cpu: float
    bytes_in: int
    bytes_out: int


def measure(members: int, *, iterations: int, sleep: float, classes: int, batch_size: int, processes: int) -> Cost:
    policy = policy_of(members, classes)
    coordinator = start_coordinator(f"scale-{members}", policy, timeout=TIMEOUT_S)
    process = psutil.Process(ray.get(coordinator.process_id.remote()))
    hosts = [ray.remote(num_cpus=0)(Sleepers).remote() for _ in range(min(processes, members))]

    def run(count: int) -> list[float]:
        parts = [list(range(members))[start :: len(hosts)] for start in range(len(hosts))]
        calls = [
            host.run.remote(coordinator, ranks, policy, count, sleep, batch_size)
            for host, ranks in zip(hosts, parts, strict=True)
        ]
        return [seconds for taken in ray.get(calls) for seconds in taken[WARM_UP:]]

    before = process.cpu_times()
    taken = run(WARM_UP + iterations)
    after = process.cpu_times()
    cpu = (after.user + after.system - before.user - before.system) / (WARM_UP + iterations)
    for actor in (coordinator, *hosts):
        ray.kill(actor)
    bytes_in, bytes_out = asyncio.run(traffic(policy, batch_size))
    return Cost((statistics.median(taken) - sleep) * 1000, cpu * 1000, bytes_in, bytes_out)


async def traffic(policy: Policy, batch_size: int, iteration: int = 1) -> tuple[int, int]:
    """Serialised bytes of one iteration's arguments and answers; not the first one, which brings a checkpoint's."""
    state = CoordinatorState(policy, TIMEOUT_S)
    ranks = range(policy.members)
    for now in range(iteration + 1):
        start = EnsembleStatistics.initial(policy) if now == 0 else None
        arguments = [(1, rank, measured(rank, now, policy, batch_size), start) for rank in ranks]
        answers = await asyncio.gather(*(state.merge(*values) for values in arguments))
    return sum(size_of(values) for values in arguments), sum(size_of(answer) for answer in answers)


def size_of(value: Any) -> int:
    return int(ray._private.worker.global_worker.get_serialization_context().serialize(value).total_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--sleep", type=float, default=0.05, help="seconds an iteration, instead of computing")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=180)
    parser.add_argument("--processes", type=int, default=2, help="which share the members")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=256 * 2**20)
    print(f"{os.cpu_count()} CPUs, Ray {ray.__version__}, {arguments.classes} classes, B = {arguments.batch_size}\n")
    print("| members | beyond the sleep, ms | a member, ms | coordinator's CPU, ms | a member, ms | kB in | kB out |")
    print("|---|---|---|---|---|---|---|")
    for members in arguments.members:
        cost = measure(
            members,
            iterations=arguments.iterations,
            sleep=arguments.sleep,
            classes=arguments.classes,
            batch_size=arguments.batch_size,
            processes=arguments.processes,
        )
        print(
            f"| {members} | {cost.beyond_sleep:.1f} | {cost.beyond_sleep / members:.2f} | {cost.cpu:.1f} "
            f"| {cost.cpu / members:.2f} | {cost.bytes_in / 1000:.1f} | {cost.bytes_out / 1000:.1f} |",
            flush=True,
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
