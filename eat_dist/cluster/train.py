"""Training on Ray: one worker a member, restarted together from the newest checkpoint when one of them dies."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
import torch
import yaml
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from eat_dist.cluster.coordinator import RunAbortedError, start_coordinator
from eat_dist.cluster.exchange import RayExchange
from eat_dist.cluster.resources import Placement, place
from eat_dist.cluster.session import connect, nodes
from eat_dist.config import RunConfig, dump_config, parse_config
from eat_dist.data.load import load_dataset
from eat_dist.data.splits import make_splits
from eat_dist.errors import ClusterError, EatError, MemberLateError, StorageError
from eat_dist.member import Member, MemberResult, OnIteration
from eat_dist.robustness.statistics import Policy
from eat_dist.storage import Folder

_POLL_S = 0.5
_LOST = "the coordinator was lost when training had just ended"


def train_on_ray(
    config: RunConfig,
    *,
    num_classes: int,
    run_folder: Folder,
    mlflow_run_id: str | None = None,
    on_iteration: OnIteration | None = None,
) -> list[MemberResult]:
    """Train every member in its own Ray worker; results by rank.

    Args:
        config: The run; ``data.root`` must mean the same on every node.
        num_classes: C of the training set.
        run_folder: A folder that every node sees (one machine's disk, NFS, a bucket).
        mlflow_run_id: Kept in checkpoints.
        on_iteration: Called in this process, in a thread of its own, with what the coordinator has merged.

    Raises:
        ClusterError: The cluster is too small, or members died more often than ``cluster.max_restarts``.
        EatError: What a member stopped the run for, as it said it.
        KeyboardInterrupt: Ctrl-C.
    """
    placement = plan_placement(config)
    name = f"eat-dist-{config.name}-{uuid.uuid4().hex[:8]}"
    policy = Policy.of(config, num_classes)
    coordinator = start_coordinator(name, policy, timeout=config.cluster.gather_timeout)
    trainer = TorchTrainer(
        _train_member,
        train_loop_config={
            "config": dump_config(config),
            "run_folder": str(run_folder),
            "coordinator": name,
            "threads": placement.threads,
            "members_a_gpu": max(1, round(1 / placement.gpus)) if placement.gpus else 0,
            "mlflow_run_id": mlflow_run_id,
        },
        torch_config=TorchConfig(backend=placement.backend, timeout_s=math.ceil(config.cluster.gather_timeout)),
        scaling_config=_scaling(placement, config.ensemble.members),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(run_folder.child("ray")),
            failure_config=ray.train.FailureConfig(
                max_failures=config.cluster.max_restarts, controller_failure_limit=config.cluster.max_restarts
            ),
        ),
    )
    try:
        with _relaying_progress(coordinator, on_iteration):
            _fit(trainer)
        results, failure = ray.get(coordinator.outcome.remote(), timeout=60)
    except ray.train.TrainingFailedError as error:
        failure = _known_failure(coordinator)
        if failure is None:
            raise ClusterError(_why(error, config)) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{_LOST}: continue with --resume {run_folder.argument}") from error
    finally:
        ray.kill(coordinator)
        with contextlib.suppress(StorageError):  # where the storage failed, that is what the run is to say
            run_folder.delete("ray")
    if failure is not None:
        raise failure
    if len(results) < config.ensemble.members:  # it came back empty after the members had reported
        raise ClusterError(f"{_LOST}: continue with --resume {run_folder.argument}")
    return [results[rank] for rank in range(config.ensemble.members)]


def plan_placement(config: RunConfig) -> Placement:
    """Join the cluster and work out what each member gets.

    Raises:
        ClusterError: It does not answer, or cannot hold all members.
    """
    connect(config.cluster)
    return place(nodes(), members=config.ensemble.members, config=config.cluster)


def _train_member(loop: dict[str, Any]) -> None:
    """What runs in a member's worker."""
    config = parse_config(yaml.safe_load(loop["config"]))
    torch.set_num_threads(loop["threads"])
    context = ray.train.get_context()
    coordinator = ray.get_actor(loop["coordinator"])
    exchange = RayExchange(
        coordinator,
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        generation=broadcast_from_rank_zero(time.time_ns()),
        timeout=config.cluster.gather_timeout,
    )
    try:
        train = load_dataset(config.data).train
        splits = make_splits(train.labels, config.ensemble.split, members=config.ensemble.members, seed=config.seed)
        on_gpu, here = torch.cuda.is_available(), context.get_local_world_size()
        result = Member(
            config,
            train,
            splits=splits,
            exchange=exchange,
            run_folder=Folder.at(loop["run_folder"]),
            device=get_device() if on_gpu else torch.device("cpu"),
            # A GPU's worker reserves no CPUs, but the node's are there for decoding.
            cpus=max(1, (os.cpu_count() or 1) // here) if on_gpu else loop["threads"],
            members_here=loop["members_a_gpu"] if on_gpu else here,
            mlflow_run_id=loop["mlflow_run_id"],
        ).run()
        ray.get(coordinator.finish.remote(exchange.rank, result))
    except RunAbortedError:
        return  # the driver asks the coordinator why
    except (MemberLateError, ClusterError):
        raise  # a restart may mend it
    except EatError as error:  # a restart would meet it again: tell everybody, and let the driver report it
        ray.get(coordinator.abort.remote(error))
    except Exception:
        # A peer that stopped the run has closed its connections; that is no failure of this member.
        _, failure = ray.get(coordinator.outcome.remote())
        if failure is None:
            raise


def _scaling(placement: Placement, members: int) -> ray.train.ScalingConfig:
    return ray.train.ScalingConfig(
        num_workers=members, use_gpu=placement.gpus > 0, resources_per_worker=placement.resources
    )


def _fit(trainer: TorchTrainer) -> None:
    """``fit``, with Ctrl-C as the KeyboardInterrupt it is.

    Ray Train replaces the handler of SIGINT, aborts the run on it and leaves by SystemExit.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _relaying_progress(coordinator: Any, on_iteration: OnIteration | None) -> Iterator[None]:
    """Ask the coordinator for news while training runs, and once more when it has ended."""
    if on_iteration is None:
        yield
        return
    done = threading.Event()

    def relay() -> None:
        seen = 0
        finished = False
        while not finished:
            finished = done.wait(_POLL_S)
            with contextlib.suppress(ray.exceptions.RayError):  # it is being restarted: ask again
                for entry in ray.get(coordinator.since.remote(seen), timeout=10):
                    if entry.iteration > seen:  # a restart repeats iterations; they were shown already
                        seen = entry.iteration
                        on_iteration(entry)

    thread = threading.Thread(target=relay, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=15)


def _known_failure(coordinator: Any) -> EatError | None:
    try:
        _, failure = ray.get(coordinator.outcome.remote(), timeout=10)
    except ray.exceptions.RayError:
        return None
    return failure if isinstance(failure, EatError) else None


def _why(error: ray.train.TrainingFailedError, config: RunConfig) -> str:
    """One line from Ray Train's account of what failed."""
    failures = getattr(error, "worker_failures", {})
    late = [failure for failure in failures.values() if isinstance(_cause(failure), MemberLateError)]
    if late:
        return str(_cause(late[0]))
    if failures:
        rank, failure = sorted(failures.items())[0]
        reason = f"member {rank} failed: {' '.join(str(_cause(failure)).split())[:300]}"
    else:
        reason = " ".join(str(error).split())[-300:]
    return f"training stopped, with up to {config.cluster.max_restarts} restarts (cluster.max_restarts) tried; {reason}"


def _cause(error: BaseException) -> BaseException:
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error
