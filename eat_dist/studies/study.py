"""A study from its file to its table: checks, runs, records. The same call goes on where an earlier one stopped."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eat_dist import __version__
from eat_dist.config import RunConfig
from eat_dist.console import Console
from eat_dist.errors import RunsFailedError, StorageError, in_one_line
from eat_dist.provenance import git_state
from eat_dist.runs.checks import with_absolute_paths
from eat_dist.runs.lease import LEASE, check_not_held, holding
from eat_dist.storage import Folder
from eat_dist.studies.book import Ledger, close_abandoned
from eat_dist.studies.checks import Loaded, check_earlier, load_all, with_equal_passes
from eat_dist.studies.plan import StudyRun, kinds, plan_runs
from eat_dist.studies.reading import Study
from eat_dist.studies.record import STATE, Record, earlier_records, read_state, write_state
from eat_dist.studies.results import write_results, write_tables
from eat_dist.studies.task import run_task
from eat_dist.tracking import Tracker

Backend = Literal["ray", "local"]
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Studied:
    """A finished study.

    Attributes:
        folder: Where everything is.
        records: Of all runs, in order.
        tracking_uri: MLflow's store, None where tracking is off.
        mlflow_run_id: Of the study; None where MLflow never answered.
    """

    folder: Folder
    records: list[Record]
    tracking_uri: str | None
    mlflow_run_id: str | None


def run_study(
    study: Study, *, study_dir: str | None, backend: Backend, concurrent: int | None, command: str, console: Console
) -> Studied:
    """Bring a study to its end: what is finished is left as it is, what is half trained goes on, the rest starts.

    Nothing but the folder's lease is written before file, configs, data, earlier results and cluster have been found
    good.

    Args:
        study: What is to be done.
        study_dir: Path or URL; default ``studies/NAME``.
        backend: ``ray``: runs side by side on a cluster; ``local``: one after another in this process, without Ray.
        concurrent: Runs at once on Ray; None: as many as fit.
        command: Recorded.
        console: Where news goes.

    Raises:
        RunsFailedError: Some runs failed; the others are done and the table is written.
        ClusterError: The cluster is too small, or nodes are gone meanwhile; then the same call goes on.
        EatError: Anything else the user can mend; one line.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    runs = [replace(run, config=with_absolute_paths(run.config)) for run in plan_runs(study, local=backend == "local")]
    folder = Folder.at(study_dir or f"studies/{study.name}")
    check_not_held(folder)
    if [name for name in folder.names() if name != LEASE] and not folder.exists(STATE):
        raise StorageError(f"'{folder}' holds something that is no study (no {STATE}); choose another --study-dir")
    with holding(folder):
        return _Study(study, folder, console).go(runs, backend=backend, concurrent=concurrent, command=command)


