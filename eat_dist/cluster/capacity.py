"""How many trials of a sweep, or runs of a study, run at once: so many that they never wait for each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eat_dist.cluster.resources import Node, Placement, place, workers_of
from eat_dist.config import ClusterConfig, RunConfig
from eat_dist.errors import ClusterError, ConfigError


@dataclass(frozen=True)
class Words:
    """What errors call things: what runs at once, its parts, and the setting that says how many of those there are."""

    trial: str = "trial"
    members: str = "members"
    fewer: str = "ensemble.members"


@dataclass(frozen=True)
class Capacity:
    """What a sweep may ask of a cluster.

    Attributes:
        concurrent: Trials at once, K.
        member: What each of the K · M members gets.
    """

    concurrent: int
    member: Placement


@dataclass(frozen=True)
class RunsCapacity:
    """What runs of one kind may ask of a cluster.

    Attributes:
        concurrent: Runs at once.
        resources: In Ray's words, what each run's own process takes; nothing where its members are other processes.
        cluster: The section of each run.
    """

    concurrent: int
    resources: Mapping[str, float]
    cluster: ClusterConfig


def capacity(
    nodes: Sequence[Node],
    *,
    members: int,
    trials: int,
    concurrent: int | None,
    config: ClusterConfig,
    words: Words = Words(),
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
        words: For errors.

    Raises:
        ConfigError: ``trials`` or ``concurrent`` is below 1.
        ClusterError: One trial, or ``concurrent`` of them, do not fit; with the arithmetic.
    """
    if trials < 1:
        raise ConfigError(f"there must be at least one {words.trial}; got {trials}")
    if concurrent is not None and concurrent < 1:
        raise ConfigError(f"at least one {words.trial} must run at once; got {concurrent}")
    if concurrent is not None:
        wanted = min(concurrent, trials)
        what = words.members if wanted == 1 else f"{words.members} ({wanted} {words.trial}s at once × {members})"
        fewer = words.fewer if wanted == 1 else "--concurrent"
        return Capacity(wanted, place(nodes, members=wanted * members, config=config, what=what, fewer=fewer))
    one = place(nodes, members=members, config=config, what=words.members, fewer=words.fewer)
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


def capacity_of_runs(nodes: Sequence[Node], config: RunConfig, *, runs: int, concurrent: int | None) -> RunsCapacity:
    """The runs of one kind that a cluster holds at once.

    A run on Ray is a trial like a sweep's: its members take what there is, its own process nothing. A run with
    ``backend: local`` is one process with all members: it takes ``threads_per_member`` CPUs (by default one), and a GPU
    where members would get one.

    Args:
        nodes: Of the cluster.
        config: Of any of the runs: they agree in the section ``cluster`` and in the number of workers.
        runs: How many there are.
        concurrent: At once; None: as many as fit.

    Raises:
        ConfigError: ``concurrent`` is below 1.
        ClusterError: One run, or ``concurrent`` of them, do not fit; with the arithmetic.
    """
    cluster = config.cluster
    if cluster.backend == "ray":
        workers, what, fewer = workers_of(config)
        found = capacity(
            nodes,
            members=workers,
            trials=runs,
            concurrent=concurrent,
            config=cluster,
            words=Words("run", what, fewer),
        )
        return RunsCapacity(found.concurrent, {}, settled(cluster, found.member))
    threads = cluster.threads_per_member or 1
    found = capacity(
        nodes,
        members=1,
        trials=runs,
        concurrent=concurrent,
        config=cluster.model_copy(update={"cpus_per_member": float(threads)}),
        words=Words("run", "run processes", "cluster.threads_per_member"),
    )
    # Its members are threads: what was worked out for the process is not what each of them gets.
    placed = cluster.model_copy(update={"threads_per_member": threads, "device": _device(found.member)})
    return RunsCapacity(found.concurrent, found.member.resources, placed)


def settled(config: ClusterConfig, member: Placement) -> ClusterConfig:
    """The section for a trial: its members take what was worked out for K trials, not what one alone would get.

    Nor do they choose anew whether there are GPUs: nodes come and go, and a trial that finds none at the moment would
    train on CPUs, and one that meets the first of a cluster of CPUs would want one for each member.
    """
    return config.model_copy(
        update={
            "cpus_per_member": member.cpus or None,
            "threads_per_member": member.threads,
            "device": _device(member),
        }
    )


def _device(member: Placement) -> str:
    return "cuda" if member.gpus else "cpu"
