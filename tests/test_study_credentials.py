"""The processes of a study's runs on Ray have what MLflow wants of whom it lets in, and no file has it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from eat_dist.console import Console
from eat_dist.storage import Folder
from eat_dist.studies import load_study
from eat_dist.studies.book import Ledger
from eat_dist.studies.plan import StudyRun, plan_runs
from eat_dist.studies.record import Record
from mlflow_server import Answer, clean_environment, stand_in
from small_studies import ROWS, write

SECRET = "not-for-any-file"


def ledger_in(folder: Path, runs: Sequence[StudyRun], config_of: Any) -> Ledger:
    return Ledger(
        Folder.at(folder),
        runs,
        {run.name: Record.of(run) for run in runs},
        write=lambda: None,
        config_of=config_of,
        parent_run_id=lambda: None,
        console=Console(),
    )


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_runs_process_on_ray_asks_mlflow_with_the_credentials_of_the_study(tmp_path: Path, ray_session: None) -> None:
    """Only that process asks here: a server that lets nobody in, so that the run ends without it."""
    import ray

    from eat_dist.studies.on_ray import plan_batches, run_batches

    asked: list[str | None] = []

    def refuse(request: BaseHTTPRequestHandler) -> Answer:
        asked.append(request.headers.get("Authorization"))
        return 401, "text/plain", b"who are you?"

    study = load_study(write(tmp_path, rows={"natural": ROWS["natural"]}, seeds=[0]), ["tracking.enabled=true"])
    [run] = plan_runs(study, local=False)
    with clean_environment(), pytest.MonkeyPatch.context() as patch, stand_in(refuse) as uri:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        task = ledger_in(tmp_path / "unused", [run], lambda run: run.config).begin()
        assert SECRET not in str(task)  # which Ray Tune keeps in its files
        batches = plan_batches([run], concurrent=None)
        run_batches(batches, lambda runs, of: ledger_in(tmp_path / "study", runs, of), console=Console())

    assert (tmp_path / "study" / "runs" / run.name / "summary.json").exists()
    assert set(asked) == {"Basic " + base64.b64encode(f"anna:{SECRET}".encode()).decode()}
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert len(list(session.rglob("*"))) > 5
    assert files_with(SECRET, session) + files_with(SECRET, tmp_path) == []
