"""``eat-dist evaluate``: anybody's model, a run, and what a user did wrong in one line, with nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evaluation_cases import content

Run = Callable[..., tuple[int, str, str]]

MODELS = """
import torch
import torchvision
from torch import nn
from torch.nn import functional


def resnet18():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None)


class Small(nn.Module):
    def __init__(self, after):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.after = nn.Linear(3 * 16 * 16, 8), after

    def forward(self, images):
        return self.after(functional.normalize(self.linear(images.flatten(1) - 0.5), dim=1))


def small():
    return Small(lambda embeddings: embeddings)


def nan():
    return Small(lambda embeddings: embeddings * float("nan"))


def long():
    return Small(lambda embeddings: 3 * embeddings)


def rank_3():
    return Small(lambda embeddings: embeddings[:, :, None])


def no_model():
    return 3
"""
TINY = ["data.dataset=folder", "data.root=photos", "data.image_size=16", "evaluation.kmeans_seeds=1"]
TINY += ["evaluation.num_steps=2", "cluster.threads_per_member=1", "cluster.backend=local"]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """As everywhere, in a working folder with photographs and a module of models."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    photographs(tmp_path / "photos")
    (tmp_path / "my_models.py").write_text(MODELS, encoding="utf-8")
    sys.modules.pop("my_models", None)
    yield run
    sys.modules.pop("my_models", None)
    mlflow.set_tracking_uri(None)


