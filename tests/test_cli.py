"""The command line: what a user did wrong is one line, exit code 2, no traceback, and nothing half-written."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from eat_dist.models.ensemble import load_ensemble

TINY = [
    "data.batch_size=200",
    "data.images_per_class=40",
    "model.widths=[8,16]",
    "model.embedding_dim=16",
    "attack.num_steps=2",
    "train.epochs=2",
    "checkpoint.every=1",
    "evaluation.num_steps=2",
    "evaluation.kmeans_seeds=1",
    "cluster.backend=local",
    "cluster.threads_per_member=1",
]


def settings(*assignments: str) -> list[str]:
    return [part for assignment in (*TINY, *assignments) for part in ("--set", assignment)]


def omniglot(folder: Path) -> None:
    """Two archives in the official layout, with four drawings of each of two characters an alphabet."""
    alphabets = {
        "images_background_small1": ["Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"],
        "images_background_small2": ["Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog"],
    }
    buffer = io.BytesIO()
    Image.new("1", (105, 105), 1).save(buffer, "PNG")
    folder.mkdir()
    for archive, names in alphabets.items():
        with zipfile.ZipFile(folder / f"{archive}.zip", "w") as file:
            for alphabet in names:
                for character in (1, 2):
                    for drawing in range(1, 5):
                        name = f"{archive}/{alphabet}/character{character:02d}/00{character}_{drawing:02d}.png"
                        file.writestr(name, buffer.getvalue())


def make_missing(_: Path) -> list[str]:
    return ["data.dataset=omniglot", "data.root=missing"]


def make_corrupt(folder: Path) -> list[str]:
    omniglot(folder / "omniglot")
    (folder / "omniglot" / "images_background_small1.zip").write_bytes(b"PK no zip")
    return ["data.dataset=omniglot", "data.root=omniglot"]


def photographs(folder: Path, *, images_a_class: int, spoil: str = "") -> list[str]:
    """Six classes in a folder each; ``spoil`` is an image that is no image."""
    for name in "abcdef":
        (folder / "photos" / name).mkdir(parents=True)
        for image in range(images_a_class):
            path = folder / "photos" / name / f"{image}.png"
            Image.new("RGB", (8, 8), (ord(name), image, 0)).save(path)
            if f"{name}/{image}.png" == spoil:
                path.write_bytes(b"no image")
    return ["data.dataset=folder", "data.root=photos", "data.image_size=8"]


def make_undecodable(folder: Path) -> list[str]:
    return photographs(folder, images_a_class=4, spoil="c/2.png")


def make_single(folder: Path) -> list[str]:
    return photographs(folder, images_a_class=1)


BAD_SETTINGS = {
    "an unknown key": (["attack.epsilom=0.1"], "unknown key 'attack.epsilom' (did you mean 'epsilon'?)"),
    "a negative epsilon": (["attack.epsilon=-0.1"], "attack.epsilon: input should be greater than or equal to 0"),
    "no members": (["ensemble.members=0"], "ensemble.members: input should be greater than or equal to 1; got 0"),
    "a batch of one class": (["data.batch_size=40"], "a batch must hold at least two classes"),
    "an unknown defense": (["defense.name=eta"], "no defense is called 'eta'; known: act, "),
    "an unknown dataset": (["data.dataset=digit"], "Did you mean 'digits'?"),
    "two faults at once": (["attack.epsilon=-1", "train.epochs=0"], "train.epochs: input should be greater"),
    "epsilon in 0 to 255": (["attack.epsilon=8"], "Did you mean 8/255?"),
    "a GPU that is not there": (["cluster.device=cuda"], "torch sees no GPU here"),
}
BAD_DATA = {
    "a missing archive": (make_missing, "missing"),
    "a corrupt archive": (make_corrupt, "images_background_small1.zip"),
    "an undecodable image": (make_undecodable, "c/2.png"),
    "a class with one image": (make_single, "has one image"),
}


def assert_one_line(error: str) -> None:
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_leaves_nothing(
    case: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    assignments, expected = BAD_SETTINGS[case]
    if case == "a GPU that is not there" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    code, _, error = run("train", *settings(*assignments), "--run-dir", "out")

    assert code == 2
    assert_one_line(error)
    assert expected in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing(
    case: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    prepare, expected = BAD_DATA[case]

    code, _, error = run("train", *settings(*prepare(tmp_path)), "--run-dir", "out")

    assert code == 2
    assert_one_line(error)
    assert expected in error
    assert not (tmp_path / "out").exists()


def test_a_skipped_image_is_counted_and_reported(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assignments = [*make_undecodable(tmp_path), "data.on_bad_image=skip", "evaluation.protocol=none"]

    code, _, error = run(
        "train", *settings(*assignments, "tracking.enabled=false", "train.epochs=1"), "--run-dir", "out"
    )

    assert code == 0, error
    assert "1 undecodable images are left out" in error
    (skipped,) = json.loads((tmp_path / "out" / "summary.json").read_text())["skipped_images"]
    assert skipped == "c/2.png"


def test_embedding_treats_a_file_as_training_treated_it(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Omniglot is trained with strokes as 1; a drawing from the archive must embed as the same drawing in training."""
    omniglot(tmp_path / "omniglot")
    data = ["data.dataset=omniglot", "data.root=omniglot", "data.subset=true"]
    plain = ["evaluation.protocol=none", "tracking.enabled=false", "train.epochs=1", "data.image_size=28"]
    assert run("train", *settings(*data, *plain), "--run-dir", "out")[0] == 0
    Image.new("1", (105, 105), 1).save(tmp_path / "drawing.png")  # what the fixture's archives are full of

    assert run("embed", "out", "drawing.png", "-o", "drawing.parquet")[0] == 0

    (embedding,) = pq.read_table(tmp_path / "drawing.parquet")["embedding"].to_pylist()
    with torch.no_grad():
        paper_is_0 = load_ensemble(tmp_path / "out" / "model")(torch.zeros(1, 1, 28, 28))
    assert torch.allclose(torch.tensor([embedding]), paper_is_0, atol=1e-6)


