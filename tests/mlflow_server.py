"""A real ``mlflow server`` on loopback, what may stand before one, what is none, and the runs that one is told of."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eat_dist.config import RunConfig, parse_config
from eat_dist.console import Console
from eat_dist.report.figures import transfer_matrix_figure
from eat_dist.runs import start_run
from eat_dist.tracking import Tracker
from eat_dist.tracking.store import ENVIRONMENT
from small_runs import small_config

START_LIMIT = 120.0
"""Seconds within which a server must answer."""

Answer = tuple[int, str, bytes]
"""Status, content type, body."""
Asked = Callable[[BaseHTTPRequestHandler], Answer | None]
"""What a stand-in answers to a request; None: the server behind it answers."""
GAMMAS = (0.5, 2.0)
"""How strongly the two trials of a recorded sweep transfer."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``mlflow server`` on a free port of this machine, with its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        options += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        options += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            # Without its job runner, which is not used here, the server listens in half the time.
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise TimeoutError(f"mlflow server did not listen within {START_LIMIT:.0f} s")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def stand_in(asked: Asked, *, behind: int | None = None, host: str = "127.0.0.1") -> Iterator[str]:
    """A web server that answers for itself, or passes a request on unchanged to the port behind it; its URI."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            own = asked(self)
            status, kind, content = own if own is not None else self.passed_on(body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def passed_on(self, body: bytes) -> Answer:
            assert behind is not None, f"nothing is behind the stand-in to answer {self.path}"
            connection = http.client.HTTPConnection("127.0.0.1", behind, timeout=30)
            with contextlib.closing(connection):
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                return response.status, response.headers.get("Content-Type", ""), response.read()

        def log_message(self, *_: object) -> None:
            """Nothing: standard error belongs to what is tested."""

    server = ThreadingHTTPServer((host, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Undo what the tracker sets for the process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {*os.environ, *ENVIRONMENT, "MLFLOW_TRACKING_URI"}:
            if name.startswith("MLFLOW_"):
                patch.setenv(name, "")  # remembers the value, absent or not, and restores it
                patch.delenv(name)
        yield
    sys.modules["mlflow"].set_tracking_uri(None)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def client(uri: str | None) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def config_for(uri: str, *assignments: str) -> RunConfig:
    return small_config(
        "cluster.backend=local",
        "evaluation.num_steps=2",
        "evaluation.members=false",
        "evaluation.kmeans_seeds=1",
        "tracking.enabled=true",
        "tracking.experiment=gamma and epsilon",
        f"tracking.uri={uri}",
        *assignments,
    )


@dataclass
class Recorded:
    """What the module's server was told: a sweep of two trials, one trial that died, and a run by itself."""

    server: Server
    folder: Path
    parent: str
    trials: list[str]
    dead: str
    alone: str
    experiment: str
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        return client(self.server.uri)


def record(server: Server, folder: Path) -> Recorded:
    settings = config_for(server.uri)
    parent = Tracker.start(settings, run_name="sweep", tags={"space": "gamma"}, resume_run_id=None, wait=60)
    assert parent.run_id is not None
    summaries = {}
    for gamma in GAMMAS:
        finished = start_run(
            config_for(server.uri, f"defense.transfer_strength={gamma}", "tracking.register_as=never"),
            run_dir=str(folder / f"gamma-{gamma:g}"),
            overwrite=False,
            console=Console(),
            parent_run_id=parent.run_id,
        )
        assert finished.mlflow_missing == 0
        assert finished.registered is None  # a trial is not registered
        summaries[str(finished.mlflow_run_id)] = finished.summary
    dead = Tracker.start(settings, run_name="pruned", tags={}, resume_run_id=None, parent_run_id=parent.run_id, wait=60)
    dead.log_metrics({"epoch/clean_loss": 3.0}, 1)
    parent.close("FINISHED")
    alone = start_run(
        config_for(server.uri, "defense.name=natural", "tracking.register_as=digits-natural"),
        run_dir=str(folder / "natural"),
        overwrite=False,
        console=Console(),
    )
    summaries[str(alone.mlflow_run_id)] = alone.summary
    assert alone.registered == "models:/digits-natural/1"
    experiment = client(server.uri).get_experiment_by_name("gamma and epsilon").experiment_id
    return Recorded(
        server=server,
        folder=folder,
        parent=parent.run_id,
        trials=list(summaries)[: len(GAMMAS)],
        dead=str(dead.run_id),
        alone=str(alone.mlflow_run_id),
        experiment=experiment,
        summaries=summaries,
    )


def log_everything(tracker: Tracker, model_folder: Path) -> None:
    tracker.log_params(parse_config({"train": {"epochs": 30}}).model_dump(mode="json"))
    for step in range(3):
        tracker.log_metrics({"member_0/loss": 1.0 / (step + 1), "ensemble/recall": float(step)}, step)
    tracker.log_metrics({"nothing": float("nan"), "far": float("inf")}, 3)
    tracker.log_figure(transfer_matrix_figure(np.eye(3)), "figures/transfer_matrix.png")
    tracker.log_text("seed: 0 # ε", "config.yaml")
    tracker.log_ensemble(str(model_folder), input_shape=(1, 8, 8))


def assert_everything_arrived(uri: str | None, run_id: str | None, destination: Path) -> None:
    store = client(uri)
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.tags["commit"] == "abc"
    assert run.data.params["train.epochs"] == "30"
    assert run.data.params["ensemble.split.rule"] == "all"
    assert run.data.metrics["member_0/loss"] == pytest.approx(1 / 3)
    assert not {"nothing", "far"} & set(run.data.metrics)
    history = store.get_metric_history(run_id, "ensemble/recall")
    assert [(entry.step, entry.value) for entry in history] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    text = Path(store.download_artifacts(run_id, "config.yaml", str(destination))).read_text(encoding="utf-8")
    assert text == "seed: 0 # ε"
    assert [file.path for file in store.list_artifacts(run_id, "figures")] == ["figures/transfer_matrix.png"]
