"""All members in this process, one thread each: tests, debugging, the rule ``joint``, and one GPU without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from eat_dist.config import ClusterConfig, RunConfig
from eat_dist.cpus import usable_cpus
from eat_dist.data.images import ImageSet
from eat_dist.data.splits import Splits
from eat_dist.errors import ClusterError
from eat_dist.exchange import Board, LocalExchange, run_together
from eat_dist.member import Member, MemberResult, OnIteration
from eat_dist.robustness.statistics import Policy
from eat_dist.storage import Folder


def train_in_process(
    config: RunConfig,
    train: ImageSet,
    *,
    splits: Splits,
    run_folder: Folder,
    mlflow_run_id: str | None = None,
    on_iteration: OnIteration | None = None,
    until_epoch: int | None = None,
) -> list[MemberResult]:
    """Train every member; results by rank.

    Args:
        config: The run.
        train: Training set.
        splits: What every member sees.
        run_folder: Where everything goes.
        mlflow_run_id: Kept in checkpoints.
        on_iteration: Called once an iteration, by member 0's thread.
        until_epoch: Stop at the end of that epoch, to be continued by another call; default: the last.
    """
    members = config.ensemble.members
    device = choose_device(config.cluster)
    cpus = max(1, usable_cpus() // members)
    torch.set_num_threads(config.cluster.threads_per_member or cpus)
    board = Board(members, timeout=config.cluster.gather_timeout)
    policy = Policy.of(config, train.num_classes)

    def work(rank: int) -> Callable[[], MemberResult]:
        def train_member() -> MemberResult:
            return Member(
                config,
                train,
                splits=splits,
                exchange=LocalExchange(board, rank, policy=policy),
                run_folder=run_folder,
                device=device,
                cpus=cpus,
                members_here=members_on(device, config),
                mlflow_run_id=mlflow_run_id,
                on_iteration=on_iteration if rank == 0 else None,
            ).run(until_epoch)

        return train_member

    return run_together([work(rank) for rank in range(members)], board)


def members_on(device: torch.device, config: RunConfig) -> int:
    """Members that share the device's memory: this process's, and on a GPU of which it has a share the others' as well.

    The others are runs of the same study (:func:`eat_dist.cluster.capacity.capacity_of_runs`), each of which would
    otherwise take for its images what is free for all.
    """
    share = config.cluster.gpus_per_member
    processes = math.floor(1 / share + 1e-6) if device.type == "cuda" and 0 < share < 1 else 1
    return config.ensemble.members * processes


def choose_device(config: ClusterConfig) -> torch.device:
    """The device of an in-process run or of an evaluation on this machine.

    Raises:
        ClusterError: ``cuda`` is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ClusterError("cluster.device is cuda, but torch sees no GPU here; set it to cpu or auto")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")
