"""A sweep from its plan to its best config: checks, trials, records. Resumable from its folder."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eat_dist import __version__
from eat_dist.cluster.capacity import Capacity, capacity, settled
from eat_dist.cluster.session import connect, nodes
from eat_dist.cluster.tune import Halving, run_trials
from eat_dist.config import RunConfig, dump_config
from eat_dist.console import Console
from eat_dist.data.images import ZeroShotData
from eat_dist.errors import ClusterError, StorageError
from eat_dist.provenance import git_state
from eat_dist.runs.checks import check_model, check_names, digests, load_data, splits_of, with_absolute_paths
from eat_dist.runs.lease import LEASE, check_not_held, holding
from eat_dist.spaces import Settings, check_space
from eat_dist.storage import Folder
from eat_dist.sweeps.book import Ledger
from eat_dist.sweeps.plan import STATE, SweepPlan, check_plan, read_plan
from eat_dist.sweeps.record import Trial, objective_history, ranked, read_trials, winners, write_trials
from eat_dist.sweeps.table import trials_table
from eat_dist.sweeps.trial import run_trial
from eat_dist.tracking import Tracker


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        folder: Where everything is.
        trials: All, by number.
        best: Id of the best trial; None with two objectives, or where none finished.
        pareto: Ids of the front, with two objectives.
        configs: Names of the ready configs in the folder, the best one's or one of each on the front.
        tracking_uri: MLflow's store, None where tracking is off.
        mlflow_run_id: Of the sweep; None where MLflow never answered.
    """

    folder: Folder
    trials: list[Trial]
    best: str | None
    pareto: list[str]
    configs: list[str]
    tracking_uri: str | None
    mlflow_run_id: str | None


def start_sweep(plan: SweepPlan, *, sweep_dir: str | None, command: str, console: Console) -> Swept:
    """Run a new sweep.

    Nothing but the folder's lease is written before plan, space, data and cluster have been found good.

    Args:
        plan: What is to be done.
        sweep_dir: Path or URL; default ``sweeps/NAME-TIME``.
        command: Recorded.
        console: Where news goes.

    Raises:
        StorageError: Somebody else works on that folder (:mod:`eat_dist.runs.lease`).
        ClusterError: The cluster is too small, or nodes are gone meanwhile; then the sweep can be resumed.
        EatError: Anything else the user can mend; one line.
        KeyboardInterrupt: Ctrl-C; the sweep can be resumed.
    """
    check_plan(plan)
    check_names(plan.base)
    now = datetime.datetime.now().astimezone()
    folder = Folder.at(sweep_dir or f"sweeps/{plan.name}-{now:%Y%m%d-%H%M%S}")
    check_not_held(folder)
    _check_free(folder)
    plan = replace(plan, base=with_absolute_paths(plan.base))
    about = {"command": command, "git": git_state(Path.cwd()), "started": now.isoformat(timespec="seconds")}
    with holding(folder):
        _check_free(folder)
        return _Sweep(plan, folder, console).go([], about)


def resume_sweep(sweep_dir: str, *, console: Console) -> Swept:
    """Continue a sweep: unfinished trials from their checkpoints, with their ids and settings, then the missing ones.

    Raises:
        EatError: As :func:`start_sweep`.
        KeyboardInterrupt: Ctrl-C.
    """
    folder = Folder.at(sweep_dir)
    plan = read_plan(folder)
    check_plan(plan)
    with holding(folder):
        trials = read_trials(folder)
        done = sum(not trial.unfinished for trial in trials)
        console.say(f"Resuming: {done} of {plan.trials} trials are done, {len(trials) - done} go on.")
        return _Sweep(plan, folder, console).go(trials, folder.read_json(STATE))


def _check_free(folder: Folder) -> None:
    if folder.exists() and set(folder.names()) - {LEASE}:
        raise StorageError(
            f"'{folder}' exists; choose another --sweep-dir, or continue the sweep in it with --resume {folder}"
        )


