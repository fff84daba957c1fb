"""Nodes that are gone for a while cost a sweep and a study nothing but time; a fault of a trial stays its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sweep_plans import ledger_of, plan_of

from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.errors import ClusterError, DataError, MembersFailedError
from eat_dist.storage import Folder
from eat_dist.studies import load_study
from eat_dist.studies.book import Ledger as StudyLedger
from eat_dist.studies.plan import plan_runs
from eat_dist.studies.record import Record
from eat_dist.sweeps.record import read_trials
from small_studies import write

PLAN = plan_of("attack.epsilon: {uniform: [0.05, 0.3]}", search="random", trials=5)


def fail_by_number(task: Mapping[str, Any], report: Any) -> None:
    """What the third trial meets is of the cluster, what the first two meet is their own."""
    match task["id"]:
        case "0000":
            raise DataError("an image is damaged")
        case "0001":
            raise MembersFailedError("training stopped, with up to 3 restarts tried; member 0 failed: out of memory")
        case _:
            raise ClusterError("6 members need 1 GPU each; the cluster has 4 GPUs, room for 4.")


@pytest.mark.ray
def test_a_trial_that_lacks_nodes_is_interrupted_and_the_sweep_goes_on_with_it_when_they_are_back(
    tmp_path: Path, ray_session: None
) -> None:
    import ray.cloudpickle

    from eat_dist.cluster.tune import run_trials

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    book = ledger_of(tmp_path, PLAN)

    with pytest.raises(ClusterError, match="6 members need 1 GPU each"):
        run_trials(fail_by_number, book, trials=book.left, concurrent=1, halving=None, max_failures=0)

    trials = read_trials(Folder.at(tmp_path))
    assert [trial.status for trial in trials] == ["FAILED", "FAILED", "INTERRUPTED"], "no other trial begins"
    assert [trial.error is None for trial in trials] == [False, False, True]
    resumed = ledger_of(tmp_path, PLAN, trials)
    tasks = [resumed.begin() for _ in range(3)]
    assert [task["id"] for task in tasks if task] == ["0002", "0003", "0004"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_finds_no_room_stops_with_the_reason_and_how_to_go_on(tmp_path: Path, ray_session: None) -> None:
    """Something else holds the CPUs, which a sweep cannot see before its members ask. Slow: Ray Train asks for 10 s."""
    import ray
    from ray.util import placement_group, remove_placement_group

    from eat_dist.sweeps import start_sweep

    held = placement_group([{"CPU": 2}])
    ray.get(held.ready())
    base = ("cluster.wait_for_nodes=1", "cluster.cpus_per_member=1", "cluster.device=cpu", "ensemble.members=2")
    plan = plan_of("attack.epsilon: {uniform: [0.05, 0.3]}", *base, search="random", trials=3)
    folder = tmp_path / "sweep"

    try:
        with pytest.raises(ClusterError) as stopped:
            start_sweep(plan, sweep_dir=str(folder), command="", console=Console())
    finally:
        remove_placement_group(held)

    message = str(stopped.value)
    assert "2 members need 1 CPU each" in message
    assert f"go on with eat-dist sweep --resume {folder}" in message
    assert "\n" not in message
    assert [trial.status for trial in read_trials(Folder.at(folder))] == ["INTERRUPTED"]


def test_a_run_of_a_study_that_lacks_nodes_is_interrupted(tmp_path: Path) -> None:
    folder, run = Folder.at(tmp_path / "study"), plan_runs(load_study(write(tmp_path), []), local=False)[0]
    record = Record.of(run)
    ledger = StudyLedger(
        folder,
        [run],
        {run.name: record},
        write=lambda: None,
        config_of=lambda run: run.config,
        parent_run_id=lambda: None,
        console=Console(),
    )
    ledger.begin()

    ledger.suspend(run.name, reason="the cluster has room for 4")

    assert (record.status, record.error, ledger.under_way) == ("INTERRUPTED", None, False)


@pytest.mark.ray
def test_an_evaluation_whose_gpus_are_gone_says_so(monkeypatch: pytest.MonkeyPatch, ray_session: None) -> None:
    import ray

    from eat_dist.runs.evaluation import Subject, _workers

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    subject = Subject("run", load_config(None, ["cluster.device=cuda"]))

    with pytest.raises(ClusterError, match="no living node of the cluster has one"), _workers(subject, 1, Console()):
        pass
