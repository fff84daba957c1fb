"""Whole studies in this process, without Ray: what they leave, and that nothing stops them for good."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY
from eat_dist import cli
from eat_dist.errors import CheckpointError, RunsFailedError, StorageError
from eat_dist.studies import study as study_module
from small_studies import ROWS, go, state, write


def run_files(folder: Path) -> dict[Path, int]:
    runs = folder / "study" / "runs"
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}


def digest(folder: Path, run: str) -> str:
    return str(json.loads((folder / "study" / "runs" / run / "summary.json").read_text())["weights_sha256"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    go(folder)
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, to be changed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_study_leaves_a_run_folder_each_a_record_and_tables(finished: Path) -> None:
    content = state(finished)
    assert content["schema"] == 1
    assert [run["name"] for run in content["runs"]] == [
        "natural-digits-s0",
        "pgd_at-digits-s0",
        "natural-digits-s1",
        "pgd_at-digits-s1",
    ]
    for run in content["runs"]:
        here = finished / "study" / run["run_folder"]
        summary = json.loads((here / "summary.json").read_text())
        config = yaml.safe_load((here / "config.yaml").read_text())
        assert (config["seed"], config["defense"]["name"]) == (run["seed"], run["row"])
        assert run["figures"] == {
            f"{part}/{figure}": summary[part][figure] for part in ("clean", "worst") for figure in ("r_at_1", "nmi")
        }
        # Two members, four iterations; natural one pass, pgd_at an attack step and two losses.
        assert run["passes"] == 2 * 4 * {"natural": 1, "pgd_at": 3}[run["row"]]
        assert 0 < run["training_seconds"] < run["seconds"]
        assert (run["status"], run["error"], run["measured"]["protocol"]) == ("FINISHED", None, "quick")
    names = {path.name for path in (finished / "study").iterdir()}
    assert names == {
        *("runs", "study.json", "study.yaml", "table.md", "table.csv", "report.html", "report_figures"),
    }
    assert (finished / "study" / "table.md").read_text().count("| 2 |") == 4  # M and seeds of two rows
    assert (finished / "study" / "study.yaml").read_bytes() == (finished / "study.yaml").read_bytes()


def test_a_finished_study_given_again_changes_no_run(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, table = run_files(again), (again / "study" / "table.md").read_text()

    go(again)

    assert run_files(again) == before
    assert (again / "study" / "table.md").read_text() == table
    assert "4 runs (2 rows × 1 datasets × 2 seeds), 4 of them finished" in capsys.readouterr().out


def test_rows_and_seeds_may_be_added(again: Path) -> None:
    before = run_files(again)

    go(again, rows=ROWS | {"eat": {}}, seeds=[0, 1, 2])

    after = run_files(again)
    assert {path: after[path] for path in before} == before
    assert len(state(again)["runs"]) == 9
    assert "| eat | 2 |" in (again / "study" / "table.md").read_text()


def test_a_row_trained_at_another_radius_may_be_added(again: Path) -> None:
    """It needs evaluation.epsilon for all rows; the radius that the others had without it changes nothing for them."""
    before = run_files(again)

    go(again, "evaluation.epsilon=0.2", rows=ROWS | {"wider": {"defense.name": "pgd_at", "attack.epsilon": 0.25}})

    assert {path: after for path, after in run_files(again).items() if path in before} == before
    assert {run["measured"]["epsilon"] for run in state(again)["runs"]} == {"0.2"}


def test_what_is_no_longer_part_of_the_study_is_left_out_and_left_alone(
    again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run_files(again)

    go(again, seeds=[1])

    assert run_files(again) == before
    assert [run["name"] for run in state(again)["runs"]] == ["natural-digits-s1", "pgd_at-digits-s1"]
    assert "2 runs are no longer part of the study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"rows": ROWS | {"natural": {"defense.name": "natural", "optimiser.learning_rate": 1e-3}}},
            "natural-digits-s0: optimiser.learning_rate is 0.0005 there and 0.001 here; natural-digits-s1: ",
        ),
        ({"set": {"evaluation.num_steps": 2}}, "evaluation.num_steps is 1 there and 2 here"),
        ({"budget": {"passes": "pgd_at"}}, "natural-digits-s0: train.epochs is 2 there and 6 here"),
    ],
)
def test_a_changed_study_is_refused_with_what_differs(again: Path, changes: dict[str, Any], expected: str) -> None:
    before, content = run_files(again), state(again)

    with pytest.raises(CheckpointError) as refused:
        go(again, **changes)

    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (run_files(again), state(again)) == (before, content)


def test_what_does_not_decide_the_figures_may_change(again: Path) -> None:
    before = run_files(again)
    go(again, "cluster.gather_timeout=50", "checkpoint.keep=1")
    assert run_files(again) == before


def test_changed_images_are_refused(again: Path) -> None:
    place = again / "study" / "runs" / "pgd_at-digits-s1" / "run.json"
    about = json.loads(place.read_text())
    about["data"]["test"] = "0" * 64
    place.write_text(json.dumps(about))

    with pytest.raises(CheckpointError, match=r"the images are not those that '.*pgd_at-digits-s1' was trained on"):
        go(again)


def test_two_at_once_on_one_study_are_refused(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*arguments: Any, **options: Any) -> None:
        go(again)

    monkeypatch.setattr(study_module, "load_all", meanwhile)
    with pytest.raises(StorageError, match="is being worked on by process"):
        go(again)


# What goes wrong


def test_a_failed_run_is_named_and_the_others_go_on_and_it_is_tried_again(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study_module.run_task

    def stumble(task: Any, report: Callable[[Any], None]) -> None:
        if task["id"] == "pgd_at-digits-s0":
            raise MemoryError("no\nroom")
        whole(task, report)

    monkeypatch.setattr(study_module, "run_task", stumble)
    with pytest.raises(
        RunsFailedError, match=r"1 of 4 runs failed: pgd_at-digits-s0: MemoryError: no room\. The others"
    ):
        go(tmp_path)

    statuses = {run["name"]: (run["status"], run["error"]) for run in state(tmp_path)["runs"]}
    assert statuses.pop("pgd_at-digits-s0") == ("FAILED", "MemoryError: no room")
    assert set(statuses.values()) == {("FINISHED", None)}
    table = (tmp_path / "study" / "table.md").read_text()
    assert "- pgd_at-digits-s0: MemoryError: no room" in table
    assert "| 1 of 2 |" in table

    monkeypatch.undo()
    go(tmp_path)
    assert {run["status"] for run in state(tmp_path)["runs"]} == {"FINISHED"}
    assert digest(tmp_path, "pgd_at-digits-s0") == digest(finished, "pgd_at-digits-s0")


@pytest.mark.parametrize("file", ["summary.json", "evaluation/quick/summary.json", "statistics/00000000.parquet"])
def test_a_damaged_run_is_named_with_a_way_out(again: Path, file: str) -> None:
    here = again / "study" / "runs" / "pgd_at-digits-s1"
    whole = (here / file).read_bytes()
    (here / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError) as refused:
        go(again)
    assert str(refused.value).startswith("run 'pgd_at-digits-s1' is finished, but cannot be used: ")
    assert "delete its folder and it is trained again" in str(refused.value)
    assert "\n" not in str(refused.value)
    shutil.rmtree(here)
    go(again)
    assert {run["status"] for run in state(again)["runs"]} == {"FINISHED"}


def test_figures_of_an_older_form_are_measured_again_before_they_are_compared(
    again: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    here = again / "study" / "runs" / "pgd_at-digits-s1"
    path = here / "evaluation" / "quick" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 3}))
    with pytest.raises(StorageError, match=r"is of schema 3, and this eat_dist measures schema 4\. Measure it again"):
        go(again)
    assert run("evaluate", here)[0] == 0, "the way out that the message shows"
    go(again)
    assert {run["status"] for run in state(again)["runs"]} == {"FINISHED"}


def test_all_runs_that_cannot_be_used_are_named_at_once(again: Path) -> None:
    runs = again / "study" / "runs"
    names = sorted(here.name for here in runs.iterdir())
    for name in names:
        (runs / name / "summary.json").write_text("{")
    with pytest.raises(StorageError) as refused:
        go(again)
    assert all(name in str(refused.value) for name in names)
    assert f"({len(names) - 1} more cannot be used: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_seconds_that_are_not_on_record_are_not_taken_for_none_at_all(again: Path) -> None:
    shutil.rmtree(again / "study" / "runs" / "pgd_at-digits-s1" / "statistics")
    go(again)
    seconds = {run["name"]: run["training_seconds"] for run in state(again)["runs"]}
    assert seconds["pgd_at-digits-s1"] is None
    assert seconds["pgd_at-digits-s0"] > 0


def test_an_evaluation_with_other_settings_ends_the_comparison(again: Path) -> None:
    """As ``eat-dist evaluate RUN --set evaluation.kmeans_seeds=3`` leaves it."""
    summary = again / "study" / "runs" / "pgd_at-digits-s1" / "evaluation" / "quick" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"kmeans_seeds": 3}))
    go(again)
    assert "the runs differ in kmeans_seeds" in (again / "study" / "table.md").read_text()


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At an epoch's end: the epochs before are not trained again."""
    from eat_dist.checkpoint import Checkpoints

    commit, left = Checkpoints.commit, {"checkpoints": 3}

    def interrupted(self: Checkpoints, *arguments: Any, **options: Any) -> None:
        commit(self, *arguments, **options)
        left["checkpoints"] -= 1
        if left["checkpoints"] == 0:
            raise KeyboardInterrupt

    study = write(tmp_path)
    words = ["eat-dist", "study", str(study), "--backend", "local", "--study-dir", str(tmp_path / "study")]
    monkeypatch.setattr(Checkpoints, "commit", interrupted)
    monkeypatch.setattr(sys, "argv", words)
    ended: list[int] = []
    monkeypatch.setattr(cli, "_leave", ended.append)

    cli.main()

    assert ended == [130]
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == "interrupted; continue with: the same command"
    statuses = [run["status"] for run in state(tmp_path)["runs"]]
    assert statuses == ["FINISHED", "INTERRUPTED", "WAITING", "WAITING"]
    assert "| 1 of 2 |" in (tmp_path / "study" / "table.md").read_text()

    monkeypatch.undo()
    before = run_files(tmp_path)
    go(tmp_path)
    runs = state(tmp_path)["runs"]
    assert {run["status"] for run in runs} == {"FINISHED"}
    first = {path: stamp for path, stamp in before.items() if "natural-digits-s0" in str(path)}
    assert first.items() <= run_files(tmp_path).items()
    second = json.loads((tmp_path / "study" / "runs" / "pgd_at-digits-s0" / "summary.json").read_text())
    assert second["resumed_from_iteration"] == 2
    assert second["weights_sha256"] == digest(finished, "pgd_at-digits-s0")


