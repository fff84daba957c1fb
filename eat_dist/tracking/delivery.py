"""Calls to a store that may hang, die or never have been there: a queue, a thread, and what is said about an outage."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from eat_dist.credentials import redacted
from eat_dist.tracking.lifecycle import create_run, reopen_run
from eat_dist.tracking.sending import METRICS_PER_REQUEST, MetricValue, send_metrics
from eat_dist.tracking.store import (
    check_writable,
    open_client,
    reason,
    sqlite_file,
    trouble,
    version_note,
)

_log = logging.getLogger(__name__)

QUEUE_RECORDS = 10_000
"""Calls kept while the store does not answer; then the oldest is lost for each new one."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds between attempts during an outage; they double."""
CLOSING_ATTEMPTS = 2
"""Failures in a row after which :meth:`Delivery.close` takes the store for dead."""

_SILENT = "%s: training goes on, all metrics are in the run folder"
_REFUSED = "MLflow at %s did not take %s (%s): it is left out there"
_UNKNOWN = "MLflow at %s does not have the run %s that is resumed: a new one is started there"
_LOST = "MLflow at %s did not get %s of this run's records: all metrics are in the run folder"

Send = Callable[[Any, str], None]
"""A call, with the client and the run's id."""


class _Record(NamedTuple):
    """A call on its way to the store; metrics lie bare so that several calls can share a request."""

    what: str
    send: Send | None
    metrics: tuple[MetricValue, ...]


class Delivery:
    """The way of one run's records to MLflow.

    Records are sent in order by a daemon thread, which opens the run first. When one fails, the store is asked for the
    run. If it does not answer, the record is tried again after 5 to 60 s; if it does, the record itself is at fault and
    is left out after a second failure. Nothing is raised here because of MLflow.

    Args:
        uri: The store.
        experiment: Of a new run, as ``run_name`` and ``tags`` are.
        run_id: Go on with this run; one the store does not have costs a warning and a new run.

    Attributes:
        run_id: None until the store has answered.
    """

    def __init__(
        self, uri: str, *, experiment: str, run_name: str, tags: Mapping[str, str], run_id: str | None
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._experiment, self._run_name, self._tags = experiment, run_name, dict(tags)
        self._client: Any = None
        self._queue: deque[_Record] = deque()
        self._changed = threading.Condition()
        self._owed = 0  # records handed over and not arrived; what was dropped or refused stays owed
        self._silent = False  # an outage is on, and has been warned of
        self._warned: set[str] = set()
        self._answered = threading.Event()  # well or badly: nobody need wait any longer
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self.add("the run", lambda client, run_id: None)
        self._thread.start()

    @property
    def missing(self) -> int:
        """Records handed over that the store does not have."""
        return self._owed

    def wait(self, seconds: float) -> None:
        """Until the store has answered for the first time, well or badly."""
        self._answered.wait(seconds)

    def add(self, what: str, send: Send | None = None, *, metrics: tuple[MetricValue, ...] = ()) -> None:
        """Hand over a call, or metrics; ``what`` it is, for a warning. After :meth:`close` it is ignored."""
        if self._closing.is_set():
            return
        with self._changed:
            if len(self._queue) >= QUEUE_RECORDS:
                self._queue.popleft()
            self._queue.append(_Record(what, send, metrics))
            self._owed += 1
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Send what is left, for ``timeout`` seconds at most; whether all that was ever handed over arrived."""
        if not self._closing.is_set():
            self._closing.set()
            with self._changed:
                self._changed.notify_all()
            self._thread.join(timeout)
            self._abandoned.set()
            # What an outage that is still on, or a refusal, keeps back has been warned of.
            warned_of = self._owed if self._silent else int("refused" in self._warned)
            if self._owed > warned_of:
                self._warn_once("lost", _LOST, redacted(self.uri), str(self._owed))
        return self._owed == 0

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
            _StoreDeadError: The delivery is closing and the store does not answer.
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
                    why = reason(error) + version_note(self.uri)
                    self._warn_once("refused", _REFUSED, redacted(self.uri), records[0].what, why)
                    return
                refused = True
                continue
            if "silent" not in self._warned:  # finding out what is wrong takes requests
                self._warn_once("silent", _SILENT, trouble(self.uri, error))
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
        if (database := sqlite_file(self.uri)) is not None:
            check_writable(database)
        client = open_client(self.uri)
        resumed = self.run_id
        if resumed is None or not reopen_run(client, resumed, self._tags):
            self.run_id = create_run(client, self._experiment, self._run_name, self._tags, uri=self.uri)
            if resumed is not None:
                self._warn_once("unknown", _UNKNOWN, redacted(self.uri), resumed)
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
    """The delivery is closing and its store does not answer."""