class _Study:
    """A study in a folder that this process holds."""

    def __init__(self, study: Study, folder: Folder, console: Console) -> None:
        self.study = study
        self.folder = folder
        self.console = console
        self.records: dict[str, Record] = {}
        self.about: dict[str, Any] = {}
        self.tracker: Tracker | None = None
        self._begin = time.monotonic()
        self._earlier_seconds = 0.0

    def go(self, runs: list[StudyRun], *, backend: Backend, concurrent: int | None, command: str) -> Studied:
        before = read_state(self.folder) if self.folder.exists(STATE) else {}
        self._earlier_seconds = float(before.get("seconds") or 0)
        data = load_all(runs, self.console)
        if self.study.budget_row is not None:
            runs = with_equal_passes(runs, data, self.study, self.console)
        check_earlier(self.folder, runs, data)
        self.records = self._records(runs)
        todo = [run for run in runs if self.records[run.name].status != "FINISHED"]
        start = self._executor(todo, data, backend=backend, concurrent=concurrent)
        self.about = self._about(before, runs, command)
        self.folder.create()
        self._write()  # first: a folder is a study's by this file
        self.folder.write("study.yaml", self.study.text.encode())
        self.console.say(
            f"study {self.study.name}: {len(runs)} runs ({len(self.study.rows)} rows × {len(self.study.datasets)} "
            f"datasets × {len(self.study.seeds)} seeds), {len(runs) - len(todo)} of them finished"
        )
        tracker = self.tracker = self._track(runs[0].config)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            self._write()
            close_abandoned(self.folder, todo, self.records)
            start()
            self._write()
            write_results(self.folder, self.console, tracker)
            self._refuse_failed()
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):  # the latter is SIGTERM, as Ray has it for callers from Python
            status = "KILLED"
            close_abandoned(self.folder, todo, self.records)
            raise
        finally:
            tracker.close(status)
            if tracker.run_id != self.about["mlflow_run_id"]:  # MLflow has answered only now
                self._write()
        return Studied(self.folder, list(self.records.values()), tracker.uri, tracker.run_id)

    def _write(self) -> None:
        self.about["seconds"] = round(self._earlier_seconds + time.monotonic() - self._begin, 3)
        if self.tracker is not None:
            self.about["mlflow_run_id"] = self.tracker.run_id
        write_state(self.folder, self.about, list(self.records.values()))
        if any(record.status == "FINISHED" for record in self.records.values()):
            write_tables(self.folder)

    def _records(self, runs: Sequence[StudyRun]) -> dict[str, Record]:
        earlier = earlier_records(self.folder)
        found, unusable = {}, {}
        for run in runs:
            record, before = Record.of(run), earlier.get(run.name)
            if before is not None:
                record.seconds, record.mlflow_run_id = before.seconds, before.mlflow_run_id
            here = self.folder.child(run.folder)
            if here.exists("summary.json"):
                try:
                    record.finish(here, run.config)
                except StorageError as error:
                    unusable[run.name] = (
                        f"run '{run.name}' is finished, but cannot be used: {error}. Measure it again with 'eat-dist "
                        f"evaluate {here.argument}', or delete its folder and it is trained again"
                    )
            elif before is not None and before.status != "WAITING":
                record.status = "INTERRUPTED"
            found[run.name] = record
        if unusable:
            first, *others = unusable
            more = f" ({len(others)} more cannot be used: {', '.join(others)})" if others else ""
            raise StorageError(unusable[first] + more)
        if gone := [name for name in earlier if name not in found]:
            self.console.warn(
                f"{len(gone)} runs are no longer part of the study, and not in its table: {', '.join(gone)}"
            )
        return found

    def _executor(
        self, todo: Sequence[StudyRun], data: Loaded, *, backend: Backend, concurrent: int | None
    ) -> Callable[[], None]:
        """What brings the runs to their end, once the cluster, if there is one, has been found large enough."""
        if backend == "local" or not todo:
            return lambda: run_here(self._ledger(todo, lambda run: run.config))
        from eat_dist.studies.on_ray import plan_batches, run_batches  # noqa: PLC0415  (imports Ray)

        shards = {dataset: placed.data.shards for dataset, (placed, _) in data.items()}
        batches = plan_batches([run.with_shards(shards[run.dataset]) for run in todo], concurrent=concurrent)
        return lambda: run_batches(batches, self._ledger, console=self.console)

    def _ledger(self, runs: Sequence[StudyRun], config_of: Callable[[StudyRun], RunConfig]) -> Ledger:
        return Ledger(
            self.folder,
            runs,
            self.records,
            write=self._write,
            config_of=config_of,
            parent_run_id=lambda: None if self.tracker is None else self.tracker.run_id,
            console=self.console,
        )

    def _about(self, before: Mapping[str, Any], runs: Sequence[StudyRun], command: str) -> dict[str, Any]:
        started = f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')}"
        datasets = {
            run.dataset: {**run.config.model_dump(mode="json"), "name": run.dataset} for run in kinds(runs).values()
        }
        return {
            "name": self.study.name,
            "command": command,
            "eat_dist": __version__,
            "git": git_state(Path.cwd()),
            "started": before.get("started", started),
            "seconds": 0.0,
            "mlflow_run_id": before.get("mlflow_run_id"),
            "datasets": datasets,
            "rows": {row: dict(settings) for row, settings in self.study.rows.items()},
            "seeds": list(self.study.seeds),
            "budget_row": self.study.budget_row,
        }

    def _track(self, config: RunConfig) -> Tracker:
        tags = {"study": self.study.name, "study_folder": str(self.folder), "eat_dist": __version__}
        tags |= {f"git.{name}": value for name, value in self.about["git"].items()}
        tracker = Tracker.start(
            config,
            run_name=Path(self.folder.path).name,
            tags=tags,
            resume_run_id=self.about["mlflow_run_id"],
            wait=_PATIENCE_S,  # a run that starts before the answer has no parent
        )
        tracker.log_params(
            {
                "rows": ", ".join(self.study.rows),
                "datasets": ", ".join(self.study.datasets),
                "seeds": ", ".join(map(str, self.study.seeds)),
                "budget_row": self.study.budget_row,
            }
        )
        tracker.log_text(self.study.text, "study.yaml")
        return tracker

    def _refuse_failed(self) -> None:
        failed = [record for record in self.records.values() if record.status == "FAILED"]
        if failed:
            told = "; ".join(f"{record.name}: {record.error}" for record in failed[:3])
            more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise RunsFailedError(
                f"{len(failed)} of {len(self.records)} runs failed: {told}{more}. The others are done; the same "
                f"command tries the failed ones again"
            )


def run_here(ledger: Ledger) -> None:
    """The ledger's runs one after another, in this process.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        while (task := ledger.begin()) is not None:
            try:
                run_task(task, lambda result: None)
            except Exception as error:  # a fault of this run, which the others do not share
                ledger.end(task["id"], error=in_one_line(error))
            else:
                ledger.end(task["id"], error=None)
    finally:
        ledger.interrupt()
