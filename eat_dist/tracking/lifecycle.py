"""The beginning, continuation and end of a run in MLflow's store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from eat_dist.errors import StorageError
from eat_dist.tracking.sending import send_tags
from eat_dist.tracking.store import open_existing, sqlite_file, store_uri, trouble

_log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow shows a run beneath another."""

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words: well; by a fault; stopped by somebody (Ctrl-C, a scheduler that pruned it)."""

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # opens as runs and charts, not as traces of prompts
_UNDER_WAY = ("RUNNING", "SCHEDULED")


def create_run(client: Any, experiment: str, name: str, tags: Mapping[str, str], *, uri: str) -> str:
    """Create a run, and its experiment where that is not there; its id. May raise anything that MLflow raises."""
    return str(client.create_run(_experiment_id(client, experiment, uri), run_name=name, tags=dict(tags)).info.run_id)


def reopen_run(client: Any, run_id: str, tags: Mapping[str, str]) -> bool:
    """Go on with a run; False where the store does not have it, or has deleted it."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise
    if run.info.lifecycle_stage == "deleted":
        return False
    client.update_run(run_id, status="RUNNING")
    send_tags(client, run_id, tags)
    return True


def end_run(uri: str | None, run_id: str | None, status: Status) -> bool:
    """End a run whose own process is dead or was stopped, so that it is not RUNNING for ever. Never raises.

    A run that has ended already, by itself or by an earlier call, keeps its status.

    Args:
        uri: The store; None: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder.
        run_id: The run; with None, of a run that MLflow never knew, nothing is done.
        status: ``KILLED`` for one that was pruned or interrupted, ``FAILED`` for one that died.

    Returns:
        Whether the run has ended now; if not, a warning has said why.
    """
    if run_id is None:
        return False
    store = store_uri(uri)
    try:
        client = open_existing(store, purpose=f"to end the run {run_id} in")
        if client.get_run(run_id).info.status in _UNDER_WAY:
            client.set_terminated(run_id, status)
    except StorageError as error:
        _log.warning("the run %s keeps its status: %s", run_id, error)
        return False
    except Exception as error:  # whatever MLflow and its database drivers raise
        _log.warning("the run %s keeps its status: %s", run_id, trouble(store, error))
        return False
    return True


def _experiment_id(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    if (experiment := client.get_experiment_by_name(name)) is None:
        database = sqlite_file(uri)
        location = None if database is None else (database.parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=_KIND))
        except MlflowException as error:
            # Another run that started at the same time was quicker.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id)
