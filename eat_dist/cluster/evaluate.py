"""Evaluating on the cluster's GPUs, where the driver may have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import torch
import yaml

from eat_dist.cluster.session import connect, nodes
from eat_dist.config import RunConfig, dump_config, parse_config
from eat_dist.errors import EatError
from eat_dist.evaluation.of_run import evaluate_run
from eat_dist.storage import Folder


def evaluate_on_gpu_worker(config: RunConfig, folder: Folder, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Evaluate in a task that holds a GPU; None where the cluster has none and the driver does it as well itself."""
    if config.cluster.device == "cpu":
        return None
    connect(config.cluster)
    if not sum(node.gpus for node in nodes()):
        return None
    share = min(config.cluster.gpus_per_member, 1.0)
    say(f"Evaluating on a worker with {share:g} GPU; finished attacks are kept in {folder}/evaluation.")
    task = ray.remote(num_gpus=share, num_cpus=0, max_retries=config.cluster.max_restarts)(_evaluate)
    try:
        results: dict[str, Any] = ray.get(task.remote(dump_config(config), str(folder)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EatError):
            raise error.cause from None
        raise
    return results


def _evaluate(config: str, folder: str) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate_run(Folder.at(folder), parse_config(yaml.safe_load(config)), device=device)
