"""MLflow as a view of a run: written from the driver by one background thread, and never needed.

A store that hangs, dies or was never there costs one warning; the metrics are in the run folder anyway.
MLflow's global URI and active run are not touched: the client has its own URI, each call names the run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import sqlite3
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from eat_dist.config import RunConfig
from eat_dist.tracking.sending import (
    METRICS_PER_REQUEST,
    PARAM_LENGTH,
    MetricValue,
    flattened,
    send_file,
    send_metrics,
    send_model,
    send_params,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

QUEUE_RECORDS = 10_000
"""Calls kept while the store does not answer; then the oldest is lost for each new one."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds between attempts during an outage; they double."""
CLOSING_ATTEMPTS = 2
"""Failures in a row after which :meth:`Tracker.close` takes the store for dead."""

_SILENT = "MLflow at %s does not answer (%s): training goes on, all metrics are in the run folder"
_REFUSED = "MLflow at %s did not take %s (%s): it is left out there"
_UNKNOWN = "MLflow at %s does not have the run %s that is resumed: a new one is started there"
_LOST = "MLflow at %s did not get %s of this run's records: all metrics are in the run folder"

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default, 7 with growing pauses, blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",  # else importing mlflow asks its makers' host for a configuration
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # a fresh sqlite file costs lines of INFO on its tables
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to the command line
}

_Send = Callable[[Any, str], None]  # with the client and the run's id


class _Record(NamedTuple):
    """A call on its way to the store; metrics lie bare so that several calls can share a request."""

    what: str
    send: _Send | None
    metrics: tuple[MetricValue, ...]


