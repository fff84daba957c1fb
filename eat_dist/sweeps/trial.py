"""One trial, in a process of its own on the cluster: trained to a rung, measured, reported, and so on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from eat_dist import __version__
from eat_dist.cluster.train import train_on_ray
from eat_dist.config import RunConfig, parse_config
from eat_dist.console import Console
from eat_dist.data.images import ZeroShotData
from eat_dist.data.load import load_dataset
from eat_dist.member import MemberResult
from eat_dist.provenance import git_state
from eat_dist.runs.checks import digests, splits_of
from eat_dist.runs.evaluation import Subject, evaluate_subject, evaluation_folder
from eat_dist.runs.run import complete_ensemble
from eat_dist.runs.starting import write_first_files
from eat_dist.runs.summary import figures_of, summary_of_training, summary_with
from eat_dist.storage import Folder
from eat_dist.sweeps.objectives import Objective, values_of

_RESULT = "result.json"


def rung_folder(folder: Folder, epoch: int) -> Folder:
    """What a trial measured after an epoch."""
    return folder.child(f"rungs/{epoch:04d}")


def run_trial(
    task: Mapping[str, Any],
    report: Callable[[Mapping[str, Any]], None],
    *,
    rungs: tuple[int, ...],
    objective: Objective,
) -> None:
    """Train to each rung, measure on the validation classes, and report.

    Called again, after a death or in a resumed sweep, it goes on from the newest checkpoint of its folder, and what was
    measured is not measured again.

    Args:
        task: ``id``; ``config``, the whole run as YAML; ``folder``, path or URL; ``reported``, epochs already on
            record; ``mlflow_run_id``; ``working_folder``, where the user is.
        report: Takes ``epoch`` and the numbers; does not return where the trial is stopped.
        rungs: Epochs, rising; the last is the run's.
        objective: What is made of the figures.

    Raises:
        EatError: The trial cannot go on, in one line.
    """
    config = parse_config(yaml.safe_load(task["config"]))
    # What the user named relative to his folder is not beside Ray's own.
    if os.path.isdir(task["working_folder"]):
        os.chdir(task["working_folder"])
    folder = Folder.at(task["folder"])
    data = load_dataset(config.data)
    write_first_files(folder, config, data, splits_of(config, data))
    folder.write_json("run.json", _about(config, folder, data) | {"mlflow_run_id": task["mlflow_run_id"]})
    for epoch in rungs:
        figures = _measured(folder, config, data, epoch=epoch, task=task)
        if epoch > task["reported"]:
            report({"epoch": epoch, "figures": figures, **values_of(objective, figures)})


def _measured(
    folder: Folder, config: RunConfig, data: ZeroShotData, *, epoch: int, task: Mapping[str, Any]
) -> dict[str, float]:
    """The figures after an epoch: found, or trained for and measured."""
    here = rung_folder(folder, epoch)
    if here.exists(_RESULT):
        found: dict[str, float] = here.read_json(_RESULT)["figures"]
        return found
    begin = time.perf_counter()
    results = train_on_ray(
        config,
        num_classes=data.train.num_classes,
        run_folder=folder,
        mlflow_run_id=task["mlflow_run_id"],
        until_epoch=epoch,
    )
    trained = time.perf_counter()
    _, digest = complete_ensemble(folder, config, data)
    is_last = epoch == config.train.epochs
    measured = evaluate_subject(
        Subject(str(folder), config),
        evaluation_folder(folder, config) if is_last else here.child(config.evaluation.protocol),
        workers=1,
        command=f"eat-dist evaluate {folder} --protocol {config.evaluation.protocol}",
        console=Console(),
    )
    figures = figures_of(measured["ensemble"])
    seconds = {"training": round(trained - begin, 3), "evaluation": round(time.perf_counter() - trained, 3)}
    if is_last:
        _write_summary(folder, config, data, results, measured, seconds=trained - begin, digest=digest, task=task)
    here.write_json(_RESULT, {"epoch": epoch, "figures": figures, "seconds": seconds, "weights_sha256": digest})
    return figures


def _write_summary(
    folder: Folder,
    config: RunConfig,
    data: ZeroShotData,
    results: list[MemberResult],
    measured: dict[str, Any],
    *,
    seconds: float,
    digest: str,
    task: Mapping[str, Any],
) -> None:
    """A finished trial is a finished run."""
    summary = summary_of_training(
        config,
        folder,
        results,
        seconds=seconds,
        weights_sha256=digest,
        classes=data.train.num_classes,
        skipped=data.skipped,
        mlflow_run_id=task["mlflow_run_id"],
    )
    folder.write_json("summary.json", summary_with(summary, config, measured))


def _about(config: RunConfig, folder: Folder, data: ZeroShotData) -> dict[str, Any]:
    git = git_state(Path.cwd())
    tags = {"defense": config.defense.name, "dataset": config.data.dataset, "backbone": config.model.backbone}
    tags |= {"run_folder": str(folder), "eat_dist": __version__} | {f"git.{name}": value for name, value in git.items()}
    return {"schema": 1, "eat_dist": __version__, "git": git, "tags": tags, "data": digests(data)}