class _Sweep:
    """The part that new and resumed sweeps share."""

    def __init__(self, plan: SweepPlan, folder: Folder, console: Console) -> None:
        self.plan = plan
        self.folder = folder
        self.console = console
        self.tracker: Tracker | None = None

    def go(self, trials: list[Trial], about: dict[str, Any]) -> Swept:
        begin, before = time.monotonic(), float(about.get("seconds") or 0)
        placed, data = self._load()
        check_model(placed, data)
        earlier = about.get("data")
        if earlier is not None and earlier != digests(data):
            raise StorageError(
                f"the images are not those that the sweep in '{self.folder}' began with (their SHA-256 differs); bring "
                "them back, or start another sweep"
            )
        room = self._check(data)
        self.placed = placed.model_copy(update={"cluster": settled(placed.cluster, room.member)})
        self.about = {
            "command": about.get("command", ""),
            "git": about.get("git", {}),
            "started": about.get("started", ""),
            "concurrent": room.concurrent,
            "data": digests(data),
            "mlflow_run_id": about.get("mlflow_run_id"),
            "eat_dist": __version__,
        }
        self.folder.create()
        self._write_state(trials, before)  # first: what has it can be resumed
        write_trials(self.folder, trials)
        tracker = self.tracker = self._track()
        self._announce(room)

        def seconds() -> float:
            return round(before + time.monotonic() - begin, 3)

        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            self._write_state(trials, seconds())
            self._run(trials, room, seconds)
            swept = self._finish(trials, tracker, seconds())
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):  # the latter is SIGTERM, as Ray has it for callers from Python
            status = "KILLED"
            raise
        finally:
            tracker.close(status)
            self._mlflow_run_id(trials, seconds())
        return swept

    def _load(self) -> tuple[RunConfig, ZeroShotData]:
        data = self.plan.base.data.model_copy(update={"validation_share": self.plan.validation_share})
        return load_data(self.plan.base.model_copy(update={"data": data}), self.console)

    def _check(self, data: ZeroShotData) -> Capacity:
        """The space against config, data and cluster."""
        split_alike: set[str] = set()

        def check(config: RunConfig) -> None:
            check_names(config)
            key = json.dumps(config.ensemble.model_dump(mode="json"))
            if key not in split_alike:
                splits_of(config, data)
                split_alike.add(key)

        space, tried = check_space(self.plan.space, self.plan.base, check=check)
        self.plan = replace(self.plan, space=space)
        if self.plan.search == "grid":
            points = space.grid_size(self.plan.trials + 1)
            if points < self.plan.trials:
                self.console.warn(f"the grid has {points} points; that many trials are run, not {self.plan.trials}")
                self.plan = replace(self.plan, trials=points)
            elif points > self.plan.trials:
                self.console.warn(f"the grid has more points than --trials; only the first {self.plan.trials} are run")
        connect(self.plan.base.cluster)
        return capacity(
            nodes(),
            members=max(config.ensemble.members * config.cluster.replicas_per_member for config in tried),
            trials=self.plan.trials,
            concurrent=self.plan.concurrent,
            config=self.plan.base.cluster,
        )

    def _announce(self, room: Capacity) -> None:
        rungs = ", ".join(map(str, self.plan.rungs))
        member = " and ".join(
            f"{amount:g} {kind}" for amount, kind in ((room.member.gpus, "GPU"), (room.member.cpus, "CPU")) if amount
        )
        self.console.say(
            f"sweep {self.plan.name}: {self.plan.trials} trials by {self.plan.search}, {room.concurrent} at once, "
            f"{member} a member; measured after epochs {rungs} at ε = {self.plan.evaluation_epsilon:.4g}"
        )

    def _track(self) -> Tracker:
        base = self.plan.base
        tags = {"sweep": self.plan.name, "dataset": base.data.dataset, "defense": base.defense.name}
        tags |= {"backbone": base.model.backbone, "sweep_folder": str(self.folder), "eat_dist": __version__}
        tags |= {f"git.{name}": value for name, value in self.about["git"].items()}
        tracker = Tracker.start(
            base, run_name=Path(self.folder.path).name, tags=tags, resume_run_id=self.about["mlflow_run_id"]
        )
        tracker.log_params(base.model_dump(mode="json"))
        return tracker

    def _run(self, trials: list[Trial], room: Capacity, seconds: Callable[[], float]) -> None:
        plan = self.plan
        ledger = Ledger(
            plan,
            self.folder,
            trials,
            config_of=self._config_of,
            parent_run_id=lambda: self._mlflow_run_id(trials, seconds()),
            console=self.console,
        )
        halving = None
        if plan.scheduler == "asha":
            halving = Halving(
                plan.objectives[0],
                grace_period=plan.grace_period,
                reduction_factor=plan.reduction_factor,
                epochs=plan.epochs,
                earlier=objective_history(trials, plan.objectives[0]),
            )
        if ledger.left == 0:
            return
        interrupted: list[Trial] = []
        try:
            run_trials(
                partial(run_trial, rungs=plan.rungs, objective=plan.objective),
                ledger,
                trials=ledger.left,
                concurrent=room.concurrent,
                halving=halving,
                max_failures=plan.base.cluster.max_restarts,
            )
        except ClusterError as error:
            raise ClusterError(
                f"{str(error).rstrip('.')}. That has stopped the sweep; once it is mended, go on with eat-dist sweep "
                f"--resume {self.folder.argument}"
            ) from error
        finally:
            interrupted = ledger.interrupt()
            self._write_state(trials, seconds())
        if interrupted or ledger.left:
            raise KeyboardInterrupt

    def _config_of(self, settings: Settings) -> RunConfig:
        return self.plan.trial_config(settings, base=self.placed)

    def _mlflow_run_id(self, trials: list[Trial], seconds: float) -> str | None:
        """MLflow's run of the sweep; an answer that came late is put on record, for a resumption to go on with it."""
        known = None if self.tracker is None else self.tracker.run_id
        if known != self.about["mlflow_run_id"]:
            self._write_state(trials, seconds)
        return known

    def _write_state(self, trials: list[Trial], seconds: float) -> None:
        if self.tracker is not None:
            self.about["mlflow_run_id"] = self.tracker.run_id
        best, pareto = winners(trials, self.plan.objectives)
        content = {**self.plan.to_json(), **self.about, "seconds": seconds, "best": best, "pareto": pareto}
        self.folder.write_json(STATE, content)

    def _finish(self, trials: list[Trial], tracker: Tracker, seconds: float) -> Swept:
        plan, folder = self.plan, self.folder
        best, pareto = winners(trials, plan.objectives)
        chosen = pareto if best is None else [best]
        settings = {trial.id: trial.settings for trial in trials}
        configs = {
            "best.yaml" if best is not None else f"pareto_{name}.yaml": dump_config(plan.best_config(settings[name]))
            for name in chosen
        }
        for name, content in configs.items():
            folder.write(name, content.encode())
            tracker.log_text(content, name)
        tracker.log_text(folder.read("trials.json").decode(), "trials.json")
        tracker.log_text(folder.read(STATE).decode(), STATE)
        if best is not None:
            trial = next(trial for trial in trials if trial.id == best)
            tracker.log_params({"best": {"trial": best, **trial.settings}})
            tracker.log_metrics({f"best/{name}": value for name, value in trial.objectives.items()}, step=plan.epochs)
        self.console.out.print(trials_table(plan, ranked(trials, plan.objectives), chosen))
        if not chosen:
            errors = [trial.error for trial in trials if trial.error]
            raise ClusterError(
                f"none of the {len(trials)} trials finished"
                + (f"; the first error: {errors[0]}" if errors else "")
                + f". They are on record in '{folder}/trials.json'"
            )
        return Swept(folder, trials, best, pareto, list(configs), tracker.uri, tracker.run_id)