def photographs(folder: Path, *, per_class: int = 4, alone: str = "", prefix: str = "") -> None:
    """Eight classes of noise of one colour each; half of them are for testing. ``alone``: one with one image."""
    draw = np.random.default_rng(0)
    for name in "abcdefgh":
        (folder / name).mkdir(parents=True)
        colour = draw.integers(0, 200, 3)
        for image in range(1 if name in alone else per_class):
            pixels = (colour + draw.integers(0, 56, (16, 16, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{prefix}{image}.png")


def settings(*assignments: str) -> list[str]:
    return [part for assignment in (*TINY, *assignments) for part in ("--set", assignment)]


UNTRACKED = "tracking.enabled=false"


def test_a_torchvision_resnet_is_evaluated_with_no_change_but_normalise(run: Run, tmp_path: Path) -> None:
    code, out, error = run("evaluate", "my_models:resnet18", "--normalise", *settings(), "--epsilon", "8/255")
    assert code == 0, error
    assert "my_models:resnet18 on folder: 16 images of 4 unseen classes, linf ε = 0.03137" in out
    folder = tmp_path / "evaluations" / "my_models-resnet18"
    quick = folder / "evaluation" / "quick"
    assert f"{quick}/results.parquet" in out
    assert f"eat-dist report {folder} -o report.html" in out
    summary = json.loads((quick / "summary.json").read_text(encoding="utf-8"))
    assert summary["target"] == {"kind": "module", "name": "my_models:resnet18"}
    assert (summary["dataset"], summary["defense"], summary["members"]) == ("folder", None, [])
    assert summary["command"].startswith("eat-dist evaluate my_models:resnet18 --normalise")
    assert summary["epsilon"] == 8 / 255
    assert set(summary["ensemble"]["attacked"]) == {
        "pgd2/nearest_negative",
        "pgd2/nearest_wrong_centroid",
        "pgd2/random_wrong_centroid",
    }
    assert 0 < summary["ensemble"]["attacked"]["pgd2/nearest_negative"]["mean_displacement"] <= 2
    assert (folder / "config.yaml").exists()
    assert pq.read_table(quick / "results.parquet").num_rows > 40

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    [tracked] = mlflow.search_runs(experiment_names=["eat_dist"], output_format="list")
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "my_models-resnet18"
    assert tracked.data.tags["target"] == "my_models:resnet18"
    assert tracked.data.tags["protocol"] == "quick"
    assert tracked.data.metrics["clean/r_at_1"] == pytest.approx(summary["ensemble"]["clean"]["r_at_1"])
    for key, figures in summary["ensemble"]["attacked"].items():
        assert tracked.data.metrics[f"attacked/{key}/nmi"] == pytest.approx(figures["nmi"])

    # Done already: the same command finds everything, and writes the same.
    before = content(quick)
    code, _, error = run("evaluate", "my_models:resnet18", "--normalise", *settings(), "--epsilon", "8/255")
    assert code == 0, error
    assert content(quick) == before


def test_a_run_is_evaluated_by_its_own_config_into_its_own_folder(run: Run, tmp_path: Path) -> None:
    small = ["model.widths=[4,8]", "model.embedding_dim=8", "ensemble.members=2", "attack.num_steps=1"]
    small += ["train.epochs=1", "data.batch_size=8", "data.images_per_class=4", "evaluation.protocol=none"]
    assert run("train", *settings(*small, UNTRACKED), "--run-dir", "out")[0] == 0
    sizes = ["evaluation.apgd_steps=2", "evaluation.square_queries=3", "evaluation.sample=5"]
    changes = [part for assignment in sizes for part in ("--set", assignment)]
    code, out, error = run("evaluate", "out", "--protocol", "standard", *changes)
    assert code == 0, error
    written = json.loads((tmp_path / "out/evaluation/standard/summary.json").read_text(encoding="utf-8"))
    assert written["target"] == {"kind": "run", "name": "out"}
    assert written["defense"] == "eat"
    assert (len(written["members"]), written["norm"]) == (2, "linf")
    assert "apgd2/nearest_negative" in written["ensemble"]["attacked"]
    assert "square3/nearest_negative" in out
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["evaluation"]["protocol"] == "standard"
    assert summary["attacked"] == written["ensemble"]["attacked"]
    assert not (tmp_path / "evaluations").exists()

    code, out, error = run("evaluate", "out", *changes)
    assert code == 0, error
    assert "evaluation/quick/results.parquet" in out, "the run's protocol is none, and who evaluates wants figures"

    for extra in (["--config", "out/config.yaml"], ["--output", "elsewhere"]):
        code, _, error = run("evaluate", "out", *extra)
        assert code == 2
        assert_one_line(error)
        assert "a run has its own config and folder; leave out --config and --output" in error


SMALL = ["model.widths=[4,8]", "model.embedding_dim=8", "ensemble.members=1", "attack.num_steps=1", "train.epochs=1"]
SMALL += ["data.batch_size=8", "data.images_per_class=4", UNTRACKED]


def test_figures_of_weights_that_were_replaced_meanwhile_are_not_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eat_dist.runs import again

    assert run("train", *settings(*SMALL), "--run-dir", "out")[0] == 0
    measure = again.evaluate_subject

    def and_meanwhile(*arguments: Any, **options: Any) -> dict[str, Any]:
        results = measure(*arguments, **options)
        summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
        code, _, error = run("train", *settings(*SMALL), "--run-dir", "out", "--overwrite")
        assert code == 2
        assert "/out' is being worked on by process" in error
        (tmp_path / "out/summary.json").write_text(json.dumps(summary | {"weights_sha256": "other"}), encoding="utf-8")
        return results

    monkeypatch.setattr(again, "evaluate_subject", and_meanwhile)
    code, _, error = run("evaluate", "out", "--set", "evaluation.num_steps=3")
    assert code == 2
    assert_one_line(error)
    assert "out' was trained anew while it was measured" in error
    after = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert (after["weights_sha256"], after["evaluation"]["num_steps"]) == ("other", 2)
    assert not (tmp_path / "out/lease.json").exists()


def test_a_copy_of_a_run_is_compared_as_a_run_of_its_own(run: Run, tmp_path: Path) -> None:
    """Although it has the original's MLflow id."""
    assert run("train", *settings(*SMALL, "evaluation.protocol=none"), "--run-dir", "out")[0] == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    (tmp_path / "out/summary.json").write_text(json.dumps(summary | {"mlflow_run_id": "0" * 32}), encoding="utf-8")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    code, out, error = run("compare", "out", "copy")
    assert code == 0, error
    assert {line.split()[0] for line in out.splitlines() if line.split()[:1] in (["out"], ["copy"])} == {
        "out",
        "copy",
    }, out


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not the summary of a run: expected schema 1; got list"),
        ("{}", "is not the summary of a run: expected schema 1; got None"),
        ('{"schema": 1, "name": "a"}', "is not the summary of a run: without seed, weights_sha256"),
    ],
)
def test_a_damaged_summary_is_one_line_before_the_first_attack(
    run: Run, tmp_path: Path, damaged: str, expected: str
) -> None:
    assert run("train", *settings(*SMALL, "evaluation.protocol=none"), "--run-dir", "out")[0] == 0
    (tmp_path / "out/summary.json").write_text(damaged, encoding="utf-8")
    again = ("train", *settings(*SMALL, "evaluation.protocol=none"), "--run-dir", "out", "--resume-or-start")
    for command in (("evaluate", "out"), ("compare", "out"), again):
        code, _, error = run(*command)
        assert code == 2, error
        assert_one_line(error)
        assert expected in error
    assert not (tmp_path / "out/evaluation").exists()


def test_a_run_is_not_measured_on_images_that_it_was_trained_on_however_they_are_named(
    run: Run, tmp_path: Path
) -> None:
    none = "evaluation.protocol=none"
    assert run("train", *settings(*SMALL, none, "data.validation_share=0.5"), "--run-dir", "held")[0] == 0
    (tmp_path / "link").symlink_to("photos")
    prepare = ("data", "prepare", "--dataset", "folder", "--root", "photos", "--class-seed", "1", "--out", "shards")
    code, _, error = run(*prepare)
    assert code == 0, error
    for changes in (
        ["data.validation_seed=2"],
        ["data.class_seed=1", "data.validation_share=0"],
        ["data.class_seed=1", "data.validation_share=0", "data.root=link"],
        ["data.class_seed=1", "data.validation_share=0", f"data.root=file://{tmp_path}/photos"],
        ["data.class_seed=1", "data.validation_share=0", "data.shards=shards"],
    ):
        code, _, error = run("evaluate", "held", *[part for change in changes for part in ("--set", change)])
        assert code == 2, changes
        assert_one_line(error)
        assert "images that this would measure were trained on, e.g. '" in error
    photographs(tmp_path / "others", prefix="new-")
    for fine in ("data.validation_share=0", "data.root=others"):
        code, _, error = run("evaluate", "held", "--set", fine)
        assert code == 0, error


def test_shards_of_another_choice_of_classes_are_refused(run: Run) -> None:
    prepare = ("data", "prepare", "--dataset", "folder", "--root", "photos", "--class-seed", "3", "--out", "shards")
    assert run(*prepare)[0] == 0
    train = ("train", *settings(*SMALL, "evaluation.protocol=none", "data.shards=shards"), "--run-dir", "out")
    code, _, error = run(*train)
    assert code == 2
    assert_one_line(error)
    assert "was prepared with data.class_seed=3, which chose its classes" in error
    code, _, error = run(*train, "--set", "data.class_seed=3")
    assert code == 0, error


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (["inference.name=mixup_inference", "inference.pool=100000"], "inference.pool must be at most the 16 training"),
        (["model.mean=[0.5,0.5]"], "model.mean"),
        (["model.backbone=bn_inception", "data.image_size=8"], "bn_inception"),
    ],
)
def test_a_network_that_cannot_take_the_images_is_found_out_before_anything_is_written(
    run: Run, tmp_path: Path, fault: list[str], expected: str
) -> None:
    code, _, error = run("train", *settings(*SMALL, *fault), "--run-dir", "out")
    assert code == 2
    assert_one_line(error)
    assert expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "measured"), [((), "standard"), (("--protocol", "quick"), "quick")])
