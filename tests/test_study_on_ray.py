"""A study on Ray: runs side by side as processes of the cluster, and one whose members are Ray's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from eat_dist.console import Console
from eat_dist.errors import ClusterError
from eat_dist.studies import load_study, run_study
from small_studies import write

ROWS = {
    "natural": {"defense.name": "natural"},
    "pgd_at": {"defense.name": "pgd_at"},
    "apart": {"defense.name": "natural", "cluster.backend": "ray", "ensemble.members": 1},
    "bad": {"defense.name": "natural", "optimiser.learning_rate": 1e30},
}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_study_fills_the_cluster_and_goes_on_when_it_is_given_again(tmp_path: Path, ray_session: None) -> None:
    """Slow: Ray's starting of processes. Four rows on two CPUs; one fails, one has its member in a Ray worker."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    study = load_study(
        write(tmp_path, rows=ROWS, seeds=[0]),
        ["cluster.wait_for_nodes=60", "tracking.enabled=true", f"tracking.uri={uri}"],
    )

    def go() -> None:
        where = str(tmp_path / "study")
        run_study(study, study_dir=where, backend="ray", concurrent=None, command="", console=Console())

    with pytest.raises(Exception, match=r"1 of 4 runs failed: bad-digits-s0: .*lower optimiser.learning_rate"):
        go()

    from ray.util import placement_group_table

    for _ in range(100):
        if all(group["state"] == "REMOVED" for group in placement_group_table().values()):
            break
        time.sleep(0.1)
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())
    content = json.loads((tmp_path / "study" / "study.json").read_text())
    runs = {run["row"]: run for run in content["runs"]}
    assert {row: run["status"] for row, run in runs.items()} == {
        "natural": "FINISHED",
        "pgd_at": "FINISHED",
        "apart": "FINISHED",
        "bad": "FAILED",
    }
    assert runs["natural"]["passes"] == 2 * 4
    assert runs["apart"]["passes"] == 4
    for row in ("natural", "pgd_at", "apart"):
        assert (tmp_path / "study" / runs[row]["run_folder"] / "summary.json").exists()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    tracked = client.search_runs([client.get_experiment_by_name("eat_dist").experiment_id])
    children = [run for run in tracked if run.data.tags.get("mlflow.parentRunId") == content["mlflow_run_id"]]
    assert {run.info.run_name: run.info.status for run in children} == {
        "natural-digits-s0": "FINISHED",
        "pgd_at-digits-s0": "FINISHED",
        "apart-digits-s0": "FINISHED",
        "bad-digits-s0": "FAILED",
    }

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "runs").rglob("summary.json")}
    with pytest.raises(Exception, match="1 of 4 runs failed"):
        go()
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "runs").rglob("summary.json")}
    assert after == before


@pytest.mark.ray
def test_a_study_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, ray_session: None) -> None:
    study = load_study(write(tmp_path), ["cluster.threads_per_member=8"])

    with pytest.raises(ClusterError, match="need 8 CPU each; the cluster has 0 GPUs and 2 CPUs"):
        run_study(
            study,
            study_dir=str(tmp_path / "study"),
            backend="ray",
            concurrent=None,
            command="",
            console=Console(),
        )
    assert not (tmp_path / "study").exists()
