"""Training on Ray: one worker a member, or one a replica of a member; all restarted together when one of them dies."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
import torch
import yaml
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device

from eat_dist.cluster.coordinator import RunAbortedError, start_coordinator
from eat_dist.cluster.exchange import RayExchange
from eat_dist.cluster.grid import own_group, take_place
from eat_dist.cluster.network import OverRaysNetwork
from eat_dist.cluster.resources import Placement
from eat_dist.cluster.session import connect, is_launched, nodes
from eat_dist.cluster.signals import own_handlers_after
from eat_dist.cluster.waiting import PatientStart, cause, one_line, place_or_wait, train_settings
from eat_dist.config import RunConfig, dump_config, parse_config
from eat_dist.cpus import usable_cpus
from eat_dist.data.load import load_dataset
from eat_dist.data.splits import make_splits
from eat_dist.errors import ClusterError, EatError, MemberLateError, MembersFailedError, StorageError
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
    on_notice: Callable[[str], None] | None = None,
    until_epoch: int | None = None,
) -> list[MemberResult]:
    """Train every member in its own Ray worker; results by rank.

    Args:
        config: The run; ``data.root`` must mean the same on every node.
        num_classes: C of the training set.
        run_folder: A folder that every node sees (one machine's disk, NFS, a bucket).
        mlflow_run_id: Kept in checkpoints.
        on_iteration: Called in this process, in a thread of its own, with what the coordinator has merged.
        on_notice: Called there with lines for the user: who is late, what is waited for, why members are restarted.
        until_epoch: Stop at the end of that epoch, to be continued by another call; default: the last.

    Raises:
        ClusterError: The cluster is too small, or stays so for ``cluster.wait_for_nodes``.
        MembersFailedError: Members died more often than ``cluster.max_restarts``.
        EatError: What a member stopped the run for, as it said it.
        KeyboardInterrupt: Ctrl-C.
    """
    placement = plan_placement(config)
    name = f"eat-dist-{config.name}-{uuid.uuid4().hex[:8]}"
    policy = Policy.of(config, num_classes)
    coordinator = start_coordinator(
        name, policy, timeout=config.cluster.gather_timeout, replicas=config.cluster.replicas_per_member
    )
    start = PatientStart(_notices_of(coordinator), placement=placement, config=config)
    trainer = TorchTrainer(
        _train_member,
        train_loop_config={
            "config": dump_config(config),
            "run_folder": str(run_folder),
            "coordinator": name,
            "threads": placement.threads,
            "workers_a_gpu": placement.workers_a_gpu,
            "mlflow_run_id": mlflow_run_id,
            "until_epoch": until_epoch,
        },
        torch_config=OverRaysNetwork(backend=placement.backend, timeout_s=math.ceil(config.cluster.gather_timeout)),
        scaling_config=_scaling(placement, config),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(run_folder.child("ray")),
            failure_config=ray.train.FailureConfig(
                max_failures=config.cluster.max_restarts,
                controller_failure_limit=-1,  # the callback counts, and tells failures from a lack of room
            ),
            callbacks=[start],
        ),
    )
    try:
        with _relaying(coordinator, on_iteration, on_notice), train_settings(config.cluster):
            _fit(trainer)
        results, failure = ray.get(coordinator.outcome.remote(), timeout=60)
    except ray.train.TrainingFailedError as error:
        failure = _known_failure(coordinator)
        if failure is None:
            raise _why(error, config) from error
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
        ClusterError: It does not answer, or cannot hold all members and is not to be waited for.
    """
    connect(config.cluster)
    return place_or_wait(nodes(), config, launched=is_launched())


def _train_member(loop: dict[str, Any]) -> None:
    """What runs in a member's worker."""
    config = parse_config(yaml.safe_load(loop["config"]))
    torch.set_num_threads(loop["threads"])
    context = ray.train.get_context()
    coordinator = ray.get_actor(loop["coordinator"])
    timeout_s = math.ceil(config.cluster.gather_timeout)
    place = take_place(
        context.get_world_rank(),
        context.get_world_size(),
        replicas=config.cluster.replicas_per_member,
        timeout_s=timeout_s,
    )
    # Of the first worker alone. A coordinator that is being restarted is waited for: nothing is lost by asking again.
    asked = coordinator.new_generation.options(max_task_retries=-1)
    new = ray.get(asked.remote(), timeout=timeout_s) if context.get_world_rank() == 0 else None
    exchange = RayExchange(
        coordinator,
        rank=place.member,
        replica=place.replica,
        grid=place.grid,
        generation=broadcast_from_rank_zero(new),
        timeout=config.cluster.gather_timeout,
        group=own_group(timeout_s),
    )
    try:
        train = load_dataset(config.data).train
        splits = make_splits(train.labels, config.ensemble.split, members=config.ensemble.members, seed=config.seed)
        # Not whether torch sees one: Ray hides no GPU from workers that have asked for none (cluster.device=cpu).
        on_gpu, here = loop["workers_a_gpu"] > 0, context.get_local_world_size()
        result = Member(
            config,
            train,
            splits=splits,
            exchange=exchange,
            run_folder=Folder.at(loop["run_folder"]),
            device=get_device() if on_gpu else torch.device("cpu"),
            # A GPU's worker reserves no CPUs, but the node's are there for decoding.
            cpus=max(1, usable_cpus() // here) if on_gpu else loop["threads"],
            members_here=loop["workers_a_gpu"] if on_gpu else here,
            mlflow_run_id=loop["mlflow_run_id"],
            replicas=place.replicas,
        ).run(loop["until_epoch"])
        if place.replica == 0:
            result = dataclasses.replace(result, nodes=place.nodes)
            ray.get(coordinator.finish.remote(place.member, result))
    except RunAbortedError:
        pass  # the driver asks the coordinator why
    except (MemberLateError, ClusterError):
        raise  # a restart may mend it
    except EatError as error:  # a restart would meet it again: tell everybody, and let the driver report it
        ray.get(coordinator.abort.remote(error))
    except Exception:
        # A peer that has stopped the run has left, which fails what this one waits for: no failure of this member.
        _, failure = ray.get(coordinator.outcome.remote())
        if failure is None:
            raise
    else:
        return
    finally:
        exchange.close()
    # The run is stopped. Ray Train keeps this process, and so its connections, until all have come to an end: those
    # that wait for its batches would do so until their timeout.
    exchange.leave()
    place.replicas.leave()
    gc.collect()  # a transfer under way holds its connection, and may be part of a cycle with what has failed


def _notices_of(coordinator: Any) -> Callable[[str], None]:
    def notice(text: str) -> None:
        coordinator.notice.remote(text)

    return notice


def _scaling(placement: Placement, config: RunConfig) -> ray.train.ScalingConfig:
    return ray.train.ScalingConfig(
        num_workers=config.ensemble.members * config.cluster.replicas_per_member,
        use_gpu=placement.gpus > 0,
        resources_per_worker=placement.resources,
        placement_strategy=config.cluster.placement.upper(),
    )


def _fit(trainer: TorchTrainer) -> None:
    """``fit``, with Ctrl-C as the KeyboardInterrupt it is: Ray Train aborts the run on it and leaves by SystemExit."""
    try:
        with own_handlers_after():
            trainer.fit()
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped


@contextlib.contextmanager
def _relaying(
    coordinator: Any, on_iteration: OnIteration | None, on_notice: Callable[[str], None] | None
) -> Iterator[None]:
    """Ask the coordinator for news while training runs, and once more when it has ended."""
    done = threading.Event()
    seen = 0

    def pass_on() -> None:
        nonlocal seen
        notices, entries = ray.get([coordinator.take_notices.remote(), coordinator.since.remote(seen)], timeout=10)
        if on_notice is not None:
            for notice in notices:
                on_notice(notice)
        for entry in entries:
            if on_iteration is not None and entry.iteration > seen:  # a restart repeats iterations; they were shown
                seen = entry.iteration
                on_iteration(entry)

    def relay() -> None:
        finished = False
        while not finished:
            finished = done.wait(_POLL_S)
            with contextlib.suppress(ray.exceptions.RayError):  # it is being restarted: ask again
                pass_on()

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


def _why(error: ray.train.TrainingFailedError, config: RunConfig) -> ClusterError:
    """One line from Ray Train's account of what failed."""
    ours = getattr(error, "controller_failure", None)
    if isinstance(ours, ClusterError):
        return ours
    failures = getattr(error, "worker_failures", {})
    late = [failure for failure in failures.values() if isinstance(cause(failure), MemberLateError)]
    if late:
        return MembersFailedError(str(cause(late[0])))
    tried = f"with up to {config.cluster.max_restarts} restarts (cluster.max_restarts) tried"
    return MembersFailedError(f"training stopped, {tried}; {one_line(error, config)}")