def test_a_config_that_is_not_yaml_is_one_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: [1\nepochs: }")

    code, _, error = run("train", "--config", "bad.yaml")

    assert code == 2
    assert_one_line(error)
    assert "'bad.yaml' is not YAML" in error


def test_an_existing_folder_is_never_overwritten_unasked(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")

    code, _, error = run("train", *settings(), "--run-dir", "mine")
    forced, _, refusal = run("train", *settings(), "--run-dir", "mine", "--overwrite")

    assert (code, forced) == (2, 2)
    assert_one_line(error)
    assert "--overwrite" in error
    assert "is not a run folder" in refusal
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_run_folder_that_cannot_be_written_is_one_line(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")

    code, _, error = run("train", *settings(), "--run-dir", "file/run")

    assert code == 2
    assert_one_line(error)
    assert "file/run" in error


def test_a_disk_that_fills_up_is_one_line_and_leaves_no_half_file(tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: both fail in the middle of writing the first checkpoint."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000));"
        "from eat_dist.cli import main; sys.argv[0] = 'eat-dist'; main()"
    )
    command = [sys.executable, "-c", script, "train", *settings("tracking.enabled=false"), "--run-dir", "out"]

    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: cannot write ")
    assert ended.stderr.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not list((tmp_path / "out").rglob("checkpoint.json"))


@pytest.mark.parametrize("case", ["no folder", "an empty folder", "a run without a checkpoint", "a foreign checkpoint"])
def test_a_resume_that_cannot_work_is_one_line(
    case: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if case != "no folder":
        folder.mkdir()
    if case in ("a run without a checkpoint", "a foreign checkpoint"):
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 3}))
    if case == "a foreign checkpoint":
        run("train", *settings("tracking.enabled=false", "evaluation.protocol=none"), "--run-dir", "other")
        shutil.copytree(tmp_path / "other" / "checkpoints", folder / "checkpoints")

    code, _, error = run("train", "--resume", "run")

    assert code == 2
    assert_one_line(error)
    expected = {
        "a run without a checkpoint": "has no checkpoint to resume from",
        "a foreign checkpoint": "belongs to a run with another configuration",
    }
    assert expected.get(case, "is not a run folder") in error


