"""Defenses at inference through the command line: around a run that has none, and saved with one that has."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eat_dist.errors import StorageError
from eat_dist.inference import defenses_of
from eat_dist.models import load_ensemble
from eat_dist.models.ensemble import load_spec, save_ensemble

Run = Callable[..., tuple[int, str, str]]

TINY = ["model.widths=[4,8]", "model.embedding_dim=8", "ensemble.members=2", "defense.name=natural"]
TINY += ["train.epochs=2", "cluster.backend=local", "cluster.threads_per_member=1", "evaluation.kmeans_seeds=1"]
TINY += ["evaluation.num_steps=2", "evaluation.members=false", "evaluation.objectives=[displacement]"]
TINY += ["evaluation.eot_draws=2"]


@pytest.fixture
def run(run: Run) -> Iterator[Run]:
    """As everywhere; MLflow's place is its own."""
    yield run
    mlflow.set_tracking_uri(None)


def settings(*assignments: str) -> list[str]:
    return [part for assignment in assignments for part in ("--set", assignment)]


def sums(folder: Path, *, of: str = "*") -> dict[str, str]:
    files = (path for path in folder.rglob(of) if path.is_file() and "inference" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_finished_run_is_measured_behind_a_defense_beside_its_own_figures(run: Run, tmp_path: Path) -> None:
    assert run("train", *settings(*TINY), "--run-dir", "out")[0] == 0
    before = sums(tmp_path / "out")
    own = json.loads((tmp_path / "out/summary.json").read_text())
    assert own["inference"] is None
    command = ("evaluate", "out", *settings("inference.name=randomisation"))
    code, out, error = run(*command)
    assert code == 0, error
    printed = " ".join(out.split())
    assert "behind the defense at inference 'randomisation', in %" in printed
    assert "non-adaptive" in printed
    assert "sanity check" in printed

    here = tmp_path / "out/inference/randomisation"
    results = json.loads((here / "evaluation/quick/summary.json").read_text())
    assert results["inference"]["name"] == "randomisation"
    assert [row["objective"] for row in results["inference"]["attacks"]] == ["displacement"]
    assert results["ensemble"]["clean"] != own["clean"]
    assert sums(tmp_path / "out") == before  # the run's own files are as they were
    summary = json.loads((here / "summary.json").read_text())
    assert summary["clean"] == results["ensemble"]["clean"]
    assert (summary["defense"], summary["name"]) == ("natural", "digits-randomisation")

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = {
        found.info.run_id: found for found in mlflow.search_runs(output_format="list", search_all_experiments=True)
    }
    assert set(tracked) == {own["mlflow_run_id"], summary["mlflow_run_id"]}
    child, parent = tracked[summary["mlflow_run_id"]], tracked[own["mlflow_run_id"]]
    assert child.data.tags["mlflow.parentRunId"] == own["mlflow_run_id"]
    assert (child.info.run_name, child.data.tags["inference"]) == ("out-randomisation", "randomisation")
    assert parent.data.metrics["clean/r_at_1"] == pytest.approx(own["clean"]["r_at_1"])
    assert child.data.metrics["clean/r_at_1"] == pytest.approx(summary["clean"]["r_at_1"])

    # Done already: nothing is measured again, and the same MLflow run is written to.
    parts = {path.name: path.stat().st_ino for path in (here / "evaluation/quick/parts").iterdir()}
    written = (here / "summary.json").read_bytes()
    assert run(*command)[0] == 0
    assert {path.name: path.stat().st_ino for path in (here / "evaluation/quick/parts").iterdir()} == parts
    assert (here / "summary.json").read_bytes() == written

    code, out, error = run("report", "out", "out/inference/randomisation", "-o", "page.html")
    assert code == 0, error
    page = (tmp_path / "page.html").read_text()
    assert "randomisation at inference" in page
    assert "non-adaptive" in page

    for wrong, expected in (
        (["inference.name=randomization"], "Did you mean 'randomisation'?"),
        (["inference.bits=3"], "has no options; got inference.bits = 3"),
        (["inference.name=mixup_inference", "inference.pool=100000"], "inference.pool must be at most the"),
    ):
        code, _, error = run("evaluate", "out", *settings(*wrong))
        assert code == 2
        assert error.count("\n") == 1
        assert expected in error


def test_a_run_with_a_defense_is_saved_embedded_and_measured_behind_it(run: Run, tmp_path: Path) -> None:
    behind = ["inference.name=mixup_inference", "inference.draws=3", "inference.pool=7", "tracking.enabled=false"]
    code, out, error = run("train", *settings(*TINY, *behind), "--run-dir", "out")
    assert code == 0, error
    assert "behind the defense at inference 'mixup_inference'" in " ".join(out.split())
    own = json.loads((tmp_path / "out/summary.json").read_text())
    assert own["inference"]["options"] == {"draws": 3, "share": 0.5, "pool": 7}

    model = tmp_path / "out/model"
    spec, ensemble = load_spec(str(model)), load_ensemble(str(model))
    assert spec.inference.name == "mixup_inference"
    assert [defense.draws for defense in defenses_of([ensemble])] == [3, 3]
    pool = defenses_of([ensemble])[0].pool
    assert pool is not None
    assert (pool.shape, pool.dtype) == ((7, 1, 8, 8), torch.uint8)
    images = torch.rand(4, 1, 8, 8)
    assert not torch.equal(ensemble(images), ensemble(images))
    torch.testing.assert_close(ensemble(images).norm(dim=1), torch.ones(4))
    save_ensemble(str(tmp_path / "copy"), ensemble, spec=spec)
    assert sums(tmp_path / "copy") == sums(model)

    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "image.png")
    for name in ("a.parquet", "b.parquet"):
        assert run("embed", "out", "image.png", "-o", name)[0] == 0
    a, b = (pq.read_table(tmp_path / name)["embedding"].to_pylist() for name in ("a.parquet", "b.parquet"))
    assert a == b

    # Its own defense is its own evaluation; without it, or behind another one, it is measured elsewhere.
    before = sums(tmp_path / "out")
    assert run("evaluate", "out")[0] == 0
    assert sums(tmp_path / "out", of="parts/*") == {k: v for k, v in before.items() if "/parts/" in k}
    assert run("evaluate", "out", *settings("inference={name: none}"))[0] == 0
    bare = json.loads((tmp_path / "out/inference/none/evaluation/quick/summary.json").read_text())
    assert bare["inference"] is None
    assert bare["sanity"] == []

    cut = load_file(model / "pool.safetensors")["pool"][:, :, :4].contiguous()
    save_file({"pool": cut}, model / "pool.safetensors")
    with pytest.raises(StorageError, match=r"pool.safetensors' does not fit: expected uint8 images \[1, 8, 8\]"):
        load_ensemble(str(model))
    (model / "pool.safetensors").unlink()
    with pytest.raises(StorageError, match=r"pool\.safetensors"):
        load_ensemble(str(model))


