"""Which worker trains which replica of which member."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import ray
import torch
import torch.distributed as dist

from eat_dist.replicas import ALONE, ReplicaGroup, Replicas

Grid = tuple[tuple[int, ...], ...]
"""[M][R]: the workers, by rank in the process group, that train each member."""


def lay_grid(nodes: Sequence[Hashable], replicas: int) -> Grid:
    """Members of ``replicas`` workers each, whole on one node as often as the workers' nodes allow.

    From each node come ⌊its workers / R⌋ whole members; what is left over on all nodes makes the others. With one
    replica, member i is worker i.

    Args:
        nodes: Where each worker is, by rank; a multiple of ``replicas`` of them.
        replicas: R.
    """
    assert len(nodes) % replicas == 0, f"{len(nodes)} workers do not make members of {replicas} replicas"
    by_node: dict[Hashable, list[int]] = defaultdict(list)
    for worker, node in enumerate(nodes):
        by_node[node].append(worker)
    whole = [len(workers) // replicas * replicas for workers in by_node.values()]
    together = [w for workers, count in zip(by_node.values(), whole, strict=True) for w in workers[:count]]
    left_over = [w for workers, count in zip(by_node.values(), whole, strict=True) for w in workers[count:]]
    order = together + left_over
    return tuple(sorted(tuple(order[i : i + replicas]) for i in range(0, len(order), replicas)))


@dataclass(frozen=True)
class Place:
    """A worker's place in the grid.

    Attributes:
        grid: Of all workers.
        member: i.
        replica: r.
        replicas: The way to the member's other replicas.
        nodes: How many nodes the member's replicas are on.
    """

    grid: Grid
    member: int
    replica: int
    replicas: Replicas
    nodes: int


def own_group(timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group of all workers, whose connections close when its holder lets go of it; every worker calls it.

    torch's own never closes: ``torch.distributed.nn``, which torchvision imports, has it as a default argument. None
    over NCCL, whose groups end otherwise: destroying one waits for the peers that it is to wake, and aborting one has
    torch kill their processes.
    """
    if dist.get_backend() != "gloo":
        return None
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def take_place(worker: int, workers: int, *, replicas: int, timeout_s: float) -> Place:
    """Find this worker's place; every worker calls it. One replica a member needs no talk.

    Args:
        worker: Rank in the process group that Ray Train has set up.
        workers: M · R.
        replicas: R.
        timeout_s: Seconds until a replica that does not answer is an error.
    """
    if replicas == 1:
        return Place(tuple((other,) for other in range(workers)), worker, 0, ALONE, nodes=1)
    # By Ray's node, not by address: Ray Train's own node rank takes all nodes of one address for one.
    mine = torch.tensor(list(bytes.fromhex(ray.get_runtime_context().get_node_id())), dtype=torch.uint8)
    everybodys = [torch.empty_like(mine) for _ in range(workers)]
    dist.all_gather(everybodys, mine)
    nodes = [bytes(node.tolist()) for node in everybodys]
    grid = lay_grid(nodes, replicas)
    group, _ = dist.new_subgroups_by_enumeration(
        [list(member) for member in grid], timeout=datetime.timedelta(seconds=timeout_s)
    )
    assert isinstance(group, dist.ProcessGroup)
    (member,) = [number for number, its in enumerate(grid) if worker in its]
    together = ReplicaGroup(group)
    assert together.index == grid[member].index(worker)
    return Place(grid, member, together.index, together, nodes=len({nodes[other] for other in grid[member]}))