class Tracker:
    """One MLflow run, made with :meth:`start`.

    No method raises because of MLflow; only :meth:`start` and :meth:`close` wait for it, for a limited time.
    Records are sent in order by a daemon thread. When one fails, the store is asked for the run. If it does
    not answer, the record is tried again after 5 to 60 s; if it does, the record itself is at fault and is
    left out after a second failure.

    Attributes:
        uri: The store, None where tracking is disabled.
        run_id: None until the store has answered, so read it again whenever you save it.
    """

    def __init__(self, uri: str | None, *, experiment: str, run_name: str, tags: Mapping[str, str]) -> None:
        self.uri = uri
        self.run_id: str | None = None
        self._experiment, self._run_name, self._tags = experiment, run_name, dict(tags)
        self._client: Any = None
        self._queue: deque[_Record] = deque()
        self._changed = threading.Condition()
        self._owed = 0  # records handed over and not arrived; what was dropped or refused stays owed
        self._warned: set[str] = set()
        self._answered = threading.Event()  # well or badly: start() need not wait any longer
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        self._arrived = True

    @classmethod
    def start(
        cls,
        config: RunConfig,
        *,
        run_name: str,
        tags: Mapping[str, str],
        resume_run_id: str | None,
        parent_run_id: str | None = None,
        wait: float = 15.0,
    ) -> Tracker:
        """Create a run, or go on with an earlier one.

        The store is ``config.tracking.uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working
        folder. Artifacts of a sqlite store lie in ``mlartifacts`` beside it. What ``_ENVIRONMENT`` lists
        (HTTP retries and timeout, telemetry, log lines) is set for the process where it is not set yet.

        Args:
            config: Its section ``tracking``.
            run_name: Shown by MLflow.
            tags: Of the run, e.g. :func:`git_state`.
            resume_run_id: Continue this run; one the store does not have costs a warning and a new run.
            parent_run_id: MLflow shows the run below this one.
            wait: Seconds to wait for the store's first answer, which gives ``run_id``.
        """
        tracking = config.tracking
        if parent_run_id is not None:
            tags = {**tags, "mlflow.parentRunId": parent_run_id}
        uri = _store_uri(tracking.uri) if tracking.enabled else None
        tracker = cls(uri, experiment=tracking.experiment, run_name=run_name, tags=tags)
        tracker.run_id = resume_run_id if tracking.enabled else None
        if tracking.enabled:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            tracker._thread = threading.Thread(target=tracker._work, name="mlflow-tracker", daemon=True)
            tracker._add("the run", lambda client, run_id: None)
            tracker._thread.start()
            tracker._answered.wait(wait)
        return tracker

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step; NaN and infinities are left out (MLflow's stores treat them differently)."""
        now = time.time_ns() // 1_000_000
        values = ((name, float(value), now, step) for name, value in metrics.items())
        if finite := tuple(value for value in values if math.isfinite(value[1])):
            self._add("metrics", metrics=finite)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; sections become ``section.key``, values text of at most 500 characters.

        MLflow's params cannot change: a resumed run keeps the first values, and the tag ``changed_on_resume``
        lists the others.
        """
        flat = {name: shortened(str(value), PARAM_LENGTH) for name, value in flattened(params)}
        self._add("params", lambda client, run_id: send_params(client, run_id, flat))

    def log_text(self, text: str, artifact_path: str) -> None:
        """Store a text as a file, e.g. the resolved config under ``config.yaml``."""
        self.log_artifact_bytes(text.encode(), artifact_path)

    def log_figure(self, figure: Figure, artifact_path: str) -> None:
        """Store a matplotlib figure as PNG; it is drawn before the call returns."""
        if self._thread is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            self.log_artifact_bytes(buffer.getvalue(), artifact_path)

    def log_artifact_bytes(self, content: bytes, path: str) -> None:
        """Store a file in the run's artifacts under ``path`` (relative, with ``/``)."""
        self._add(path, lambda client, run_id: send_file(client, run_id, content, PurePosixPath(path)))

    def log_ensemble(self, model_folder: str, input_shape: tuple[int, int, int]) -> None:
        """Log the ensemble as the model ``ensemble`` (``runs:/RUN_ID/ensemble``).

        Args:
            model_folder: Local folder that :func:`eat_dist.models.save_ensemble` wrote. It is read in the
                background and must stay until :meth:`close` has returned.
            input_shape: (C, H, W) of an image.
        """
        self._add("the model", lambda client, run_id: send_model(client, run_id, model_folder, input_shape))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"], timeout: float = 30.0) -> bool:
        """Send what is left and end the run.

        Args:
            status: What MLflow shows.
            timeout: Longest wait in seconds; it is much shorter where the store refuses connections.

        Returns:
            Whether all that was ever logged arrived; if not, one warning has said how much is missing.
        """
        if self._thread is None or self._closing.is_set():
            return self._arrived
        self._add("the status", lambda client, run_id: client.set_terminated(run_id, status))
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout)
        self._abandoned.set()
        self._arrived = self._owed == 0
        if not self._arrived:
            self._warn_once("lost", _LOST, str(self._owed))
        return self._arrived

    def _add(self, what: str, send: _Send | None = None, *, metrics: tuple[MetricValue, ...] = ()) -> None:
        if self._thread is None or self._closing.is_set():
            return
        with self._changed:
            if len(self._queue) >= QUEUE_RECORDS:
                self._queue.popleft()
            self._queue.append(_Record(what, send, metrics))
            self._owed += 1
            self._changed.notify_all()

    def _work(self) -> None:
        with contextlib.suppress(_StoreDeadError):
            while records := self._next():
                self._deliver(records)

    def _next(self) -> list[_Record]:
        """The next record, or as many metrics as one request holds; empty when closed and all is sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing.is_set())
            records = [self._queue.popleft()] if self._queue else []
            size = len(records[0].metrics) if records else 0
            while size and self._queue and self._queue[0].metrics:
                size += len(self._queue[0].metrics)
                if size > METRICS_PER_REQUEST:
                    break
                records.append(self._queue.popleft())
            return records

    def _deliver(self, records: Sequence[_Record]) -> None:
        """Try until the records arrive or are refused.

        Raises:
            _StoreDeadError: The tracker is closing and the store does not answer.
        """
        pause, closing_attempts, refused = FIRST_PAUSE, 0, False
        while (error := self._attempt(records)) is not None:
            if self._abandoned.is_set():  # close() has said what is missing
                raise _StoreDeadError
            if self._run_is_there():
                if len(records) > 1:  # one bad name must not take the others with it
                    for record in records:
                        self._deliver([record])
                    return
                if refused:
                    self._warn_once("refused", _REFUSED, records[0].what, _reason(error))
                    return
                refused = True
                continue
            self._warn_once("silent", _SILENT, _reason(error))
            self._answered.set()
            if self._closing.is_set():
                closing_attempts += 1
                if closing_attempts == CLOSING_ATTEMPTS:
                    raise _StoreDeadError
                time.sleep(1)
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _attempt(self, records: Sequence[_Record]) -> Exception | None:
        try:
            if self._client is None:
                self._open()
                self._answered.set()
            send = records[0].send
            if send is None:
                send_metrics(self._client, str(self.run_id), [record.metrics for record in records])
            else:
                send(self._client, str(self.run_id))
        except Exception as error:  # whatever MLflow, its database drivers and artifact stores raise
            return error
        with self._changed:
            self._owed -= len(records)
        return None

    def _open(self) -> None:
        _quiet_mlflow()
        if self.uri is not None and (database := _sqlite_file(self.uri)) is not None:
            _check_writable(database)
        from mlflow import MlflowClient  # noqa: PLC0415  (takes seconds, and only where tracking is on)

        client = MlflowClient(tracking_uri=self.uri)
        run_id = self.run_id
        if run_id is not None and not _reopen(client, run_id, self._tags):
            self._warn_once("unknown", _UNKNOWN, run_id)
            run_id = None
        if run_id is None:
            experiment = _experiment_id(client, self._experiment, str(self.uri))
            run_id = client.create_run(experiment, run_name=self._run_name, tags=self._tags).info.run_id
        self.run_id, self._client = run_id, client

    def _run_is_there(self) -> bool:
        try:
            return self._client is not None and self._client.get_run(self.run_id) is not None
        except Exception:  # as above
            return False

    def _warn_once(self, kind: str, message: str, *details: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning(message, _redacted(self.uri or ""), *details)


class _StoreDeadError(Exception):
    """The tracker is closing and its store does not answer."""


def _store_uri(configured: str | None) -> str:
    default = f"sqlite:///{Path.cwd().as_posix()}/mlflow.db"
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or default


def _sqlite_file(uri: str) -> Path | None:
    scheme, _, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]).absolute() if scheme == "sqlite" else None


def _check_writable(database: Path) -> None:
    # MLflow itself would try for minutes, with a warning each time.
    database.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def _experiment_id(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    if (experiment := client.get_experiment_by_name(name)) is None:
        database = _sqlite_file(uri)
        location = None if database is None else (database.parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            # Another run that started at the same time was quicker.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id)


def _reopen(client: Any, run_id: str, tags: Mapping[str, str]) -> bool:
    from mlflow.entities import RunTag  # noqa: PLC0415
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
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)
    return True


def _redacted(text: str) -> str:
    """Without the password of an URL: warnings end up in files that are shared."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def _reason(error: BaseException) -> str:
    """The system's word where there is one: what MLflow and its HTTP client wrap around it fills a screen."""
    cause: BaseException | None = error
    while cause is not None:
        error = cause if isinstance(cause, OSError) else error
        cause = cause.__cause__ or cause.__context__
    return _redacted(shortened(" ".join(str(error).split()) or type(error).__name__, 200))


def _is_not_a_retry_of_mlflow(record: logging.LogRecord) -> bool:
    return "/mlflow" not in record.getMessage()


def _quiet_mlflow() -> None:
    # urllib3 would warn at every attempt during an outage, MLflow of every model without an example.
    logging.getLogger("urllib3.connectionpool").addFilter(_is_not_a_retry_of_mlflow)
    warnings.filterwarnings("ignore", message=".*An input example was not provided", category=UserWarning)
    if "mlflow" in sys.modules and os.environ.get("MLFLOW_LOGGING_LEVEL") == _ENVIRONMENT["MLFLOW_LOGGING_LEVEL"]:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # imported before the variable was set
