"""What a study without Ray counts, refuses, tells MLflow, and ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from eat_dist import cli
from eat_dist.errors import RunsFailedError, StorageError
from small_runs import small_config
from small_studies import ROWS, SETTINGS, go, state, write


def test_equal_passes_make_equal_counts(tmp_path: Path) -> None:
    """One attack step: three passes an iteration of pgd_at, one of natural, so thrice the epochs."""
    go(tmp_path, budget={"passes": "pgd_at"}, seeds=[0])

    runs = {run["row"]: run for run in state(tmp_path)["runs"]}
    assert {row: run["epochs"] for row, run in runs.items()} == {"natural": 6, "pgd_at": 2}
    assert {run["passes"] for run in runs.values()} == {24}


def test_a_folder_that_is_no_study_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("years of work")

    with pytest.raises(StorageError, match="holds something that is no study"):
        go(tmp_path)
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["thesis.txt"]


def test_nothing_is_left_where_the_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no defense is called"):
        go(tmp_path, rows={"a": {"defense.name": "nope"}})
    with pytest.raises(Exception, match="row 'a' on digits: 1 of the 6 parts would be empty"):
        go(tmp_path, rows={"a": {"ensemble.split": {"rule": "disjoint", "by": "class", "parts": 6}}})
    assert not (tmp_path / "study").exists()


def test_a_loss_that_is_not_finite_is_one_runs_own_fault(tmp_path: Path) -> None:
    bad = {"defense.name": "natural", "optimiser.learning_rate": 1e30}

    with pytest.raises(RunsFailedError, match=r"bad-digits-s0: member .*lower optimiser.learning_rate"):
        go(tmp_path, rows={"bad": bad} | ROWS, seeds=[0])
    assert [run["status"] for run in state(tmp_path)["runs"]] == ["FAILED", "FINISHED", "FINISHED"]


def test_mlflow_has_one_parent_and_a_child_a_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    go(tmp_path, "tracking.enabled=true", f"tracking.uri={uri}", seeds=[0])

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("eat_dist").experiment_id])
    content = state(tmp_path)
    parent = client.get_run(content["mlflow_run_id"])
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {"natural-digits-s0", "pgd_at-digits-s0"}
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in content["runs"]:
        child = children[run["name"]]
        assert child.info.run_id == run["mlflow_run_id"]
        assert child.data.metrics["worst/nmi"] == pytest.approx(run["figures"]["worst/nmi"])
        assert parent.data.metrics[f"digits/{run['row'].replace('_', '-')}/worst/nmi"] == pytest.approx(
            run["figures"]["worst/nmi"]
        )
    assert parent.data.params["rows"] == "natural, pgd_at"
    files = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert files == {"study.yaml", "study.json", "table.md", "table.csv", "report.html"}


def test_the_child_of_a_killed_run_does_not_stay_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that died before its first checkpoint leaves it: the run starts again, as another child."""
    from mlflow import MlflowClient

    from eat_dist.tracking import Tracker

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracked = ("tracking.enabled=true", f"tracking.uri={uri}")
    dead = Tracker.start(small_config(*tracked), run_name="natural-digits-s0", tags={}, resume_run_id=None, wait=120)
    assert dead.run_id is not None
    folder = tmp_path / "study" / "runs" / "natural-digits-s0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"schema": 1, "data": {}, "mlflow_run_id": dead.run_id}))
    (folder / "config.yaml").write_text(yaml.safe_dump(small_config(*SETTINGS).model_dump(mode="json")))
    (tmp_path / "study" / "study.json").write_text(json.dumps({"schema": 1, "runs": []}))

    go(tmp_path, *tracked, rows={"natural": ROWS["natural"]}, seeds=[0])

    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(dead.run_id).info.status == "KILLED"
    child = client.get_run(state(tmp_path)["runs"][0]["mlflow_run_id"])
    assert child.info.status == "FINISHED"
    assert child.info.run_id != dead.run_id


def test_the_command_ends_with_an_exit_code_that_says_whether_runs_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write(tmp_path, rows={"natural": {"defense.name": "natural", "optimiser.learning_rate": 1e30}}, seeds=[0])
    words = ["eat-dist", "study", str(study), "--backend", "local", "--study-dir", str(tmp_path / "study")]
    monkeypatch.setattr(sys, "argv", words)

    with pytest.raises(SystemExit) as left:
        cli.main()

    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of 1 runs failed: natural-digits-s0: ")


def test_without_ray_there_is_nothing_to_be_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eat-dist", "study", str(write(tmp_path)), "--backend", "local", "--concurrent", "2"]
    monkeypatch.setattr(sys, "argv", words)

    with pytest.raises(SystemExit):
        cli.main()
    assert "leave out --concurrent" in capsys.readouterr().err


def test_a_study_without_ray_never_imports_it(tmp_path: Path) -> None:
    code = "import sys, eat_dist.studies, eat_dist.cli_study; sys.exit('ray' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