def test_resume_takes_no_other_settings(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run("train", "--resume", "run", "--set", "seed=3")

    assert code == 2
    assert_one_line(error)


def test_an_unknown_flag_is_refused_with_a_hint(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run("train", "--epochs", "3")

    assert code == 2
    assert "No such option" in error
    assert "Traceback" not in error


@pytest.mark.ray
def test_more_members_than_the_cluster_can_place_is_one_line_with_the_arithmetic(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, ray_session: None
) -> None:
    code, _, error = run("train", *settings("cluster.backend=ray", "cluster.cpus_per_member=1"), "--run-dir", "out")

    assert code == 2
    assert_one_line(error)
    assert "3 members need 1 CPU each; the cluster has 0 GPUs and 2 CPUs on 1 node(s), room for 2" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_trains_on_ray_to_the_weights_of_an_in_process_run(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, ray_session: None
) -> None:
    """Slow: Ray Train needs ten to twenty seconds to start three workers."""
    plain = ["tracking.enabled=false", "evaluation.protocol=none"]

    code, _, error = run("train", *settings("cluster.backend=ray", *plain), "--run-dir", "ray")
    assert code == 0, error
    assert run("train", *settings(*plain), "--run-dir", "local")[0] == 0

    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("ray", "local")]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert summaries[0]["passes"] == summaries[1]["passes"]
    assert not (tmp_path / "ray" / "ray").exists()  # Ray Train's own folder is gone when the run is over


@pytest.mark.ray
@pytest.mark.slow
def test_a_member_whose_loss_is_not_finite_stops_a_ray_run_with_its_own_words(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, ray_session: None
) -> None:
    """Slow: as above. The error crosses from a worker to the command unchanged, and no restart is tried."""
    diverging = ["optimiser.learning_rate=1e30", "optimiser.schedule=constant", "tracking.enabled=false"]

    code, _, error = run("train", *settings("cluster.backend=ray", *diverging), "--run-dir", "out")

    assert code == 2
    assert_one_line(error)
    assert "loss is nan" in error
    assert not (tmp_path / "out" / "summary.json").exists()


def test_train_evaluate_embed_and_resume_work_on_one_run(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, error = run("train", *settings("seed=5"), "--run-dir", "out")
    assert code == 0, error
    assert "under attack by" in out
    assert "mlflow ui --backend-store-uri" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["seed"] == 5
    assert set(summary["attacked"]) == {
        "pgd2/nearest_negative",
        "pgd2/nearest_wrong_centroid",
        "pgd2/random_wrong_centroid",
    }
    assert len(summary["members"]) == 3

    # Everything is done already: evaluating again and resuming find it, and change no figure.
    assert run("evaluate", "out")[0] == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert run("train", "--resume", "out")[0] == 0
    resumed = json.loads((tmp_path / "out" / "summary.json").read_text())
    for key in ("weights_sha256", "clean", "attacked", "worst", "members", "passes", "mlflow_run_id"):
        assert resumed[key] == summary[key], key

    # The saved config runs again, to the same weights.
    again = run("train", "--config", "out/config.yaml", "--run-dir", "again", "--set", "evaluation.protocol=none")
    assert again[0] == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["weights_sha256"] == summary["weights_sha256"]

    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.effect_noise((20, 20), 60).save(images / f"{number}.png")
    (images / "broken.png").write_bytes(b"no image")
    code, _, error = run("embed", "out", "images", "-o", "embeddings.parquet")
    assert code == 2
    assert "broken.png" in error
    assert not (tmp_path / "embeddings.parquet").exists()
    saved = tmp_path / "out" / "config.yaml"  # a run of a GPU cluster embeds anywhere
    saved.write_text(saved.read_text().replace("device: cpu", "device: cuda").replace("device: auto", "device: cuda"))
    assert run("embed", "out", "images", "-o", "embeddings.parquet", "--skip-bad-images")[0] == 0
    table = pq.read_table(tmp_path / "embeddings.parquet")
    assert table["path"].to_pylist() == [f"images/{number}.png" for number in range(3)]
    embeddings = torch.tensor(table["embedding"].to_pylist())
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-5)

    # MLflow has the run, its figures, and a model that embeds as the run's own does.
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = mlflow.get_run(summary["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["attack.num_steps"] == "2"
    assert tracked.data.metrics["clean/r_at_1"] == pytest.approx(summary["clean"]["r_at_1"])
    model = mlflow.pyfunc.load_model(f"runs:/{summary['mlflow_run_id']}/ensemble")
    batch = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        own = load_ensemble(tmp_path / "out" / "model")(batch)
    assert torch.allclose(torch.from_numpy(model.predict(batch.numpy())), own, atol=1e-6)
    mlflow.set_tracking_uri(None)
