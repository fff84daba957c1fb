"""Tracking against real stores: a sqlite file, a server process, and addresses where nothing answers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from eat_dist.config import ModelConfig, parse_config
from eat_dist.models.ensemble import EmbeddingEnsemble, EnsembleSpec, save_ensemble
from eat_dist.tracking import Tracker, delivery
from eat_dist.tracking.store import ENVIRONMENT
from mlflow_server import Server, assert_everything_arrived, client, free_port, log_everything, warnings_of

CALL_LIMIT = 1.0
"""Seconds a logging call may take, whatever the store does."""


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite store with MLflow's tables and nothing in them; making those takes two seconds or more."""
    file = tmp_path_factory.mktemp("store") / "empty.db"
    client(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder and no MLflow variables; what the tracker or a test sets is undone."""
    for name in [*os.environ, *ENVIRONMENT, "MLFLOW_TRACKING_URI"]:
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, "")  # remembers the value, absent or not, and restores it
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)


@pytest.fixture
def store(empty_store: Path, working_folder: Path) -> None:
    """Spares the test MLflow's migrations of a new file."""
    shutil.copy(empty_store, working_folder / "mlflow.db")


def start(uri: str | None = None, *, resume: str | None = None, wait: float = 60.0) -> Tracker:
    config = parse_config({"tracking": {"uri": uri}, "train": {"epochs": 30}})
    return Tracker.start(config, run_name="a run", tags={"commit": "abc"}, resume_run_id=resume, wait=wait)


def small_ensemble(folder: Path) -> EmbeddingEnsemble:
    torch.manual_seed(0)
    spec = EnsembleSpec(ModelConfig(widths=(4, 8), embedding_dim=6), (1, 8, 8), members=3)
    ensemble = spec.build().eval()
    save_ensemble(folder, ensemble, spec=spec)
    return ensemble


def test_a_run_without_a_server_is_whole_in_a_sqlite_file_in_the_working_folder(
    working_folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    small_ensemble(working_folder / "model")
    tracker = start()
    assert tracker.uri == f"sqlite:///{working_folder}/mlflow.db"
    log_everything(tracker, working_folder / "model")
    assert tracker.close("FINISHED")
    assert_everything_arrived(tracker.uri, tracker.run_id, working_folder)
    assert (working_folder / "mlartifacts" / str(tracker.run_id)).is_dir()
    assert not (working_folder / "mlruns").exists()
    assert warnings_of(caplog) == []
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "INFO" not in printed.err
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.usefixtures("store")
def test_the_model_that_pyfunc_loads_embeds_like_the_ensemble(working_folder: Path) -> None:
    import mlflow

    ensemble = small_ensemble(working_folder / "model")
    tracker = start()
    tracker.log_ensemble(str(working_folder / "model"), input_shape=(1, 8, 8))
    assert tracker.close("FINISHED")

    [model] = client(tracker.uri).search_logged_models([client(tracker.uri).get_run(tracker.run_id).info.experiment_id])
    assert (model.name, model.status, model.source_run_id) == ("ensemble", "READY", tracker.run_id)
    assert not [file for file in working_folder.rglob("*") if file.suffix in (".pkl", ".pt", ".pth", ".bin")]
    images = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        expected = ensemble(torch.from_numpy(images)).numpy()
    mlflow.set_tracking_uri(tracker.uri)
    for uri in (f"runs:/{tracker.run_id}/ensemble", f"models:/{model.model_id}"):
        embedded = mlflow.pyfunc.load_model(uri).predict(images)
        assert embedded.dtype == np.float32
        np.testing.assert_allclose(embedded, expected, atol=1e-6)
    with pytest.raises(mlflow.MlflowException, match="shape"):
        mlflow.pyfunc.load_model(uri).predict(images[:, :, :4])


@pytest.mark.usefixtures("store")
def test_resuming_continues_the_same_run_and_names_the_params_that_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = start()
    first.log_params({"train": {"epochs": 2}, "long": "x" * 9000})
    first.log_metrics({"loss": 2.0}, 0)
    assert first.close("FAILED")
    second = start(resume=first.run_id)
    assert second.run_id == first.run_id
    assert client(second.uri).get_run(second.run_id).info.status == "RUNNING"
    second.log_params({"train": {"epochs": 4}})
    second.log_metrics({"loss": 1.0}, 1)
    assert second.close("FINISHED")
    run = client(second.uri).get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert [entry.step for entry in client(second.uri).get_metric_history(second.run_id, "loss")] == [0, 1]
    assert (run.data.params["train.epochs"], len(run.data.params["long"])) == ("2", 500)
    assert run.data.tags["changed_on_resume"] == "train.epochs: 2 → 4"
    assert len(client(second.uri).search_runs([run.info.experiment_id])) == 1
    assert warnings_of(caplog) == []


@pytest.mark.usefixtures("store")
def test_resuming_a_run_that_the_store_does_not_have_warns_and_starts_a_new_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = start(resume="0" * 32)
    assert tracker.run_id not in (None, "0" * 32)
    assert tracker.close("FINISHED")
    [warning] = warnings_of(caplog)
    assert "0" * 32 in warning


def test_runs_that_start_at_once_share_the_experiment(working_folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        trackers = list(pool.map(lambda _: start(), range(4)))
    assert all(tracker.close("FINISHED") for tracker in trackers)
    assert len({tracker.run_id for tracker in trackers}) == 4
    experiments = {client(tracker.uri).get_run(tracker.run_id).info.experiment_id for tracker in trackers}
    assert len(experiments) == 1


@pytest.mark.usefixtures("store")
def test_one_record_that_is_refused_does_not_take_its_neighbours_along(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = start()
    tracker._delivery._changed.acquire()  # the sender waits, so that all three share a request
    for step, name in enumerate(["loss", "no such *name*", "loss"]):
        tracker.log_metrics({name: 1.0}, step)
    tracker._delivery._changed.release()
    tracker.log_ensemble("/no/such/folder", input_shape=(1, 8, 8))
    assert not tracker.close("FINISHED")
    run = client(tracker.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert [entry.step for entry in client(tracker.uri).get_metric_history(tracker.run_id, "loss")] == [0, 2]
    refused, lost = warnings_of(caplog)
    assert "did not take metrics" in refused
    assert "did not get 2 of" in lost


def test_the_configured_uri_comes_before_the_environments(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(empty_store, "environment.db")
    shutil.copy(empty_store, "configured.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///environment.db")
    from_environment, configured = start(), start("sqlite:///configured.db")
    assert from_environment.uri == "sqlite:///environment.db"
    assert configured.uri == "sqlite:///configured.db"
    for tracker in (from_environment, configured):
        assert tracker.close("KILLED")
        assert client(tracker.uri).get_run(tracker.run_id).info.status == "KILLED"
    assert not Path("mlflow.db").exists()


def test_a_disabled_tracker_does_nothing(working_folder: Path) -> None:
    config = parse_config({"tracking": {"enabled": False}})
    tracker = Tracker.start(config, run_name="a", tags={}, resume_run_id="0" * 32)
    log_everything(tracker, working_folder / "model")
    assert tracker.close("FINISHED")
    assert (tracker.uri, tracker.run_id) == (None, None)
    assert list(working_folder.iterdir()) == []


def test_importing_the_module_does_not_import_mlflow_or_matplotlib() -> None:
    check = "import sys, eat_dist.tracking; assert not {'mlflow', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def outlive(tracker: Tracker, *, calls: int = 20) -> None:
    """Log through an outage and check that no call waits for the store."""
    for step in range(calls):
        began = time.monotonic()
        tracker.log_metrics({"loss": 1.0}, step)
        tracker.log_text("a", "b.txt")
        assert time.monotonic() - began < CALL_LIMIT


@pytest.mark.parametrize("store", ["closed port", "no such folder"])
def test_a_store_that_was_never_there_costs_one_warning_and_no_time(
    store: str,
    working_folder: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (working_folder / "a file").write_text("")
    uri = f"http://user:secret@127.0.0.1:{free_port()}" if store == "closed port" else "sqlite:///a file/a.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = start(resume="0" * 32)
    assert tracker.run_id == "0" * 32  # kept for the next checkpoint
    outlive(tracker)
    began = time.monotonic()
    assert not tracker.close("FINISHED")
    assert time.monotonic() - began < 10
    [silent] = warnings_of(caplog)
    assert "does not answer" in silent
    assert "run folder" in silent
    assert tracker.missing == 42
    assert "secret" not in silent + capfd.readouterr().err
    assert tracker.close("FINISHED") is False
    assert len(warnings_of(caplog)) == 1


def test_a_server_that_never_replies_delays_nothing_beyond_the_given_times(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        tracker = start(f"http://127.0.0.1:{mute.getsockname()[1]}", wait=0.5)
        assert time.monotonic() - began < 0.5 + CALL_LIMIT
        assert tracker.run_id is None
        outlive(tracker)
        began = time.monotonic()
        assert not tracker.close("FINISHED", timeout=0.5)
        assert time.monotonic() - began < 0.5 + CALL_LIMIT
    assert [warning for warning in warnings_of(caplog) if "did not get" in warning]


def test_a_full_queue_drops_the_oldest_and_counts_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "QUEUE_RECORDS", 10)
    tracker = start(f"http://127.0.0.1:{free_port()}")
    outlive(tracker, calls=50)
    assert len(tracker._delivery._queue) == 10
    assert not tracker.close("FINISHED")
    assert tracker.missing == 102
    assert len(warnings_of(caplog)) == 1


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    shutil.copy(empty_store, tmp_path / "server" / "server.db")
    running = Server(tmp_path / "server")
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.mark.slow
def test_a_server_that_dies_costs_one_warning_and_one_that_comes_back_gets_everything(
    server: Server,
    working_folder: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slow because a real MLflow server is started twice, at four to eight seconds each."""
    import mlflow

    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.5)
    ensemble = small_ensemble(working_folder / "model")
    returning, lost = start(server.uri), start(server.uri)
    assert returning.run_id is not None
    returning.log_metrics({"before": 1.0}, 0)
    time.sleep(0.5)
    server.kill()
    for tracker in (returning, lost):
        outlive(tracker)
    log_everything(returning, working_folder / "model")
    began = time.monotonic()
    assert not lost.close("FINISHED")
    assert time.monotonic() - began < 10
    server.start()
    assert returning.close("FINISHED", timeout=60)

    assert_everything_arrived(server.uri, returning.run_id, working_folder)
    assert len(client(server.uri).get_metric_history(returning.run_id, "loss")) == 20
    images = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        expected = ensemble(torch.from_numpy(images)).numpy()
    mlflow.set_tracking_uri(server.uri)
    np.testing.assert_allclose(
        mlflow.pyfunc.load_model(f"runs:/{returning.run_id}/ensemble").predict(images), expected, atol=1e-6
    )
    assert ["does not answer" in warning for warning in warnings_of(caplog)] == [True, True]  # one for each run
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Retrying" not in printed.err
