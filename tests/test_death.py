"""A process that is killed in the middle of an epoch costs time, and no number."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from eat_dist.config import RunConfig
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
