"""Ensembles that an MLflow store holds, fetched as files. Nothing of a model is ever unpickled."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from eat_dist.credentials import redacted
from eat_dist.errors import StorageError
from eat_dist.tracking.sending import newest_model
from eat_dist.tracking.store import open_existing, reason, store_uri

_FORMS = "runs:/RUN_ID/ensemble, models:/NAME/VERSION, models:/NAME@ALIAS or models:/MODEL_ID"
_LOADER = "eat_dist.pyfunc_model"


def fetch_ensemble(model_uri: str, destination: str | os.PathLike[str], *, tracking_uri: str | None) -> str:
    """Fetch an ensemble that :meth:`~eat_dist.tracking.Tracker.log_ensemble` logged.

    Its ``MLmodel`` file is fetched first, and the weights only if it says that the model is one of ours. MLflow's
    global URIs are not touched. What the tracker sets in the process's environment is set here, too, where it is not
    set yet (HTTP retries and timeout, telemetry, log lines), so that a dead server is found out in seconds.

    Args:
        model_uri: ``runs:/RUN_ID/ensemble``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or ``models:/MODEL_ID``.
        destination: A folder that is there; it is filled.
        tracking_uri: The store; None: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder.

    Returns:
        The folder in ``destination`` that :func:`eat_dist.models.load_ensemble` reads.

    Raises:
        StorageError: The store does not answer or does not have it, or it is a model of another making.
    """
    uri = store_uri(tracking_uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    client = open_existing(uri, purpose=f"to fetch '{model_uri}' from")
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: PLC0415

    try:
        location = _location(client, model_uri)
        files = get_artifact_repository(location, tracking_uri=uri, registry_uri=uri)
        about = Path(files.download_artifacts("MLmodel", str(destination))).read_text(encoding="utf-8")
        return str(files.download_artifacts(_data_path(about, model_uri), str(destination)))
    except StorageError:
        raise
    except Exception as error:  # whatever MLflow, its database drivers and artifact stores raise
        raise StorageError(f"cannot fetch '{model_uri}' from MLflow at {redacted(uri)}: {reason(error)}") from error


def _location(client: Any, model_uri: str) -> str:
    """Where the model's files are: a folder or URL."""
    if found := re.fullmatch(r"runs:/([^/]+)/(.+?)/?", model_uri):
        return _location_in_run(client, *found.groups())
    if found := re.fullmatch(r"models:/([^/@]+)", model_uri):
        return str(client.get_logged_model(found[1]).artifact_location)
    if found := re.fullmatch(r"models:/([^/]+)/(\d+)", model_uri):
        name, version = found.groups()
    elif found := re.fullmatch(r"models:/([^/]+)@([^/@]+)", model_uri):
        name, version = found[1], client.get_model_version_by_alias(*found.groups()).version
    else:
        raise StorageError(f"'{model_uri}' is no URI of an MLflow model; expected {_FORMS}")
    location = str(client.get_model_version_download_uri(name, version))
    # A version registered from another URI may give that back.
    return _location(client, location) if location.startswith(("runs:/", "models:/")) else location


def _location_in_run(client: Any, run_id: str, name: str) -> str:
    model = newest_model(client, run_id, name)
    if model is None:
        models = [client.get_logged_model(output.model_id) for output in client.get_run(run_id).outputs.model_outputs]
        there = ", ".join(sorted({f"'{model.name}'" for model in models})) or "none"
        raise StorageError(f"the MLflow run {run_id} has no model '{name}'; its models: {there}")
    return str(model.artifact_location)


def _data_path(about: str, model_uri: str) -> str:
    """Where below the model an ensemble's folder is, by its ``MLmodel``.

    Raises:
        StorageError: It is a model of another making.
    """
    content = yaml.safe_load(about)
    flavors = content.get("flavors", {}) if isinstance(content, dict) else {}
    ours = flavors.get("python_function", {})
    if ours.get("loader_module") != _LOADER:
        raise StorageError(
            f"'{model_uri}' is a model of MLflow's flavour {' and '.join(sorted(flavors)) or 'none'} "
            f"(loader {ours.get('loader_module', 'none')}), which MLflow would unpickle; only ensembles that eat-dist "
            f"logged are read. Load it in a function of yours and give module:function."
        )
    path = PurePosixPath(str(ours.get("data")))
    if path.is_absolute() or ".." in path.parts:
        raise StorageError(f"'{model_uri}' is damaged: its MLmodel names files outside of the model ('{path}')")
    return str(path)