def test_an_ensemble_saved_by_an_earlier_version_is_undefended(run: Run, tmp_path: Path) -> None:
    arguments = settings(*TINY, "tracking.enabled=false", "train.epochs=1", "evaluation.protocol=none")
    assert run("train", *arguments, "--run-dir", "out")[0] == 0
    file = tmp_path / "out/model/ensemble.json"
    found = json.loads(file.read_text())
    assert (found["schema"], found.pop("inference")) == (3, {"name": "none"})
    file.write_text(json.dumps(found | {"schema": 2}))
    assert load_spec(str(file.parent)).inference.name == "none"
    assert not defenses_of([load_ensemble(str(file.parent))])


MODULE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
"""


def test_anybodys_model_is_measured_behind_a_defense(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_network.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = settings(*TINY[-4:], "tracking.enabled=false", "cluster.backend=local", "inference.name=randomisation")
    code, out, error = run("evaluate", "my_network:build", "--normalise", *arguments)
    assert code == 0, error
    assert "my_network:build behind randomisation on digits" in " ".join(out.split())
    assert "one pass misleads an attack" not in error
    folder = tmp_path / "evaluations/my_network-build-randomisation"
    results = json.loads((folder / "evaluation/quick/summary.json").read_text())
    [row] = results["inference"]["attacks"]
    assert row["adaptive"] != row["non_adaptive"]
    assert results["inference"]["eot_draws"] == 2