@pytest.mark.long
def test_a_killed_study_goes_on_where_it_was(tmp_path: Path, finished: Path) -> None:
    """Slow: two more processes. SIGKILL while the second run trains: the first stays, the second goes on."""
    study = write(tmp_path, set={"train.epochs": 40})
    command = [sys.executable, "-m", "eat_dist", "study", str(study), "--backend", "local"]
    command += ["--study-dir", str(tmp_path / "study")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    second = tmp_path / "study" / "runs" / "pgd_at-digits-s0"
    try:
        deadline = time.monotonic() + 200
        while len(list(second.glob("checkpoints/*/checkpoint.json"))) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline, "the second run never had two checkpoints"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [run["status"] for run in state(tmp_path)["runs"]] == ["FINISHED", "RUNNING", "WAITING", "WAITING"]
    assert not (second / "summary.json").exists()
    before = {path: stamp for path, stamp in run_files(tmp_path).items() if "natural-digits-s0" in str(path)}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert {run["status"] for run in state(tmp_path)["runs"]} == {"FINISHED"}
    assert before.items() <= run_files(tmp_path).items()
    summary = json.loads((second / "summary.json").read_text())
    assert summary["resumed_from_iteration"] >= 2 * 2
    assert state(tmp_path)["runs"][1]["passes"] == 2 * 3 * summary["iterations"]
    assert "study.json" in os.listdir(tmp_path / "study")
    assert "lease.json" not in os.listdir(tmp_path / "study")
