"""What each member gets of the cluster, worked out before anything is asked for."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from eat_dist.config import ClusterConfig, RunConfig
from eat_dist.errors import ClusterError

# A share below this is a mistake: the members would take turns on one core.
_SMALLEST_SHARE = 0.1
# Ray counts resources in whole ten-thousandths, and cuts off what is beyond (seen with Ray's own placement groups:
# tests/test_replicas_on_ray.py).
_UNITS = 10_000


@dataclass(frozen=True)
class Node:
    """What one node offers."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Placement:
    """What every member gets.

    Attributes:
        cpus: Of a node's CPUs; 0 where the GPU alone decides.
        gpus: 0 on CPUs.
        threads: torch threads in the member's process.
        backend: torch.distributed backend of the exchange.
    """

    cpus: float
    gpus: float
    threads: int
    backend: str

    @property
    def workers_a_gpu(self) -> int:
        """How many of them a GPU can hold; 0 on CPUs."""
        return max(1, _times(1.0, self.gpus)) if self.gpus else 0

    @property
    def resources(self) -> dict[str, float]:
        """In Ray's words."""
        named = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in named.items() if amount > 0}


def place_members(nodes: Sequence[Node], config: RunConfig) -> Placement:
    """What each worker of a training run gets: one a member, or with replicas R a member.

    Raises:
        ClusterError: The cluster cannot hold all of them at once; with the arithmetic and what to change.
    """
    count, what, fewer = workers_of(config)
    return place(nodes, members=count, config=config.cluster, what=what, fewer=fewer)


def workers_of(config: RunConfig) -> tuple[int, str, str]:
    """How many workers a training run has, what they are called, and the settings that say how many there are."""
    members, replicas = config.ensemble.members, config.cluster.replicas_per_member
    if replicas == 1:
        return members, "members", "ensemble.members"
    return (
        members * replicas,
        f"replicas ({members} members of {replicas})",
        "ensemble.members, cluster.replicas_per_member",
    )


def place(
    nodes: Sequence[Node],
    *,
    members: int,
    config: ClusterConfig,
    what: str = "members",
    fewer: str = "ensemble.members",
) -> Placement:
    """A whole GPU each where the cluster has them, else an equal share of the CPUs.

    Args:
        nodes: Of the cluster.
        members: How many there are.
        config: What each gets.
        what: They are called this in an error.
        fewer: The setting that says how many there are.

    Raises:
        ClusterError: The cluster cannot hold all members at once; with the arithmetic and what to change.
    """
    gpus = sum(node.gpus for node in nodes)
    if config.device == "cuda" or (config.device == "auto" and gpus > 0):
        return _on_gpus(nodes, members=members, config=config, what=what, fewer=fewer)
    cpus_of_nodes = [node.cpus for node in nodes]
    share = config.cpus_per_member or _equal_share(cpus_of_nodes, members=members, what=what, fewer=fewer)
    _require(nodes, members=members, cpus=share, gpus=0.0, what=what, fewer=fewer)
    if share < _SMALLEST_SHARE:
        raise ClusterError(
            f"{members} {what} on {sum(node.cpus for node in nodes):g} CPUs would get {share:g} each, below "
            f"{_SMALLEST_SHARE:g}; lower {fewer} or add nodes"
        )
    return Placement(share, 0.0, config.threads_per_member or max(1, int(share)), "gloo")


def _on_gpus(nodes: Sequence[Node], *, members: int, config: ClusterConfig, what: str, fewer: str) -> Placement:
    cpus = config.cpus_per_member or 0.0
    _require(nodes, members=members, cpus=cpus, gpus=config.gpus_per_member, what=what, fewer=fewer)
    # NCCL refuses two ranks on one GPU, so members that share one exchange through gloo.
    backend = "cpu:gloo,cuda:nccl" if config.gpus_per_member >= 1 else "gloo"
    return Placement(cpus, config.gpus_per_member, config.threads_per_member or max(1, int(cpus)), backend)


def shortage(nodes: Sequence[Node], config: RunConfig, *, placement: Placement) -> str:
    """What is missing for all members to start, with the arithmetic, as the beginning of a sentence."""
    count, what, _ = workers_of(config)
    room = _room(nodes, cpus=placement.cpus, gpus=placement.gpus)
    rest = ", but other work holds some of it" if room >= count else ""
    each = _each(placement.cpus, placement.gpus)
    return f"{count} {what} need {each} each; the cluster has {_there(nodes)}, room for {room}{rest}"


def _require(nodes: Sequence[Node], *, members: int, cpus: float, gpus: float, what: str, fewer: str) -> None:
    room = _room(nodes, cpus=cpus, gpus=gpus)
    if room >= members:
        return
    share = "cluster.gpus_per_member (or set cluster.device to cpu)" if gpus else "cluster.cpus_per_member"
    raise ClusterError(
        f"{members} {what} need {_each(cpus, gpus)} each; the cluster has {_there(nodes)}, room for {room}. "
        f"Lower {fewer} or {share}, or add nodes."
    )


def _room(nodes: Sequence[Node], *, cpus: float, gpus: float) -> int:
    return sum(_fit(node, cpus=cpus, gpus=gpus) for node in nodes)


def _each(cpus: float, gpus: float) -> str:
    return " and ".join(f"{amount:g} {kind}" for amount, kind in ((gpus, "GPU"), (cpus, "CPU")) if amount)


def _there(nodes: Sequence[Node]) -> str:
    return f"{sum(n.gpus for n in nodes):g} GPUs and {sum(n.cpus for n in nodes):g} CPUs on {len(nodes)} node(s)"


def _fit(node: Node, *, cpus: float, gpus: float) -> int:
    """How many workers one node holds. None spans two nodes, and a share of a GPU is never put together from two."""
    of_gpus = int(node.gpus) * _times(1.0, gpus) if 0 < gpus < 1 else _times(node.gpus, gpus)
    room = min(of_gpus, _times(node.cpus, cpus))
    return 0 if room == sys.maxsize else room


def _times(there: float, needed: float) -> int:
    """How often ``needed`` goes into what is there, as Ray counts; without limit where nothing is needed."""
    units = math.floor(needed * _UNITS)
    return math.floor(there * _UNITS) // units if units else sys.maxsize


def _equal_share(cpus: Sequence[float], *, members: int, what: str, fewer: str) -> float:
    """The largest share, rounded down to 1/100, of which the nodes hold ``members``."""
    candidates = {math.floor(100 * node / k) / 100 for node in cpus for k in range(1, members + 1)} - {0.0}
    fitting = [c for c in candidates if sum(_times(node, c) for node in cpus) >= members]
    if not fitting:
        raise ClusterError(f"{members} {what} on {sum(cpus):g} CPUs would get less than 0.01 each; lower {fewer}")
    return max(fitting)