def test_the_protocol_is_the_configs_unless_the_option_names_another(
    run: Run, option: tuple[str, ...], measured: str
) -> None:
    sizes = ("evaluation.protocol=standard", "evaluation.apgd_steps=1", "evaluation.square_queries=2")
    code, out, error = run("evaluate", "my_models:small", *settings(*sizes, UNTRACKED), *option)
    assert code == 0, error
    assert f"evaluation/{measured}/results.parquet" in out


def assert_one_line(error: str) -> None:
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error


BAD: dict[str, tuple[list[str], str]] = {
    "a model that gives NaN": (["my_models:nan"], "must be finite; NaN or infinity for 8 of 8 images"),
    "embeddings that are not normalised": (["my_models:long"], "lengths from 3 to 3. Give --normalise to scale them."),
    "output of the wrong rank": (["my_models:rank_3"], "must map 8 images to float embeddings [8, D]"),
    "a function that gives no model": (["my_models:no_model"], "must return a torch.nn.Module; got int"),
    "a missing module": (["my_other:small"], "there is no module 'my_other'"),
    "a missing function": (["my_models:smal"], "Did you mean 'small'?"),
    "a missing run": (["runs/gone"], "'runs/gone' is no run folder, MLflow model URI, .safetensors file or module"),
    "weights without a config": (["w.safetensors"], "give the YAML with their section 'model' with --config"),
    "epsilons that do not rise": (["my_models:small", "--epsilons", "0.1,0.05"], "epsilons must rise from 0"),
    "epsilons that are no numbers": (["my_models:small", "--epsilons", "0;1"], "--epsilons takes numbers separated"),
    "epsilons of 0 to 255": (["my_models:small", "--epsilons", "0,8"], "Did you mean 8/255?"),
    "an epsilon of 0 to 255": (["my_models:small", "--epsilon", "8"], "Did you mean 8/255?"),
    "a norm that PGD has not": (["my_models:small", "--set", "attack.norm=l0"], "defined for the norm linf and l2"),
    "an unknown attack": (["my_models:small", "--set", "attack.name=pdg"], "no attack is called 'pdg'"),
    "an unknown objective": (
        ["my_models:small", "--set", "evaluation.objectives=[displacemen]"],
        "evaluation.objectives",
    ),
    "an unknown protocol": (["my_models:small", "--protocol", "fulll"], "evaluation.protocol"),
    "the protocol none": (["my_models:small", "--protocol", "none"], "give --protocol quick, standard or full"),
    "a fraction of 0": (["my_models:small", "--attacked-fraction", "0,0.5"], "fractions must rise from above 0"),
    "a fraction in percent": (["my_models:small", "--attacked-fraction", "10,50"], "at most 1; got 50"),
    "no workers": (["my_models:small", "--workers", "0"], "--workers must be at least 1; got 0"),
    "no draws": (["my_models:small", "--eot-draws", "0"], "evaluation.eot_draws"),
    "another model that is missing": (["my_models:small", "--transfer-from", "my_models:gone"], "has no 'gone'"),
    "a config that is missing": (["my_models:small", "--config", "gone.yaml"], "gone.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, run: Run, tmp_path: Path) -> None:
    arguments, expected = BAD[case]
    before = set(content(tmp_path))
    code, _, error = run("evaluate", *settings(UNTRACKED), *arguments)
    assert code == 2, error
    assert_one_line(error)
    assert expected in error
    left = {name for name in set(content(tmp_path)) - before if "__pycache__" not in name}
    assert left == set()
    assert not (tmp_path / "evaluations").exists()


def test_no_target_is_refused_with_a_hint(run: Run) -> None:
    code, _, error = run("evaluate")
    assert code == 2
    assert "Missing argument 'target'" in error.replace("TARGET", "target")
    assert "Traceback" not in error


def test_a_class_with_one_image_is_one_line(run: Run, tmp_path: Path) -> None:
    """Whichever classes are drawn for testing, one of these is among them."""
    photographs(tmp_path / "few", alone="abcdef")
    code, _, error = run("evaluate", "my_models:small", *settings("data.root=few", UNTRACKED))
    assert code == 2
    assert_one_line(error)
    assert "has one image" in error
    assert not (tmp_path / "evaluations").exists()


def test_a_folder_that_cannot_be_written_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    code, _, error = run("evaluate", "my_models:small", *settings(UNTRACKED), "--output", "file/here")
    assert code == 2
    assert_one_line(error)
    assert "file/here" in error


def test_an_unfinished_run_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("seed: 3\n", encoding="utf-8")
    code, _, error = run("evaluate", "half")
    assert code == 2
    assert_one_line(error)
    assert "is not a finished run (no summary.json)" in error
    code, _, error = run("evaluate", "photos")
    assert code == 2
    assert_one_line(error)
    assert "is not a run folder" in error


@pytest.mark.ray
def test_workers_find_what_was_named_relative_to_the_users_folder(run: Run, tmp_path: Path, ray_session: None) -> None:
    """Ray's processes were started elsewhere; the numbers are those of one process."""
    tiny = settings(UNTRACKED, "evaluation.batch_size=5")
    alone = run("evaluate", "my_models:small", *tiny, "-o", "alone")
    both = run("evaluate", "my_models:small", *tiny, "-o", "both", "--workers", "2")
    assert (alone[0], both[0]) == (0, 0), both[2]
    assert "Evaluating on 2 Ray workers" in both[1]
    ends, summaries = [content(tmp_path / name / "evaluation" / "quick") for name in ("alone", "both")], []
    for end in ends:
        summaries.append(json.loads(end.pop("summary.json")))
        del summaries[-1]["command"]
    assert ends[0] == ends[1]
    assert summaries[0] == summaries[1]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_same_command_to_the_same_bytes(run: Run, tmp_path: Path) -> None:
    """Slow: a process of its own imports torch. SIGKILL as soon as the first attack is on disk."""
    same = ["my_models:small", *settings(UNTRACKED, "evaluation.num_steps=400"), "-o", "out"]
    parts = tmp_path / "out" / "evaluation" / "quick" / "parts"
    process = subprocess.Popen(
        [sys.executable, "-m", "eat_dist", "evaluate", *same], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    kept = {path.name: path.stat().st_ino for path in parts.glob("*.json")}
    assert 2 <= len(kept) < 4
    assert not (parts.parent / "summary.json").exists()

    assert run("evaluate", *same)[0] == 0
    assert {name: (parts / name).stat().st_ino for name in kept} == kept
    resumed = {name: found for name, found in content(parts.parent).items() if not name.endswith(".tmp")}
    (tmp_path / "out").rename(tmp_path / "killed")
    assert run("evaluate", *same)[0] == 0
    assert content(parts.parent) == resumed
