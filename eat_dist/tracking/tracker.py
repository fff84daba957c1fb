"""MLflow as a view of a run: written from the driver by one background thread, and never needed.

A store that hangs, dies or was never there costs one warning; the metrics are in the run folder anyway.
MLflow's global URI and active run are not touched: the client has its own URI, each call names the run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from eat_dist.config import RunConfig
from eat_dist.tracking.lifecycle import PARENT_TAG, Status, create_run, reopen_run
from eat_dist.tracking.sending import (
    METRICS_PER_REQUEST,
    PARAM_LENGTH,
    TAG_LENGTH,
    DatasetRecord,
    MetricValue,
    flattened,
    register_model,
    send_datasets,
    send_file,
    send_metrics,
    send_model,
    send_params,
    send_tags,
)
from eat_dist.tracking.store import (
    check_writable,
    open_client,
    prepare_environment,
    reason,
    redacted,
    shortened,
    sqlite_file,
    store_uri,
    trouble,
    version_note,
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

_SILENT = "%s: training goes on, all metrics are in the run folder"
_REFUSED = "MLflow at %s did not take %s (%s): it is left out there"
_UNKNOWN = "MLflow at %s does not have the run %s that is resumed: a new one is started there"
_LOST = "MLflow at %s did not get %s of this run's records: all metrics are in the run folder"

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
        registered: ``models:/NAME/VERSION``; None until :meth:`register` has been answered.
    """

    def __init__(self, uri: str | None, *, experiment: str, run_name: str, tags: Mapping[str, str]) -> None:
        self.uri = uri
        self.run_id: str | None = None
        self.registered: str | None = None
        self._experiment, self._run_name, self._tags = experiment, run_name, dict(tags)
        self._client: Any = None
        self._queue: deque[_Record] = deque()
        self._changed = threading.Condition()
        self._owed = 0  # records handed over and not arrived; what was dropped or refused stays owed
        self._silent = False  # an outage is on, and has been warned of
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
        folder. Artifacts of a sqlite store lie in ``mlartifacts`` beside it. What
        :data:`eat_dist.tracking.store.ENVIRONMENT` lists (HTTP retries and timeout, telemetry, log lines) is set for
        the process where it is not set yet.

        Args:
            config: Its section ``tracking``.
            run_name: Shown by MLflow.
            tags: Of the run, e.g. :func:`git_state`.
            resume_run_id: Continue this run; one the store does not have costs a warning and a new run.
            parent_run_id: The run of the sweep or study that this one is a trial of: MLflow shows it beneath.
            wait: Seconds to wait for the store's first answer, which gives ``run_id``.
        """
        tracking = config.tracking
        uri = store_uri(tracking.uri) if tracking.enabled else None
        if parent_run_id is not None:
            tags = {**tags, PARENT_TAG: parent_run_id}
        tracker = cls(uri, experiment=tracking.experiment, run_name=run_name, tags=tags)
        tracker.run_id = resume_run_id if tracking.enabled else None
        if tracking.enabled:
            prepare_environment()
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

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of at most 5000 characters, over those that the run has."""
        short = {name: shortened(value, TAG_LENGTH) for name, value in tags.items()}
        self._add("tags", lambda client, run_id: send_tags(client, run_id, short))

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

    def log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        """Log which images were used, in words and sums; a second time changes nothing."""
        self._add("the datasets", lambda client, run_id: send_datasets(client, run_id, datasets))

    def log_ensemble(self, model_folder: str, input_shape: tuple[int, int, int], *, digest: str | None = None) -> None:
        """Log the ensemble as the model ``ensemble`` (``runs:/RUN_ID/ensemble``).

        Args:
            model_folder: Local folder that :func:`eat_dist.models.save_ensemble` wrote. It is read in the
                background and must stay until :meth:`close` has returned.
            input_shape: (C, H, W) of an image.
            digest: Of the weights: a model that the run has already is not sent again.
        """
        self._add(
            "the model", lambda client, run_id: send_model(client, run_id, model_folder, input_shape, digest=digest)
        )

    def register(self, name: str, tags: Mapping[str, str]) -> None:
        """Make the ensemble that was logged a version of the registered model ``name``.

        The same weights of one run are one version, however often they are registered.

        Args:
            name: Of the registered model; made where it is not there yet.
            tags: Of the version.
        """

        def send(client: Any, run_id: str) -> None:
            self.registered = register_model(client, run_id, name, tags)

        self._add(f"the registration as '{name}'", send)

    def close(self, status: Status, timeout: float = 30.0) -> bool:
        """Send what is left and end the run.

        Args:
            status: What MLflow shows.
            timeout: Longest wait in seconds; it is much shorter where the store refuses connections.

        Returns:
            Whether all that was ever logged arrived; if not, a warning has said so, and :attr:`missing` how much.
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
        # What an outage that is still on, or a refusal, keeps back has been warned of.
        warned_of = self._owed if self._silent else int("refused" in self._warned)
        if self._owed > warned_of:
            self._warn_once("lost", _LOST, redacted(str(self.uri)), str(self._owed))
        return self._arrived

    @property
    def missing(self) -> int:
        """Records handed over that the store does not have."""
        return self._owed

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
                    why = reason(error) + version_note(str(self.uri))
                    self._warn_once("refused", _REFUSED, redacted(str(self.uri)), records[0].what, why)
                    return
                refused = True
                continue
            if "silent" not in self._warned:  # finding out what is wrong takes requests
                self._warn_once("silent", _SILENT, trouble(str(self.uri), error))
            self._silent = True
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
        self._silent = False
        return None

    def _open(self) -> None:
        uri = str(self.uri)
        if (database := sqlite_file(uri)) is not None:
            check_writable(database)
        client = open_client(uri)
        resumed = self.run_id
        if resumed is None or not reopen_run(client, resumed, self._tags):
            self.run_id = create_run(client, self._experiment, self._run_name, self._tags, uri=uri)
            if resumed is not None:
                self._warn_once("unknown", _UNKNOWN, redacted(uri), resumed)
        self._client = client

    def _run_is_there(self) -> bool:
        try:
            return self._client is not None and self._client.get_run(self.run_id) is not None
        except Exception:  # as above
            return False

    def _warn_once(self, kind: str, message: str, *details: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning(message, *details)


class _StoreDeadError(Exception):
    """The tracker is closing and its store does not answer."""
