"""How many trials of a sweep run at once, worked out so that they can never wait for each other's resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eat_dist.cluster.resources import Node, Placement, place
from eat_dist.config import ClusterConfig
from eat_dist.errors import ClusterError, ConfigError


@dataclass(frozen=True)
class Capacity:
    """What a sweep may ask of a cluster.

    Attributes:
        concurrent: Trials at once, K.
        member: What each of the K · M members gets.
    """

    concurrent: int
    member: Placement


def capacity(
    nodes: Sequence[Node], *, members: int, trials: int, concurrent: int | None, config: ClusterConfig
) -> Capacity:
    """The trials that a cluster holds at once, all of their members placed.

    Every member of every trial asks for the same, so a node holds ⌊what it has / that⌋ of them, whichever they are and
    in whatever order they come: where K · M fit, K trials never leave each other half placed. A trial's own process,
    and the coordinator, ask for no CPU and no GPU.

    On CPUs without ``cluster.cpus_per_member`` the members share them equally; by default so many trials run that each
    member has a whole CPU, and at least one.

    Args:
        nodes: Of the cluster.
        members: M of a trial, the most of any.
        trials: Of the sweep; more are never run at once.
        concurrent: K; None: as many as fit.
        config: What each member gets.

    Raises:
        ConfigError: ``trials`` or ``concurrent`` is below 1.
        ClusterError: One trial, or ``concurrent`` of them, do not fit; with the arithmetic.
    """
    if trials < 1:
        raise ConfigError(f"a sweep needs at least one trial; got {trials}")
    if concurrent is not None and concurrent < 1:
        raise ConfigError(f"a sweep runs at least one trial at once; got {concurrent}")
    if concurrent is not None:
        wanted = min(concurrent, trials)
        what = "members" if wanted == 1 else f"members ({wanted} trials at once × {members})"
        fewer = "ensemble.members" if wanted == 1 else "--concurrent"
        return Capacity(wanted, place(nodes, members=wanted * members, config=config, what=what, fewer=fewer))
    one = place(nodes, members=members, config=config)
    on_cpus_shared = not one.gpus and config.cpus_per_member is None
    # A whole CPU each is the least that is worth running one more trial for.
    each = config.model_copy(update={"cpus_per_member": 1.0}) if on_cpus_shared else config
    best = Capacity(1, one)
    for count in range(2, trials + 1):
        try:
            place(nodes, members=count * members, config=each)
        except ClusterError:
            break
        best = Capacity(count, place(nodes, members=count * members, config=config))
    return best


def settled(config: ClusterConfig, member: Placement) -> ClusterConfig:
    """The section for a trial: its members take what was worked out for K trials, not what one alone would get."""
    return config.model_copy(update={"cpus_per_member": member.cpus or None, "threads_per_member": member.threads})
