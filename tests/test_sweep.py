"""Whole sweeps on Ray: they end with the best config, lose nothing to a SIGKILL, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from placement_groups import groups_left, settled_groups

from conftest import REPOSITORY
from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.data.load import load_dataset
from eat_dist.errors import ClusterError, StorageError
from eat_dist.spaces import parse_space
from eat_dist.sweeps import SweepPlan, resume_sweep, start_sweep
from small_runs import small_config, weights

# One member, two iterations an epoch: what costs time here is Ray's starting of processes.
SMALL = (
    "data.batch_size=270",
    "data.images_per_class=90",
    "ensemble.members=1",
    "attack.num_steps=1",
    "evaluation.num_steps=1",
    "evaluation.kmeans_seeds=1",
    "evaluation.objectives=[displacement]",
)
SPACE = "attack.epsilon: {uniform: [0.05, 0.3]}\noptimiser.learning_rate: {log_uniform: [1e-4, 1e-2]}"


def plan_of(*assignments: str, space: str = SPACE, **changes: Any) -> SweepPlan:
    base = small_config(*SMALL, *assignments)
    values = {
        "name": "digits-test",
        "base": base,
        "space": parse_space(yaml.safe_load(space), name="test", source="space"),
        "trials": 3,
        "search": "random",
        "scheduler": "asha",
        "objective": "attacked_nmi",
        "validation_share": 0.4,
        "seed": 1,
        "concurrent": None,
        "grace_period": 1,
        "reduction_factor": 2,
    }
    return SweepPlan(**{**values, **changes})


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return json.loads((folder / "sweep.json").read_text()), json.loads((folder / "trials.json").read_text())


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_stops_bad_trials_and_ends_with_the_best_config(tmp_path: Path, ray_session: None) -> None:
    """Slow: six starts of Ray Train. Two trials run at once; with one learning rate the loss is not finite."""
    folder, database = tmp_path / "sweep", tmp_path / "mlflow.db"
    space = "optimiser.learning_rate: {grid: [1e-3, 1e30]}\nattack.epsilon: {grid: [0.1, 0.2]}"
    plan = plan_of(
        "train.epochs=2",
        "tracking.enabled=true",
        f"tracking.uri=sqlite:///{database}",
        space=space,
        search="grid",
        trials=4,
    )

    swept = start_sweep(plan, sweep_dir=str(folder), command="eat-dist sweep", console=Console())

    assert settled_groups() == [], "the sweep left placement groups behind"
    state, trials = read(folder)
    assert (state["concurrent"], state["rungs"], state["evaluation_epsilon"]) == (2, [1, 2], 0.2)
    assert [trial["id"] for trial in trials] == ["0000", "0001", "0002", "0003"]
    statuses = [trial["status"] for trial in trials]
    assert "FINISHED" in statuses
    assert set(statuses) <= {"FINISHED", "PRUNED", "FAILED"}
    for trial in trials:
        diverges = trial["settings"]["optimiser.learning_rate"] == 1e30
        assert (trial["status"] == "FAILED") == diverges
        assert (trial["error"] is not None and "lower optimiser.learning_rate" in trial["error"]) == diverges
        assert [entry["epoch"] for entry in trial["results"]] == {"FINISHED": [1, 2], "PRUNED": [1], "FAILED": []}[
            trial["status"]
        ]
        for entry in trial["results"]:
            assert set(entry["figures"]) == {"clean/r_at_1", "clean/nmi", "worst/r_at_1", "worst/nmi"}
            assert entry["objectives"] == {"attacked_nmi": entry["figures"]["worst/nmi"]}
    finished = {trial["id"]: trial for trial in trials if trial["status"] == "FINISHED"}
    assert state["best"] == max(finished, key=lambda name: finished[name]["results"][-1]["objectives"]["attacked_nmi"])

    best = load_config(folder / "best.yaml")
    assert swept.configs == ["best.yaml"]
    assert best.data.validation_share == 0
    assert best.optimiser.learning_rate == 1e-3
    assert best.attack.epsilon == finished[state["best"]]["settings"]["attack.epsilon"]

    # A finished trial is a finished run, on validation classes.
    run = folder / finished[state["best"]]["run_folder"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["worst"]["nmi"] == finished[state["best"]]["results"][-1]["figures"]["worst/nmi"]
    whole = load_dataset(load_config(None).data)
    splits = (run / "splits.parquet").read_bytes()
    assert splits
    assert summary["evaluation"]["images"] < len(whole.train)
    assert summary["evaluation"]["images"] != len(whole.test)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    runs = client.search_runs([client.get_experiment_by_name("eat_dist").experiment_id])
    parent = next(run for run in runs if run.info.run_id == state["mlflow_run_id"])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 1 + len(children) == 5
    assert "mlflow.parentRunId" not in parent.data.tags
    assert parent.info.status == "FINISHED"
    as_mlflow_says = {"FINISHED": "FINISHED", "PRUNED": "KILLED", "FAILED": "FAILED"}
    for trial in trials:
        child = next(run for run in children if run.info.run_id == trial["mlflow_run_id"])
        assert child.info.status == as_mlflow_says[trial["status"]]
        if trial["results"]:
            assert child.data.metrics["attacked_nmi"] == trial["results"][-1]["objectives"]["attacked_nmi"]
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {"best.yaml", "trials.json"}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_whose_process_is_killed_goes_on_with_the_same_trials(tmp_path: Path, ray_session: None) -> None:
    """Slow: a Ray cluster of its own, killed with it, and four starts of Ray Train."""
    folder, space = tmp_path / "sweep", tmp_path / "space.yaml"
    space.write_text(SPACE)
    base = small_config(*SMALL, "train.epochs=2")
    config = tmp_path / "base.yaml"
    config.write_text(yaml.safe_dump(base.model_dump(mode="json")))
    options = {"--config": config, "--space": space, "--sweep-dir": folder, "--trials": 2, "--concurrent": 1}
    options |= {"--search": "random", "--validation-share": 0.4, "--grace-period": 1, "--scheduler": "asha"}
    command = [sys.executable, "-m", "eat_dist", "sweep", *(str(part) for pair in options.items() for part in pair)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        while not (folder / "trials" / "0000" / "rungs" / "0001" / "result.json").exists():
            assert process.poll() is None, process.stdout and process.stdout.read().decode()
            time.sleep(0.1)
        with pytest.raises(StorageError, match=f"is being worked on by process {process.pid} "):
            resume_sweep(str(folder), console=Console())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    state, before = read(folder)
    assert [trial["status"] for trial in before] == ["RUNNING"]
    assert state["best"] is None
    at_the_rung = (folder / "trials" / "0000" / "rungs" / "0001" / "result.json").read_text()

    resume_sweep(str(folder), console=Console())

    _, after = read(folder)
    assert [trial["id"] for trial in after] == ["0000", "0001"]
    assert after[0]["settings"] == before[0]["settings"]
    assert after[0]["status"] == "FINISHED"
    assert [entry["epoch"] for entry in after[0]["results"]] == [1, 2]
    assert (folder / "trials" / "0000" / "rungs" / "0001" / "result.json").read_text() == at_the_rung
    summary = json.loads((folder / "trials" / "0000" / "summary.json").read_text())
    assert summary["resumed_from_iteration"] == summary["iterations"] // 2, "finished epochs were trained again"
    assert (folder / "best.yaml").exists()
    assert weights(folder / "trials" / "0000", members=1)
    assert settled_groups() == []


@pytest.mark.ray
def test_more_trials_at_once_than_the_cluster_holds_are_refused(tmp_path: Path, ray_session: None) -> None:
    plan = plan_of("cluster.cpus_per_member=1", concurrent=8, trials=8)

    with pytest.raises(ClusterError, match=r"8 members \(8 trials at once × 1\) need 1 CPU each; .* room for 2"):
        start_sweep(plan, sweep_dir=str(tmp_path / "sweep"), command="", console=Console())

    assert not (tmp_path / "sweep").exists()


# A hundred stopped trials


def train_a_little(task: Mapping[str, Any], report: Any, *, folder: str) -> None:
    """A trial of one iteration a rung, that gets worse with its number, so that every later one is stopped."""
    from eat_dist.cluster.train import train_on_ray
    from eat_dist.storage import Folder

    config = small_config("data.batch_size=900", "data.images_per_class=180", "train.epochs=2", *SMALL[2:])
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"cpus_per_member": 0.5, "threads_per_member": 1})}
    )
    run = Folder.at(f"{folder}/{task['id']}")
    for epoch in (1, 2):
        train_on_ray(config, num_classes=5, run_folder=run, until_epoch=epoch)
        report({"epoch": epoch, "objective": -float(task["id"])})


class CountingBook:
    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.begun = 0
        self.epochs: dict[str, int] = {}
        self.errors: dict[str, str | None] = {}
        self.most_groups = 0

    def begin(self) -> Mapping[str, Any] | None:
        if self.begun == self.trials:
            return None
        self.begun += 1
        return {"id": f"{self.begun:04d}"}

    def learn(self, trial: str, result: Mapping[str, Any]) -> None:
        self.epochs[trial] = result["epoch"]
        self.most_groups = max(self.most_groups, len(groups_left()))

    def end(self, trial: str, *, error: str | None) -> None:
        self.errors[trial] = error
        print(f"{len(self.errors)} ended, {len(groups_left())} placement groups", flush=True)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(6 * 3600)
def test_a_hundred_stopped_trials_leave_no_placement_group(tmp_path: Path, ray_session: None) -> None:
    """Long: a hundred starts of Ray Train, four at once on half a CPU each."""
    import ray.cloudpickle

    from eat_dist.cluster.tune import Halving, run_trials

    for module in (__name__, small_config.__module__):  # workers do not know this folder
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    book, concurrent = CountingBook(int(os.environ.get("EAT_DIST_STOPPED_TRIALS", "101"))), 4

    run_trials(
        partial(train_a_little, folder=str(tmp_path)),
        book,
        trials=book.trials,
        concurrent=concurrent,
        halving=Halving("objective", grace_period=1, reduction_factor=2, epochs=2),
        max_failures=0,
    )

    assert set(book.errors.values()) == {None}
    stopped = [trial for trial, epoch in book.epochs.items() if epoch == 1]
    # Only a trial that reports before all better ones goes on, and better ones are earlier ones: so the first at once.
    assert len(stopped) >= book.trials - concurrent
    # At a report a trial holds its own group and nothing else; Ray Train's is gone.
    assert book.most_groups <= 2 * concurrent
    assert settled_groups() == []
