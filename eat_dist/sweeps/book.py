"""The book of a sweep under way: hands out trials, writes down what becomes of them, and tells MLflow and the user."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from eat_dist.config import RunConfig, dump_config
from eat_dist.console import Console
from eat_dist.errors import ConfigError
from eat_dist.runs.summary import FIGURES
from eat_dist.spaces import Settings
from eat_dist.storage import Folder
from eat_dist.sweeps.plan import SweepPlan
from eat_dist.sweeps.record import Status, Trial, result_of, write_trials
from eat_dist.sweeps.search import propose
from eat_dist.tracking import PARENT_TAG, Tracker

_MLFLOW_STATUS: Mapping[Status, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "FINISHED": "FINISHED",
    "FAILED": "FAILED",
    "PRUNED": "KILLED",
    "INTERRUPTED": "KILLED",
}


class Ledger:
    """A :class:`eat_dist.cluster.tune.Book` in a folder.

    Args:
        plan: The sweep.
        folder: Its folder.
        trials: What is on record; unfinished trials are handed out first, with their ids and settings.
        config_of: Settings → the run of a trial, placed on the cluster; raises ConfigError.
        parent_run_id: MLflow's run of the sweep, asked for at every event: an answer may be late.
        console: Where news goes.
    """

    def __init__(
        self,
        plan: SweepPlan,
        folder: Folder,
        trials: list[Trial],
        *,
        config_of: Callable[[Settings], RunConfig],
        parent_run_id: Callable[[], str | None],
        console: Console,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.trials = trials
        self.config_of = config_of
        self.parent_run_id = parent_run_id
        self.console = console
        self._waiting = [trial for trial in trials if trial.unfinished]
        self._trackers: dict[str, Tracker] = {}
        self._orphans: set[str] = set()  # MLflow's runs that began before the sweep's was known
        self._begun: dict[str, float] = {}
        self._exhausted = False
        for trial in self._waiting:
            trial.status = "INTERRUPTED"

    @property
    def left(self) -> int:
        """Trials that :meth:`begin` will hand out, at most."""
        return len(self._waiting) if self._exhausted else len(self._waiting) + self.plan.trials - len(self.trials)

    def begin(self) -> Mapping[str, Any] | None:
        """See :class:`eat_dist.cluster.tune.Book`. Settings that cannot hold together are a failed trial."""
        while (trial := self._next()) is not None:
            try:
                config = self.config_of(trial.settings)
            except ConfigError as error:
                trial.status, trial.error = "FAILED", str(error)
                self._write()
                self._say(trial, f"failed: {error}")
                continue
            tracker = self._track(trial, config)
            trial.status = "RUNNING"
            self._trackers[trial.id], self._begun[trial.id] = tracker, time.monotonic()
            self._write()
            begins = f"goes on after epoch {trial.epoch}" if trial.epoch else "starts"
            self._say(trial, f"{begins}: {self._named(trial)}")
            return {
                "id": trial.id,
                "config": dump_config(config),
                "folder": str(self.folder.child(trial.run_folder)),
                "reported": trial.epoch,
                "mlflow_run_id": trial.mlflow_run_id,
                "working_folder": os.getcwd(),
            }
        return None

    def learn(self, trial: str, result: Mapping[str, Any]) -> None:
        """See :class:`eat_dist.cluster.tune.Book`; what is on record already is not written again."""
        record, epoch = self._trial(trial), int(result["epoch"])
        if epoch <= record.epoch:
            return
        objectives = {name: float(result[name]) for name in self.plan.objectives}
        figures = {name: float(result["figures"][name]) for name in FIGURES}
        record.results.append(result_of(epoch, objectives, figures))
        self._trackers[trial].log_metrics({**objectives, **figures}, step=epoch)
        self._add_time(record)
        self._write()
        shown = "  ".join(f"{name} {value:.4f}" for name, value in objectives.items())
        self._say(record, f"epoch {epoch}/{self.plan.epochs}  {shown}")

    def end(self, trial: str, *, error: str | None) -> None:
        """See :class:`eat_dist.cluster.tune.Book`."""
        record = self._trial(trial)
        finished = record.epoch == self.plan.epochs
        record.status = "FAILED" if error else "FINISHED" if finished else "PRUNED"
        record.error = error
        self._close(record)
        if error:
            self._say(record, f"failed: {error}")
        elif not finished:
            self._say(record, f"stopped after epoch {record.epoch} of {self.plan.epochs}: others were better there")

    def suspend(self, trial: str, *, reason: str) -> None:
        """See :class:`eat_dist.cluster.tune.Book`."""
        record = self._trial(trial)
        record.status = "INTERRUPTED"
        self._close(record)
        self._say(record, f"interrupted: {reason}")

    def interrupt(self) -> list[Trial]:
        """What still runs has been interrupted; returns those."""
        running = [trial for trial in self.trials if trial.status == "RUNNING"]
        for trial in running:
            trial.status = "INTERRUPTED"
            self._close(trial)
        return running

    def _next(self) -> Trial | None:
        if self._waiting:
            return self._waiting.pop(0)
        number = len(self.trials)
        if number >= self.plan.trials:
            return None
        settings = propose(self.plan, number, self.trials)
        if settings is None:
            self._exhausted = True
            self.console.say(f"the space has no more settings: {number} trials instead of {self.plan.trials}")
            return None
        name = f"{number:04d}"
        trial = Trial(id=name, number=number, status="RUNNING", run_folder=f"trials/{name}", settings=settings)
        self.trials.append(trial)
        return trial

    def _track(self, trial: Trial, config: RunConfig) -> Tracker:
        tags = {
            "sweep": self.plan.name,
            "trial": trial.id,
            "dataset": config.data.dataset,
            "defense": config.defense.name,
            "backbone": config.model.backbone,
            "run_folder": str(self.folder.child(trial.run_folder)),
        }
        parent = self.parent_run_id()
        if parent is None:
            self._orphans.add(trial.id)
        tracker = Tracker.start(
            config,
            run_name=f"{self.plan.name}/{trial.id}",
            tags=tags,
            resume_run_id=trial.mlflow_run_id,
            parent_run_id=parent,
        )
        tracker.log_params(config.model_dump(mode="json"))
        return tracker

    def _close(self, trial: Trial) -> None:
        self._add_time(trial)
        self._write()
        tracker = self._trackers.pop(trial.id, None)
        self._begun.pop(trial.id, None)
        self._orphans.discard(trial.id)
        if tracker is None:
            return
        tracker.close(_MLFLOW_STATUS[trial.status])
        if tracker.run_id != trial.mlflow_run_id:
            trial.mlflow_run_id = tracker.run_id
            self._write()
        self._tell_folder(trial)

    def _add_time(self, trial: Trial) -> None:
        now = time.monotonic()
        trial.seconds = round(trial.seconds + now - self._begun.get(trial.id, now), 3)
        self._begun[trial.id] = now

    def _trial(self, name: str) -> Trial:
        return next(trial for trial in self.trials if trial.id == name)

    def _write(self) -> None:
        """Write the record, with what MLflow has answered since."""
        for trial in self.trials:
            if (tracker := self._trackers.get(trial.id)) is not None:
                trial.mlflow_run_id = tracker.run_id
        if (parent := self.parent_run_id()) is not None:
            while self._orphans:
                self._trackers[self._orphans.pop()].log_tags({PARENT_TAG: parent})
        write_trials(self.folder, self.trials)

    def _tell_folder(self, trial: Trial) -> None:
        """Have a trial's folder name its MLflow run, where whoever resumes it looks: its process may not have known."""
        if trial.mlflow_run_id is None:
            return
        here = self.folder.child(trial.run_folder)
        for name in ("run.json", "summary.json"):
            if here.exists(name) and (content := here.read_json(name)).get("mlflow_run_id") is None:
                here.write_json(name, content | {"mlflow_run_id": trial.mlflow_run_id})

    def _say(self, trial: Trial, text: str) -> None:
        self.console.say(f"trial {trial.id} of {self.plan.trials}  {text}")

    def _named(self, trial: Trial) -> str:
        return "  ".join(f"{key}={shown(value)}" for key, value in trial.settings.items())


def shown(value: Any) -> str:
    """A setting for people: four digits are enough."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
