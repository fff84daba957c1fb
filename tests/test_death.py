"""A process that is killed in the middle of an epoch costs time, and no number."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from eat_dist.config import RunConfig
from eat_dist.errors import NonFiniteLossError
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.storage import Folder
from small_runs import largest_difference, small_config, train_locally, weights

# Killed once this many iterations are done: in the middle of the third of four epochs of five.
KILL_AFTER = 12


def member_processes() -> list[psutil.Process]:
    """Ray names a worker's process after what it runs."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "RayTrainWorker" in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def train_and_kill(config: RunConfig, folder: Path, victim: str) -> list[int]:
    """Train on Ray, SIGKILL one process after iteration ``KILL_AFTER``; returns where the members resumed from."""
    import ray

    from eat_dist.cluster.train import train_on_ray

    killed: list[int] = []

    def on_iteration(ensemble: object) -> None:
        if killed or ensemble.iteration < KILL_AFTER:  # type: ignore[attr-defined]
            return
        if victim == "member":
            pid = member_processes()[-1].pid
        else:
            names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
            (name,) = [name for name in names if name.startswith("eat-dist-")]
            pid = ray.get(ray.get_actor(name).process_id.remote())
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    results = train_on_ray(config, num_classes=5, run_folder=Folder.at(folder), on_iteration=on_iteration)
    assert killed, "nothing was killed: the run ended first"
    return [result.resumed_from for result in results]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["member", "coordinator"])
def test_a_killed_process_changes_no_weight(victim: str, tmp_path: Path, ray_session: None) -> None:
    """Slow: Ray Train starts three workers, and starts them again. Smaller batches make the epochs long enough."""
    config = small_config("train.epochs=12", "attack.num_steps=10", f"name={victim}")
    train_locally(config, tmp_path / "undisturbed")

    resumed_from = train_and_kill(config, tmp_path / "disturbed", victim)

    assert len(set(resumed_from)) == 1
    assert resumed_from[0] >= 5, "the members began again instead of continuing from a checkpoint"
    assert resumed_from[0] % 5 == 0
    assert largest_difference(weights(tmp_path / "undisturbed"), weights(tmp_path / "disturbed")) == 0


# A fault of one member alone


def train_member_1_to_a_nan(loop: dict[str, Any]) -> None:
    """In a member's worker: the second member's gradient norm is NaN in the fourth iteration, before it sends the fifth
    batch; the other one waits for that in the process group."""
    import ray.train

    import eat_dist.member
    from eat_dist.cluster.train import _train_member

    true, norms = eat_dist.member.gradient_norm, iter([0, 0, 0])

    def norm(optimiser: torch.optim.Optimizer) -> float:
        return true(optimiser) if next(norms, None) is not None else math.nan

    if ray.train.get_context().get_world_rank() == 1:
        eat_dist.member.gradient_norm = norm
    _train_member(loop)


@pytest.mark.ray
@pytest.mark.slow
def test_a_fault_of_one_member_holds_the_others_up_for_no_timeout(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow: Ray Train starts two workers."""
    import ray.cloudpickle

    import eat_dist.cluster.train

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(eat_dist.cluster.train, "_train_member", train_member_1_to_a_nan)
    config = small_config("ensemble.members=2", "cluster.gather_timeout=60")
    moved = [time.monotonic()]

    with pytest.raises(NonFiniteLossError, match="member 1: the gradient norm is nan in epoch 1, iteration 3"):
        eat_dist.cluster.train.train_on_ray(
            config,
            num_classes=5,
            run_folder=Folder.at(tmp_path),
            on_iteration=lambda ensemble: moved.append(time.monotonic()),
        )

    assert len(moved) > 1
    assert time.monotonic() - moved[-1] < config.cluster.gather_timeout / 3


# A member that is stopped stands still without closing its connections: a machine that hangs, or has lost its network.
STOP_AFTER = (12, 42)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_stopped_member_is_named_and_after_the_timeout_replaced_and_changes_no_weight(
    tmp_path: Path, ray_session: None
) -> None:
    """Slow: the others wait for a late member, and for one that never comes back the whole timeout.

    The first time it goes on as soon as it is named, the second time never.
    """
    from eat_dist.cluster.train import train_on_ray

    config = small_config("train.epochs=20", "attack.num_steps=10", "name=stopped", "cluster.gather_timeout=45")
    train_locally(config, tmp_path / "undisturbed")
    stopped: list[int] = []
    notices: list[str] = []

    def on_iteration(ensemble: EnsembleStatistics) -> None:
        if len(stopped) < len(STOP_AFTER) and ensemble.iteration >= STOP_AFTER[len(stopped)]:
            stopped.append(member_processes()[-1].pid)
            os.kill(stopped[-1], signal.SIGSTOP)

    def on_notice(notice: str) -> None:
        notices.append(notice)
        if len(stopped) == 1 and "keeps the others waiting" in notice:
            os.kill(stopped[0], signal.SIGCONT)

    results = train_on_ray(
        config,
        num_classes=5,
        run_folder=Folder.at(tmp_path / "disturbed"),
        on_iteration=on_iteration,
        on_notice=on_notice,
    )

    late = [notice for notice in notices if "keeps the others waiting" in notice]
    assert len(late) == len(stopped) == len(STOP_AFTER)
    assert all(f"(process {pid}) keeps the others" in line for pid, line in zip(stopped, late, strict=True))
    first_restart = next(number for number, notice in enumerate(notices) if "restart 1" in notice)
    assert notices.index(late[0]) < first_restart, "it was only named"
    assert results[0].resumed_from >= STOP_AFTER[1] - STOP_AFTER[1] % 5
    assert not psutil.pid_exists(stopped[1]), "it would hold its GPU"
    assert largest_difference(weights(tmp_path / "undisturbed"), weights(tmp_path / "disturbed")) == 0
