"""Whole runs with everything in a bucket, on a real S3 server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ObjectStore, serving
from PIL import Image
from safetensors.torch import load

from eat_dist import cli
from eat_dist.errors import StorageError
from eat_dist.storage import Folder
from small_runs import small_config, train_locally

TINY = [
    "ensemble.members=2",
    "data.batch_size=200",
    "data.images_per_class=40",
    "model.widths=[8,16]",
    "model.embedding_dim=16",
    "attack.num_steps=2",
    "train.epochs=4",
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "evaluation.num_steps=2",
    "evaluation.kmeans_seeds=1",
    "evaluation.members=false",
    "tracking.enabled=false",
    "cluster.backend=local",
    "cluster.threads_per_member=1",
]
RUN_FILES = {
    "config.yaml",
    "run.json",
    "splits.parquet",
    "summary.json",
    "figures/transfer_matrix.png",
    "model/ensemble.json",
    "model/member_0.safetensors",
    "model/member_1.safetensors",
    "evaluation/quick/summary.json",
    "evaluation/quick/results.parquet",
    *(f"statistics/{iteration:08d}.parquet" for iteration in (0, 5, 10, 15)),
    *(
        f"checkpoints/{iteration:08d}/{file}"
        for iteration in (15, 20)
        for file in (
            "checkpoint.json",
            "member_0.json",
            "member_0.safetensors",
            "member_1.json",
            "member_1.safetensors",
        )
    ),
}

Call = Callable[..., tuple[int, str, str]]


def train(*assignments: str, run_dir: str) -> list[str]:
    settings = [part for assignment in (*TINY, *assignments) for part in ("--set", assignment)]
    return ["train", *settings, "--run-dir", run_dir]


@dataclass(frozen=True)
class Undisturbed:
    """A finished run in a bucket, trained from shards in that bucket."""

    bucket: str
    shards: str
    url: str
    weights: list[dict[str, torch.Tensor]]


def weights(folder: Folder) -> list[dict[str, torch.Tensor]]:
    return [load(folder.read(f"model/member_{rank}.safetensors")) for rank in range(2)]


def largest_difference(folder: Folder, expected: list[dict[str, torch.Tensor]]) -> float:
    return max(
        float((mine[name].double() - other[name].double()).abs().max())
        for mine, other in zip(weights(folder), expected, strict=True)
        for name in mine
    )


@pytest.fixture(scope="module")
def undisturbed(s3: ObjectStore) -> Undisturbed:
    s3.client.create_bucket(Bucket="undisturbed")
    shards, url = s3.url("undisturbed/shards/digits"), s3.url("undisturbed/runs/a")
    for command in (
        ["data", "prepare", "--dataset", "digits", "--out", shards],
        train(f"data.shards={shards}", run_dir=url),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["eat-dist", *command])
            with pytest.raises(SystemExit) as exit_:
                cli.main()
        assert not exit_.value.code
    return Undisturbed("undisturbed", shards, url, weights(Folder.at(url)))


def test_a_run_in_a_bucket_leaves_what_one_on_a_disk_leaves(
    s3: ObjectStore, undisturbed: Undisturbed, run: Call, tmp_path: Path
) -> None:
    there = {key.removeprefix("runs/a/") for key in s3.keys("undisturbed", "runs/a/")}
    assert there >= RUN_FILES
    code, _, errors = run(*train(f"data.shards={undisturbed.shards}", run_dir=str(tmp_path / "run")))
    assert code == 0, errors
    here = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert there == here
    summaries = [Folder.at(where).read_json("summary.json") for where in (undisturbed.url, tmp_path / "run")]
    for summary in summaries:
        for measured in ("seconds", "peak_memory_mib", "loading", "waiting_share"):
            del summary[measured]
    assert summaries[0] == summaries[1]


def test_a_run_in_a_bucket_is_evaluated_reported_and_used(
    s3: ObjectStore, undisturbed: Undisturbed, run: Call, tmp_path: Path
) -> None:
    url = undisturbed.url
    code, said, errors = run("evaluate", url, "--epsilon", "0.1", "--set", "evaluation.num_steps=1")
    assert code == 0, errors
    assert f"report       eat-dist report '{url}' -o report.html" in said
    assert f"summary      {s3.url('undisturbed/runs/a/evaluation/quick/summary.json')}" in said
    assert Folder.at(url).read_json("evaluation/quick/summary.json")["epsilon"] == 0.1

    page = s3.url("undisturbed/reports/page.html")
    code, said, errors = run("report", url, "-o", page)
    assert code == 0, errors
    assert f"report       {page}" in said
    assert f"files in {s3.url('undisturbed/reports/page_figures')}" in said
    assert s3.folder("undisturbed/reports").read("page.html").startswith(b"<!DOCTYPE html>")

    for number in range(3):
        Image.fromarray(np.full((8, 8), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    code, _, errors = run("embed", url, str(tmp_path), "-o", s3.url("undisturbed/embeddings.parquet"))
    assert code == 0, errors
    table = pq.read_table(pa.BufferReader(s3.folder("undisturbed").read("embeddings.parquet")))
    assert len(table) == 3

    code, _, errors = run("evaluate", s3.url("undisturbed/runs/none"))
    assert (code, errors.count("\n")) == (2, 1)
    assert "is not a run folder: it has no config.yaml" in errors


def test_a_run_that_was_killed_goes_on_from_the_bucket_to_the_same_weights(
    s3: ObjectStore, undisturbed: Undisturbed, run: Call
) -> None:
    url = s3.url("undisturbed/runs/killed")
    command = train(f"data.shards={undisturbed.shards}", "attack.num_steps=2", run_dir=url)
    process = subprocess.Popen([sys.executable, "-m", "eat_dist", *command], stderr=subprocess.DEVNULL)
    while not s3.keys("undisturbed", "runs/killed/checkpoints/00000005/checkpoint.json"):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert not s3.keys("undisturbed", "runs/killed/model/"), "the run ended before it was killed"

    code, said, errors = run("train", "--resume", url)
    assert code == 0, errors
    assert "Resuming from iteration" in said
    assert largest_difference(Folder.at(url), undisturbed.weights) == 0
    there = {key.removeprefix("runs/killed/") for key in s3.keys("undisturbed", "runs/killed/")}
    assert there >= RUN_FILES - {f"statistics/{iteration:08d}.parquet" for iteration in (5, 10, 15)}


def test_a_run_is_replaced_only_when_asked(s3: ObjectStore, bucket: str, run: Call) -> None:
    url = s3.url(f"{bucket}/runs/a")
    s3.folder(f"{bucket}/runs").write("a/mine.txt", b"1")
    short = [*train("train.epochs=1", "evaluation.protocol=none", run_dir=url), "--overwrite"]
    code, _, errors = run(*short)
    assert (code, errors.count("\n")) == (2, 1)
    assert "is not a run folder (no config.yaml), so --overwrite leaves it alone" in errors
    s3.folder(f"{bucket}/runs/a").write("config.yaml", b"{}")
    assert run(*short[:-1])[0] == 2
    assert s3.keys(bucket) == ["runs/a/config.yaml", "runs/a/mine.txt"]
    code, _, errors = run(*short)
    assert code == 0, errors
    assert "runs/a/summary.json" in s3.keys(bucket)
    assert "runs/a/mine.txt" not in s3.keys(bucket)


@pytest.mark.ray
@pytest.mark.long
def test_members_on_ray_write_to_the_bucket_that_the_driver_was_given(
    s3: ObjectStore, undisturbed: Undisturbed, run: Call, ray_session: None
) -> None:
    """Slow: Ray Train starts two workers. Neither knows of an endpoint but by the URL."""
    url = s3.url("undisturbed/runs/on ray")
    command = train(f"data.shards={undisturbed.shards}", "cluster.backend=ray", run_dir=url)
    code, _, errors = run(*command)
    assert code == 0, errors
    there = {key.removeprefix("runs/on ray/") for key in s3.keys("undisturbed", "runs/on ray/")}
    assert there >= RUN_FILES
    assert not [key for key in there if key.startswith("ray/")]
    assert largest_difference(Folder.at(url), undisturbed.weights) < 1e-6


# What is not permitted


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectStore, Callable[..., None]]]:
    """A server that checks permissions; a function that says what this process may do from now on."""
    with serving() as store:
        store.client.create_bucket(Bucket="guarded")
        admin, own = store.user("admin", "*"), store.user("own")
        store.require_permission()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", own[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", own[1])
        yield store, lambda *actions: store.permit("own", *actions, by=admin)


@pytest.mark.parametrize(
    ("bucket_name", "why"),
    [
        ("guarded", "ACCESS_DENIED during CreateMultipartUpload"),
        ("absent-bucket", "NO_SUCH_BUCKET during CreateMultipartUpload"),
    ],
)
def test_a_bucket_that_cannot_be_written_stops_a_run_before_its_data_are_read(
    guarded: tuple[ObjectStore, Callable[..., None]], run: Call, bucket_name: str, why: str
) -> None:
    store, permit = guarded
    permit("s3:ListBucket", "s3:GetObject", *(["s3:PutObject"] if bucket_name != "guarded" else []))
    code, said, errors = run(*train("data.shards=/no/such/folder", run_dir=store.url(f"{bucket_name}/runs/a")))
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert f"error: cannot write to 's3://{bucket_name}/runs/a" in errors
    assert why in errors


def test_a_permission_that_is_lost_stops_the_run_in_one_line_and_given_back_it_resumes(
    guarded: tuple[ObjectStore, Callable[..., None]], tmp_path: Path
) -> None:
    store, permit = guarded
    config = small_config("ensemble.members=2")
    train_locally(config, tmp_path)
    permit("s3:*")
    folder = store.folder("guarded/runs/a")

    def lose(ensemble: Any) -> None:
        if ensemble.iteration == 12:
            permit("s3:ListBucket", "s3:GetObject")

    with pytest.raises(StorageError, match=r"^cannot write 's3://guarded/runs/a/.*': ACCESS_DENIED during") as caught:
        train_locally(config, folder, lose)
    assert "\n" not in str(caught.value)
    permit("s3:*")
    results = train_locally(config, folder)
    assert {result.resumed_from for result in results} == {10}
    assert largest_difference(folder, weights(Folder.at(tmp_path))) == 0
    assert json.loads(folder.read("checkpoints/00000020/checkpoint.json"))["iteration"] == 20
