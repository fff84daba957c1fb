"""One run of a study, in the study's process or in one of its own on the cluster: trained, evaluated, recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from eat_dist.config import parse_config
from eat_dist.console import Console
from eat_dist.runs import resume_or_start
from eat_dist.runs.lease import wait_for_the_dead
from eat_dist.storage import Folder

# What a run's process elsewhere is to know of this one's environment: where MLflow is, and who asks.
_PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)


def environment_for_mlflow() -> dict[str, str]:
    """This process's variables for :func:`run_task`. There are passwords among them: never to be written down."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def run_task(
    task: Mapping[str, Any],
    report: Callable[[Mapping[str, Any]], None],
    *,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Bring a run to its end, whatever an earlier attempt in its folder came to, and report that.

    Args:
        task: ``config``, the whole run as YAML; ``folder``, path or URL; ``parent_run_id``, MLflow's run of the study;
            ``working_folder``, where the user is.
        report: Takes ``epoch``.
        environment: Variables of the user's process, for one elsewhere that has them not. Not in ``task``, which Ray
            Tune writes into its files.

    Raises:
        EatError: The run cannot go on, in one line.
    """
    config = parse_config(yaml.safe_load(task["config"]))
    # What the user named relative to his folder is not beside Ray's own.
    if os.path.isdir(task["working_folder"]):
        os.chdir(task["working_folder"])
    for name, value in (environment or {}).items():
        os.environ.setdefault(name, value)
    wait_for_the_dead(Folder.at(task["folder"]))
    resume_or_start(config, run_dir=task["folder"], console=Console(), parent_run_id=task["parent_run_id"])
    report({"epoch": config.train.epochs})
