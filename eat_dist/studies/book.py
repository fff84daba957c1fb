"""The book of a study under way: hands out runs, and writes down what becomes of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eat_dist.config import RunConfig, dump_config
from eat_dist.console import Console
from eat_dist.errors import EatError
from eat_dist.storage import Folder
from eat_dist.studies.plan import StudyRun
from eat_dist.studies.record import Record
from eat_dist.tracking import end_run


class Ledger:
    """Runs of one kind of process; a :class:`eat_dist.cluster.tune.Book`.

    Args:
        folder: The study's.
        runs: What is handed out, in order.
        records: Of all runs of the study, by name.
        write: Writes ``study.json``.
        config_of: The run as it is to be started.
        parent_run_id: MLflow's run of the study, asked for when a run starts: an answer may be late.
        console: Where news goes.
    """

    def __init__(
        self,
        folder: Folder,
        runs: Sequence[StudyRun],
        records: Mapping[str, Record],
        *,
        write: Callable[[], None],
        config_of: Callable[[StudyRun], RunConfig],
        parent_run_id: Callable[[], str | None],
        console: Console,
    ) -> None:
        self.folder = folder
        self.runs = {run.name: run for run in runs}
        self.records = records
        self.write = write
        self.config_of = config_of
        self.parent_run_id = parent_run_id
        self.console = console
        self._waiting = list(self.runs)
        self._begun: dict[str, float] = {}

    @property
    def left(self) -> int:
        """Runs that :meth:`begin` will hand out."""
        return len(self._waiting)

    @property
    def under_way(self) -> bool:
        """Whether the end of a run that was handed out has not come."""
        return bool(self._begun)

    def begin(self) -> Mapping[str, Any] | None:
        """See :class:`eat_dist.cluster.tune.Book`: the arguments of :func:`eat_dist.studies.task.run_task`."""
        if not self._waiting:
            return None
        name = self._waiting.pop(0)
        record = self.records[name]
        again = self.folder.child(record.run_folder).exists("checkpoints")
        record.status, record.error = "RUNNING", None
        self._begun[name] = time.monotonic()
        self.write()
        self._say(record, "goes on" if again else "starts")
        return {
            "id": name,
            "config": dump_config(self.config_of(self.runs[name])),
            "folder": str(self.folder.child(record.run_folder)),
            "parent_run_id": self.parent_run_id(),
            "working_folder": os.getcwd(),
        }

    def learn(self, trial: str, result: Mapping[str, Any]) -> None:
        """See :class:`eat_dist.cluster.tune.Book`; what came out is read from the run's folder at its end."""

    def end(self, trial: str, *, error: str | None) -> None:
        """See :class:`eat_dist.cluster.tune.Book`."""
        record, run = self.records[trial], self.runs[trial]
        here = self.folder.child(record.run_folder)
        if error is None and not here.exists("summary.json"):
            return  # stopped, not ended: :meth:`interrupt` comes
        self._add_time(record)
        try:
            if error is None:
                record.finish(here, run.config)
        except EatError as fault:
            error = str(fault)
        if error is not None:
            record.status, record.error = "FAILED", error
        self.write()
        figures = record.figures if error is None else None
        told = (
            f"failed: {error}" if figures is None else "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        )
        self._say(record, told)

    def suspend(self, trial: str, *, reason: str) -> None:
        """See :class:`eat_dist.cluster.tune.Book`."""
        record = self.records[trial]
        self._add_time(record)
        record.status = "INTERRUPTED"
        self.write()
        self._say(record, f"interrupted: {reason}")

    def interrupt(self) -> None:
        """What still runs has been interrupted, by now without a process of its own."""
        for name in self.runs:
            record = self.records[name]
            if record.status == "RUNNING":
                self._add_time(record)
                record.status = "INTERRUPTED"
        self.write()

    def _add_time(self, record: Record) -> None:
        now = time.monotonic()
        record.seconds = round(record.seconds + now - self._begun.pop(record.name, now), 3)

    def _say(self, record: Record, text: str) -> None:
        place = list(self.records).index(record.name) + 1
        self.console.say(f"run {place} of {len(self.records)}  {record.name}  {text}")


def close_abandoned(folder: Folder, runs: Sequence[StudyRun], records: Mapping[str, Record]) -> None:
    """End MLflow's runs of those whose process was killed, so that they are not RUNNING for ever; never raises.

    A run that goes on from a checkpoint opens its own again; one that has none yet begins another.
    """
    for run in runs:
        here = folder.child(run.folder)
        tracking = run.config.tracking
        if not tracking.enabled or records[run.name].status == "FINISHED" or not here.exists("run.json"):
            continue
        end_run(tracking.uri, here.read_json("run.json").get("mlflow_run_id"), "KILLED")
