"""An MLflow store that answers late costs neither a second run nor a child without a parent, here or after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from late_store import LateStore, wait_until
from sweep_plans import FIGURES, SPACE, ledger_of, plan_of

from eat_dist.console import Console
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.runs import resume_run, start_run
from eat_dist.schedule import Schedule
from eat_dist.storage import Folder
from eat_dist.sweeps.record import read_trials
from eat_dist.sweeps.sweep import _Sweep
from eat_dist.tracking import PARENT_TAG, delivery
from mlflow_server import clean_environment, client
from small_runs import small_config
from small_studies import go, state

ITERATIONS = 20  # of small_config, with checkpoints at 5, 10, 15 and 20


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "empty.db"
    client(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def late(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateStore]:
    """Asked for again twenty times a second."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.05)
    with clean_environment():
        yield LateStore(tmp_path / "late", empty)


@pytest.fixture
def at_the_end(late: LateStore, monkeypatch: pytest.MonkeyPatch) -> LateStore:
    """Asked for again only when whoever records is closing."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 600.0)
    return late


class At(Console):
    """Calls a function once, when training has come to an iteration."""

    def __init__(self, iteration: int, then: Callable[[], Any]) -> None:
        super().__init__()
        self.iteration, self.then = iteration, then

    @contextmanager
    def training(self, schedule: Schedule) -> Iterator[Callable[[EnsembleStatistics], None]]:
        def show(ensemble: EnsembleStatistics) -> None:
            if ensemble.iteration == self.iteration:
                self.then()

        yield show


def about(folder: Path, name: str = "run.json") -> Any:
    return json.loads((folder / name).read_text())


def run_config(late: LateStore) -> Any:
    settings = ("cluster.backend=local", "evaluation.protocol=none", "tracking.enabled=true")
    return small_config(*settings, f"tracking.uri={late.uri}")


def test_a_run_that_dies_after_a_late_answer_is_resumed_in_the_same_mlflow_run(late: LateStore, tmp_path: Path) -> None:
    folder, known = tmp_path / "run", []

    def come() -> None:
        assert about(folder)["mlflow_run_id"] is None
        late.come()
        wait_until(late.runs)

    class Dies(At):
        @contextmanager
        def training(self, schedule: Schedule) -> Iterator[Callable[[EnsembleStatistics], None]]:
            with super().training(schedule) as show:

                def until(ensemble: EnsembleStatistics) -> None:
                    if ensemble.iteration == 14:
                        known.append(about(folder)["mlflow_run_id"])  # a SIGKILL now would leave that
                        raise KeyboardInterrupt
                    show(ensemble)

                yield until

    with pytest.raises(KeyboardInterrupt):
        start_run(run_config(late), run_dir=str(folder), overwrite=False, console=Dies(7, come))
    [only] = late.runs()
    assert (only.info.status, known) == ("KILLED", [only.info.run_id])
    assert about(folder, "checkpoints/00000010/checkpoint.json")["mlflow_run_id"] is None

    finished = resume_run(str(folder), console=Console())

    assert [(run.info.run_id, run.info.status) for run in late.runs()] == [(only.info.run_id, "FINISHED")]
    assert finished.mlflow_run_id == finished.summary["mlflow_run_id"] == only.info.run_id


def test_an_answer_that_comes_when_a_run_ends_is_in_its_folder(at_the_end: LateStore, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    console = At(ITERATIONS, at_the_end.come)

    finished = start_run(run_config(at_the_end), run_dir=str(folder), overwrite=False, console=console)

    [only] = at_the_end.runs()
    assert only.info.status == "FINISHED"
    names = ("run.json", "summary.json")
    assert [about(folder, name)["mlflow_run_id"] for name in names] == [only.info.run_id] * 2
    assert finished.summary == about(folder, "summary.json")


def reported(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "figures": FIGURES, "attacked_nmi": 0.3}


def tracked_plan(late: LateStore) -> Any:
    return plan_of(SPACE, "tracking.enabled=true", f"tracking.uri={late.uri}", trials=2, search="random")


def test_a_trial_whose_mlflow_run_answers_late_is_one_child_after_a_resumption(late: LateStore, tmp_path: Path) -> None:
    plan, parents = tracked_plan(late), [None]
    folder = tmp_path / "sweep"
    ledger = ledger_of(folder, plan, parent=lambda: parents[-1])
    task = ledger.begin()
    assert task is not None
    assert (task["mlflow_run_id"], read_trials(Folder.at(folder))[0].mlflow_run_id) == (None, None)
    Folder.at(folder / "trials" / "0000").write_json("run.json", {"schema": 1, "mlflow_run_id": None})
    late.come()
    wait_until(lambda: ledger._trackers["0000"].run_id)
    parents.append("a" * 32)

    ledger.learn("0000", reported(2))
    [child] = late.runs()
    assert read_trials(Folder.at(folder))[0].mlflow_run_id == child.info.run_id
    ledger.interrupt()
    again = ledger_of(folder, plan, read_trials(Folder.at(folder)), parent=lambda: parents[-1])
    task = again.begin()
    again.interrupt()

    [child] = late.runs()
    assert task is not None
    assert task["mlflow_run_id"] == child.info.run_id
    assert child.data.tags[PARENT_TAG] == "a" * 32
    assert child.data.metrics["attacked_nmi"] == 0.3
    assert about(folder / "trials" / "0000")["mlflow_run_id"] == child.info.run_id


def test_an_answer_that_comes_when_a_trial_ends_is_on_record(at_the_end: LateStore, tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "sweep", tracked_plan(at_the_end))
    ledger.begin()
    at_the_end.come()

    ledger.end("0000", error=None)

    [child] = at_the_end.runs()
    [trial] = read_trials(Folder.at(tmp_path / "sweep"))
    assert (trial.mlflow_run_id, child.info.status) == (child.info.run_id, "KILLED")


def test_a_sweep_whose_mlflow_run_answers_late_has_it_on_record_from_then_on(late: LateStore, tmp_path: Path) -> None:
    sweep = _Sweep(tracked_plan(late), Folder.at(tmp_path / "sweep"), Console())
    sweep.folder.create()
    sweep.about = {"git": {}, "mlflow_run_id": None}
    sweep._write_state([], 0)
    sweep.tracker = sweep._track()
    assert (sweep._mlflow_run_id([], 1), about(tmp_path / "sweep", "sweep.json")["mlflow_run_id"]) == (None, None)
    late.come()
    wait_until(lambda: sweep.tracker is not None and sweep.tracker.run_id)

    known = sweep._mlflow_run_id([], 2)

    [parent] = late.runs()
    assert known == parent.info.run_id == about(tmp_path / "sweep", "sweep.json")["mlflow_run_id"]
    sweep.tracker.close("FINISHED")


def test_an_answer_that_comes_when_a_study_ends_is_on_record(
    at_the_end: LateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = Console.say

    def come(console: Console, text: str) -> None:
        say(console, text)
        if "starts" in text:
            at_the_end.come()

    monkeypatch.setattr(Console, "say", come)

    settings = ("tracking.enabled=true", f"tracking.uri={at_the_end.uri}")
    studied = go(tmp_path, *settings, rows={"natural": {"defense.name": "natural"}}, seeds=[0])

    runs = {run.info.run_name: run for run in at_the_end.runs()}
    assert state(tmp_path)["mlflow_run_id"] == studied.mlflow_run_id == runs["study"].info.run_id
    [record] = state(tmp_path)["runs"]
    assert record["mlflow_run_id"] == runs["natural-digits-s0"].info.run_id
    assert len(runs) == 2
