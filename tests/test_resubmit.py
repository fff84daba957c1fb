"""The same training command given again goes on where the run stands (``--resume-or-start``)."""

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

import pytest
import yaml

from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.errors import CheckpointError, StorageError
from eat_dist.runs import Finished, resume_or_start, start_run
from eat_dist.runs.lease import LEASE
from small_runs import small_config

PLAIN = ["cluster.backend=local", "evaluation.protocol=none", "ensemble.members=2"]


def go(folder: Path, *assignments: str) -> Finished:
    return resume_or_start(small_config(*PLAIN, *assignments), run_dir=str(folder), console=Console())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 iterations with checkpoints at 15 and 20."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert go(folder).summary["iterations"] == 20
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def interrupt(run: Path) -> None:
    """As a driver that died after the checkpoint at 15 leaves it."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "00000020")


def test_a_run_with_a_checkpoint_goes_on_to_the_same_weights(finished: Path, run: Path) -> None:
    interrupt(run)

    again = go(run, "checkpoint.every=2", "cluster.gather_timeout=50")  # these may change

    whole = json.loads((finished / "summary.json").read_text())
    assert again.summary["resumed_from_iteration"] == 15
    assert again.summary["weights_sha256"] == whole["weights_sha256"]
    assert yaml.safe_load((run / "config.yaml").read_text())["checkpoint"]["every"] == 2


def test_a_finished_run_is_reported_and_left_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    again = go(run)

    assert again.summary == json.loads((run / "summary.json").read_text())
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_an_attempt_that_died_before_its_first_checkpoint_starts_anew_with_whatever_config(run: Path) -> None:
    interrupt(run)
    shutil.rmtree(run / "checkpoints")
    (run / "statistics" / "left_over.parquet").write_bytes(b"")

    again = go(run, "seed=7")

    assert again.summary["resumed_from_iteration"] == 0
    assert again.summary["seed"] == 7
    assert not (run / "statistics" / "left_over.parquet").exists()


@pytest.mark.parametrize("stage", ["interrupted", "finished"])
def test_another_config_is_refused_with_the_keys_that_differ_and_nothing_changes(stage: str, run: Path) -> None:
    if stage == "interrupted":
        interrupt(run)
    before = (run / "config.yaml").read_bytes()

    with pytest.raises(CheckpointError) as refused:
        go(run, "attack.epsilon=0.1", "model.widths=[8,8]", "checkpoint.every=2")

    assert "model.widths is [8, 16] there and [8, 8] here; attack.epsilon is 0.2 there and 0.1 here." in str(
        refused.value
    )
    assert "checkpoint" not in str(refused.value).split("configuration:")[1]
    assert (run / "config.yaml").read_bytes() == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(StorageError, match="is not a run folder"):
        go(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def command(folder: Path, *assignments: str) -> list[str]:
    values = yaml.safe_dump(small_config(*PLAIN, *assignments).model_dump(mode="json"))
    config = folder.parent / "given.yaml"
    config.write_text(values)
    train = [sys.executable, "-m", "eat_dist", "train", "--config", str(config), "--run-dir", str(folder)]
    return [*train, "--resume-or-start"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended first"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_second_command_is_refused_while_the_first_trains_and_goes_on_after_its_sigkill(tmp_path: Path) -> None:
    """Slow: real commands in processes of their own, the first killed in mid-run."""
    folder = tmp_path / "run"
    again = command(folder, "train.epochs=40", "attack.num_steps=10")
    first = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(folder.glob("checkpoints/*/checkpoint.json")), first)

    second = subprocess.run(again, capture_output=True, text=True, check=False)
    overwriting = load_config(tmp_path / "given.yaml")
    with pytest.raises(StorageError, match=f"process {first.pid} on"):
        start_run(overwriting, run_dir=str(folder), overwrite=True, console=Console())

    assert second.returncode == 2
    assert second.stderr.startswith(f"error: '{folder}' is being worked on by process {first.pid} on ")
    assert second.stderr.count("\n") == 1
    assert first.poll() is None
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (folder / LEASE).exists()

    third = subprocess.run(again, capture_output=True, text=True, check=False)

    assert third.returncode == 0, third.stderr
    assert "Resuming from iteration" in third.stdout
    assert json.loads((folder / "summary.json").read_text())["resumed_from_iteration"] > 0
    assert not (folder / LEASE).exists()
