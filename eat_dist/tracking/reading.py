"""Runs read back from an MLflow store."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from eat_dist.credentials import redacted
from eat_dist.errors import StorageError
from eat_dist.tracking.lifecycle import PARENT_TAG
from eat_dist.tracking.sending import newest_model, register_model
from eat_dist.tracking.store import open_existing, store_uri, trouble

PAGE = 200
"""Runs asked for at once; each brings all its params, tags and latest metrics."""
_NAMED_AT_MOST = 10
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow has it.

    Attributes:
        run_id: MLflow's.
        name: Shown by MLflow.
        status: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED`` or ``SCHEDULED``.
        parent: The id of the run that it is a trial of.
        started: Milliseconds since 1970.
        last_news: Milliseconds since 1970 of the newest metric; of the start where there is none.
        params: Flat, as text.
        tags: MLflow's own included.
        metrics: The latest value of each.
    """

    run_id: str
    name: str
    status: str
    parent: str | None
    started: int
    last_news: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


def find_runs(references: Sequence[str], *, tracking_uri: str | None, last: int | None = None) -> list[TrackedRun]:
    """The runs that are meant, each once, newest first within a reference.

    Args:
        references: Names or ids of experiments (all their runs), or ids of runs (with their children).
        tracking_uri: The store; None: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder.
        last: Of an experiment, only that many runs, the newest; their children besides.

    Raises:
        StorageError: The store does not answer, or has no such experiment or run; the message names the nearest.
    """
    uri = store_uri(tracking_uri)
    client = open_existing(uri, purpose="to find runs in")
    found: dict[str, TrackedRun] = {}
    try:
        for reference in references:
            found |= {run.run_id: run for run in _find(client, reference, uri=uri, last=last)}
    except StorageError:
        raise
    except Exception as error:  # whatever MLflow and its database drivers raise
        raise StorageError(trouble(uri, error)) from error
    return list(found.values())


def register_logged(run_id: str, name: str, tags: Mapping[str, str], *, tracking_uri: str | None) -> str | None:
    """Register the ensemble that a run has logged; the same weights of one run are one version.

    Returns:
        ``models:/NAME/VERSION``; None where the run is not there or has no model.

    Raises:
        StorageError: The store does not answer, or refuses.
    """
    uri = store_uri(tracking_uri)
    client = open_existing(uri, purpose=f"to register '{name}' in")
    try:
        if _run(client, run_id) is None or newest_model(client, run_id) is None:
            return None
        return register_model(client, run_id, name, tags)
    except Exception as error:  # as above
        raise StorageError(f"'{name}' is not registered: {trouble(uri, error)}") from error


def _find(client: Any, reference: str, *, uri: str, last: int | None) -> list[TrackedRun]:
    experiment = client.get_experiment_by_name(reference)
    if experiment is None and _RUN_ID.fullmatch(reference):
        run = _run(client, reference)
        if run is None:
            raise StorageError(f"MLflow at {redacted(uri)} has no run {reference}")
        children = f"tags.`{PARENT_TAG}` = '{reference}'"
        return [run, *_search(client, run.tags["experiment_id"], children)]
    if experiment is None and reference.isdigit():
        experiment = _experiment(client, reference)
    if experiment is None:
        _unknown(client, reference, uri)
    if experiment.lifecycle_stage == "deleted":
        raise StorageError(f"the experiment '{experiment.name}' is deleted in MLflow at {redacted(uri)}; restore it")
    return _search(client, experiment.experiment_id, "", last=last)


def _search(client: Any, experiment_id: str, filter_string: str, *, last: int | None = None) -> list[TrackedRun]:
    """All runs that fit, newest first; with ``last`` that many and their children."""
    found: list[TrackedRun] = []
    token, parents = None, 0
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string,
            max_results=PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for entry in page:
            run = _tracked(entry)
            found.append(run)
            parents += run.parent is None
            if parents == last:  # children are younger than their parent: all of them have been seen
                kept = {run.run_id for run in found if run.parent is None}
                return [run for run in found if run.parent is None or run.parent in kept]
        token = page.token
        if not token:
            return found


def _tracked(run: Any) -> TrackedRun:
    # The latest value of each metric comes with its time, which MLflow keeps from its public view of a run.
    times = [metric.timestamp for metric in getattr(run.data, "_metric_objs", ())]
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        parent=run.data.tags.get(PARENT_TAG),
        started=run.info.start_time,
        last_news=max([run.info.start_time, *times]),
        params=dict(run.data.params),
        tags=dict(run.data.tags) | {"experiment_id": run.info.experiment_id},
        metrics=dict(run.data.metrics),
    )


def _run(client: Any, run_id: str) -> TrackedRun | None:
    """The run, if the store has it and has not deleted it."""
    run = _or_none(client.get_run, run_id)
    return None if run is None or run.info.lifecycle_stage == "deleted" else _tracked(run)


def _experiment(client: Any, experiment_id: str) -> Any | None:
    return _or_none(client.get_experiment, experiment_id)


def _or_none(ask: Any, identifier: str) -> Any | None:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        return ask(identifier)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _unknown(client: Any, reference: str, uri: str) -> NoReturn:
    names = [experiment.name for experiment in client.search_experiments(max_results=1000)]
    nearest = difflib.get_close_matches(reference, names, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    listed = ", ".join(f"'{name}'" for name in names[:_NAMED_AT_MOST]) + (", …" if len(names) > _NAMED_AT_MOST else "")
    raise StorageError(
        f"'{reference}' is no run folder, and no experiment or run of MLflow at {redacted(uri)}; experiments there: "
        f"{listed or 'none'}.{hint}"
    )
