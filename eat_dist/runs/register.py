"""``eat-dist register``: the ensemble of a finished run as a version of a registered model."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from eat_dist.config import RunConfig, override
from eat_dist.errors import ConfigError, StorageError
from eat_dist.models.ensemble import load_spec
from eat_dist.runs.saved import config_of
from eat_dist.runs.summary import flat_figures, summary_of
from eat_dist.runs.target import names_run
from eat_dist.runs.tracked import log_figures, version_tags
from eat_dist.storage import Folder
from eat_dist.tracking import Status, Tracker
from eat_dist.tracking.reading import find_runs, register_logged


def register_run(run: str, name: str, *, tracking_uri: str | None) -> str:
    """Register a finished run's ensemble, with its origin and figures as tags.

    From a run folder it works also where MLflow never got the run: what is missing there is sent first.

    Args:
        run: A run folder, or the id of an MLflow run.
        name: Of the registered model; made where it is not there yet.
        tracking_uri: MLflow's store; None: the run's own, ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` here.

    Returns:
        ``models:/NAME/VERSION``.

    Raises:
        EatError: Anything the user can mend; one line.
    """
    if names_run(run):
        return _register_folder(Folder.at(run), name, tracking_uri)
    if not re.fullmatch(r"[0-9a-f]{32}", run):
        raise ConfigError(f"'{run}' is no run folder and no id of an MLflow run (32 hexadecimal digits)")
    [tracked, *_] = find_runs([run], tracking_uri=tracking_uri)
    tags = version_tags(tracked.metrics, tracked.tags)
    registered = register_logged(run, name, tags, tracking_uri=tracking_uri)
    if registered is None:
        folder = tracked.tags.get("run_folder", "RUN_DIR")
        raise StorageError(
            f"the MLflow run {run} ({tracked.status}) has no ensemble; if the run is finished, register its folder: "
            f"eat-dist register {folder} {name}"
        )
    return registered


def _register_folder(folder: Folder, name: str, tracking_uri: str | None) -> str:
    config = override(config_of(folder), "tracking.enabled=true")
    if not folder.exists("summary.json"):
        raise StorageError(f"'{folder}' is not a finished run (no summary.json); resume it first: --resume {folder}")
    config = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": tracking_uri or config.tracking.uri})}
    )
    summary, tags = summary_of(folder), folder.read_json("run.json").get("tags", {})
    known = summary.get("mlflow_run_id")
    registered = None
    if known is not None:
        of_version = version_tags(flat_figures(summary), tags)
        registered = register_logged(known, name, of_version, tracking_uri=config.tracking.uri)
    return registered or _send_and_register(folder, config, summary, tags, name=name)


def _send_and_register(
    folder: Folder, config: RunConfig, summary: dict[str, Any], tags: dict[str, str], *, name: str
) -> str:
    """For a run that MLflow does not have, or not whole."""
    known = summary.get("mlflow_run_id")
    tracker = Tracker.start(config, run_name=Path(folder.path).name, tags=tags, resume_run_id=known)
    status: Status = "FAILED"
    with tempfile.TemporaryDirectory() as copy:
        try:
            tracker.log_params(config.model_dump(mode="json"))
            tracker.log_text(folder.read("config.yaml").decode(), "config.yaml")
            tracker.log_text(folder.read("summary.json").decode(), "summary.json")
            log_figures(tracker, summary)
            model = folder.child("model")
            for file in model.names():
                Path(copy, file).write_bytes(model.read(file))
            tracker.log_ensemble(copy, load_spec(model).image_shape, digest=summary.get("weights_sha256"))
            tracker.register(name, version_tags(flat_figures(summary), tags))
            status = "FINISHED"
        finally:
            tracker.close(status)
    if tracker.run_id is not None and tracker.run_id != known:
        folder.write_json("summary.json", summary | {"mlflow_run_id": tracker.run_id})
    if tracker.registered is None:
        raise StorageError(f"'{name}' is not registered: MLflow did not take it (see the warning)")
    return tracker.registered
