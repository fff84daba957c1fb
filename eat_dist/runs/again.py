"""``eat-dist evaluate``: a target measured by a protocol, and where the figures go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eat_dist import __version__
from eat_dist.config import RunConfig, dump_config, load_config, override
from eat_dist.console import Console
from eat_dist.errors import ConfigError, StorageError
from eat_dist.inference.table import NONE
from eat_dist.provenance import git_state
from eat_dist.runs.checks import check_names, check_unseen, with_absolute_paths, with_data_prepared
from eat_dist.runs.evaluation import Subject, evaluate_subject, evaluation_folder
from eat_dist.runs.lease import check_not_held, holding
from eat_dist.runs.saved import config_of
from eat_dist.runs.summary import summary_of, summary_with
from eat_dist.runs.target import names_run, names_weights
from eat_dist.runs.tracked import dataset_record, log_figures
from eat_dist.storage import Folder
from eat_dist.tracking import Status, Tracker


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation.

    Attributes:
        folder: The run folder, or one of the same form for a model that is no run, or a run behind another defense.
        results: The content of ``evaluation/PROTOCOL/summary.json``.
        config: What was measured with.
        tracking_uri: MLflow's store, None where tracking is off.
        mlflow_run_id: None where MLflow never answered.
    """

    folder: Folder
    results: dict[str, Any]
    config: RunConfig
    tracking_uri: str | None
    mlflow_run_id: str | None


def evaluate_target(
    target: str,
    *,
    config_file: Path | None,
    assignments: Sequence[str],
    output: str | None,
    normalise: bool,
    other: str | None,
    workers: int,
    command: str,
    console: Console,
) -> Evaluated:
    """Evaluate a run again, or anybody's model; finished attacks are not repeated.

    A run behind another defense at inference than its own is measured into a folder of its own below the run's,
    ``inference/NAME``, and sent to an MLflow run beneath the run's: the run's own figures stay what they are.

    Args:
        target: As :func:`eat_dist.runs.target.open_target` takes it.
        config_file: YAML with data, evaluation and attack; not for a run, which has its own.
        assignments: ``section.key=value``, over the run's or the file's.
        output: Folder for the results of a model that is no run; default ``evaluations/NAME``.
        normalise: Scale a foreign model's embeddings to length 1.
        other: Another target, on which transfer attacks are crafted.
        workers: Ray workers; 1: this process.
        command: Recorded in the results.
        console: Where progress goes.

    Raises:
        EatError: Anything the user can mend; one line.
    """
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1; got {workers}")
    run = Folder.at(target) if names_run(target) else None
    if run is not None and (config_file is not None or output is not None):
        raise ConfigError("a run has its own config and folder; leave out --config and --output")
    if run is None and config_file is None and names_weights(target):
        raise ConfigError(f"'{target}' is weights alone; give the YAML with their section 'model' with --config")
    config = load_config(config_file, []) if run is None else config_of(run)
    if config.evaluation.protocol == "none":  # said of the end of a training; who evaluates wants figures
        config = override(config, "evaluation.protocol=quick")
    for assignment in assignments:
        config = override(config, assignment)
    if config.evaluation.protocol == "none":
        raise ConfigError("evaluation.protocol=none measures nothing; give --protocol quick, standard or full")
    check_names(config)
    before = {"name": ""} if run is None else _summary_before(run, config)
    behind = config.inference.name
    own = run is None or config_of(run).inference == config.inference
    folder = _folder_of(target, output, behind) if run is None else run if own else run.child(f"inference/{behind}")
    placed = with_data_prepared(with_absolute_paths(config), console)
    subject = Subject(target, placed, normalise=normalise, other=other)
    if run is not None:
        check_unseen(run, config_of(run).data, config.data, subject.test)
    check_not_held(folder)
    with holding(folder):
        results = evaluate_subject(
            subject, evaluation_folder(folder, config), workers=workers, command=command, console=console
        )
        if run is not None and summary_of(run)["weights_sha256"] != before["weights_sha256"]:
            raise StorageError(f"'{run}' was trained anew while it was measured; evaluate it again")
        if folder != run:  # only now: of what cannot be evaluated at all, nothing is left behind
            folder.write("config.yaml", dump_config(config).encode())
        parent = None if own else before["mlflow_run_id"]
        if run is None:
            before["name"] = Path(folder.path).name
        elif not own:
            earlier = summary_of(folder)["mlflow_run_id"] if folder.exists("summary.json") else None
            before |= {"name": f"{before['name']}-{behind}", "mlflow_run_id": earlier}
        summary = summary_with(before, config, results)
        uri, run_id = _track(subject, folder, summary, results, parent=parent)
        if run is not None:
            folder.write_json("summary.json", summary if own else summary | {"mlflow_run_id": run_id})
    return Evaluated(folder, results, config, uri, run_id)


def _summary_before(run: Folder, config: RunConfig) -> dict[str, Any]:
    """The run's summary; what would keep figures from being written or right is found out before the first attack."""
    if not run.exists("summary.json"):
        raise StorageError(f"'{run}' is not a finished run (no summary.json); resume it first: --resume {run.argument}")
    run.create()
    return summary_of(run)


def _track(
    subject: Subject, folder: Folder, summary: dict[str, Any], results: dict[str, Any], *, parent: str | None
) -> tuple[str | None, str | None]:
    """Send the figures to the run's own MLflow run, or to a new one, beneath ``parent`` if there is one."""
    config, run_id = subject.config, summary.get("mlflow_run_id")
    tags = {"dataset": config.data.dataset, "protocol": config.evaluation.protocol, "run_folder": str(folder)}
    tags |= {"target": results["target"]["name"], "eat_dist": __version__}
    tags |= {"inference": subject.opened.inference.name}
    tags |= {f"git.{name}": value for name, value in git_state(Path.cwd()).items()}
    tracker = Tracker.start(config, run_name=_run_name(folder), tags=tags, resume_run_id=run_id, parent_run_id=parent)
    status: Status = "FAILED"
    try:
        if run_id is None:
            tracker.log_params(config.model_dump(mode="json"))
            tracker.log_datasets([dataset_record(config.data, subject.test, subject.test.digest(), testing=True)])
        log_figures(tracker, summary)
        where = f"evaluation/{config.evaluation.protocol}"
        tracker.log_text(folder.read(f"{where}/summary.json").decode(), f"{where}/summary.json")
        status = "FINISHED"
    finally:
        tracker.close(status)
    return tracker.uri, tracker.run_id


def _folder_of(target: str, output: str | None, behind: str) -> Folder:
    """Of a model that is no run."""
    return Folder.at(output or f"evaluations/{_slug(target)}" + ("" if behind == NONE else f"-{behind}"))


def _run_name(folder: Folder) -> str:
    """The folder's name; of ``RUN/inference/NAME`` both names."""
    *_, run, parent, name = ("", "", *folder.path.rstrip("/").split("/"))
    return f"{run}-{name}" if parent == "inference" else name


def _slug(target: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", target).strip("-.") or "model"
