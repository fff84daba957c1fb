"""What goes along with a job: all code and configs, and no logs, databases, results, data, environments or secrets."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY
from eat_dist.cluster import package
from eat_dist.cluster.package import Package, collect, find_root
from eat_dist.errors import StorageError

GOES = [
    "pyproject.toml",
    "cluster.yaml",
    "configs/mine.yaml",
    "tune_spaces/smoke.yaml",
    "jobs/train.py",
    "mymodel.py",
    "eat_dist/__init__.py",
    "eat_dist/data/load.py",  # folders of the package that are called like results
    "eat_dist/runs/run.py",
    "eat_dist/evaluation/ers.py",
    "eat_dist/report/templates/report.html",
    "benchmarks/speed.py",
]
STAYS = [
    ".git/HEAD",
    ".venv/bin/python",
    "venv/bin/python",
    "eat_dist/__pycache__/batch.cpython-311.pyc",
    "eat_dist.egg-info/PKG-INFO",
    ".pytest_cache/README.md",
    ".mypy_cache/a.json",
    "notebooks/.ipynb_checkpoints/a.ipynb",
    "train.log",
    "configs/night.log",
    "nohup.out",
    "mlflow.db",
    "mlflow.db-journal",
    "deep/below/optuna.db",
    "runs/digits/summary.json",
    "bench/table.csv",
    "evaluations/a/summary.json",
    "sweeps/a/sweep.json",
    "mlruns/0/meta.yaml",
    "mlartifacts/1/model.bin",
    "report.html",
    "embeddings.parquet",
    "data/images/1.jpg",
    "cub.zip",
    "resnet50.pth",
    "weights/member_0.safetensors",
    ".env",
    "keys/cluster.pem",
    ".ray/auth_token",
]


def build(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")


def unpacked(sent: Package, folder: Path) -> list[str]:
    folder.mkdir()
    sent.write(folder / "package.zip")
    with zipfile.ZipFile(folder / "package.zip") as archive:
        return archive.namelist()


def test_code_and_configs_go_along_and_nothing_else(tmp_path: Path) -> None:
    build(tmp_path / "project", [*GOES, *STAYS])

    sent = collect(tmp_path / "project")

    assert list(sent.files) == sorted(GOES)
    assert unpacked(sent, tmp_path / "there") == sorted(GOES)
    assert sent.bytes == sum(len(f"content of {name}") for name in GOES)


def test_every_file_of_this_checkouts_package_goes_along() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "eat_dist", "configs", "jobs"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")

    assert set(tracked) <= set(collect(REPOSITORY).files)


def test_a_log_that_grows_changes_nothing_and_a_config_does(tmp_path: Path) -> None:
    build(tmp_path / "project", [*GOES, *STAYS])
    archives = [tmp_path / f"{number}.zip" for number in range(3)]
    collect(tmp_path / "project").write(archives[0])
    (tmp_path / "project" / "train.log").write_text("more")
    (tmp_path / "project" / "mlflow.db").write_text("more")
    os.utime(tmp_path / "project" / "mymodel.py", (0, 0))
    collect(tmp_path / "project").write(archives[1])
    (tmp_path / "project" / "configs" / "mine.yaml").write_text("more")
    collect(tmp_path / "project").write(archives[2])

    assert archives[0].read_bytes() == archives[1].read_bytes()
    assert archives[1].read_bytes() != archives[2].read_bytes()


def test_a_file_deleted_after_the_choice_is_left_out(tmp_path: Path) -> None:
    build(tmp_path / "project", ["a.py", "b.py"])
    sent = collect(tmp_path / "project")
    (tmp_path / "project" / "a.py").unlink()

    assert unpacked(sent, tmp_path / "there") == ["b.py"]


def test_ignore_files_take_more_out_and_bring_back_in(tmp_path: Path) -> None:
    build(tmp_path, ["a.py", "notes.txt", "big/model.py", "big/raw.txt", "mine.pth", "other.pth"])
    (tmp_path / ".gitignore").write_text("notes.txt\n")
    (tmp_path / ".rayignore").write_text("!mine.pth\n")
    (tmp_path / "big" / ".rayignore").write_text("*.txt\n")

    files = collect(tmp_path).files

    assert [name for name in files if "ignore" not in name] == ["a.py", "big/model.py", "mine.pth"]


def test_links_are_followed_and_a_circle_ends(tmp_path: Path) -> None:
    build(tmp_path, ["project/a.py", "elsewhere/mine.yaml"])
    (tmp_path / "project" / "configs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "project" / "again").symlink_to(tmp_path / "project")

    assert list(collect(tmp_path / "project").files) == ["a.py", "configs/mine.yaml"]


def test_too_much_is_refused_with_the_largest_files_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_BYTES", 5 * 2**20)
    for name, mebibytes in {"a.tif": 1, "video.avi": 3, "b.tif": 2, "c.tif": 1}.items():
        (tmp_path / name).write_bytes(bytes(mebibytes * 2**20))

    with pytest.raises(StorageError) as refused:
        collect(tmp_path)

    assert "has 7.0 MiB to send along with the job, Ray takes 5.0 MiB" in str(refused.value)
    assert "video.avi (3.0 MiB), b.tif (2.0 MiB), a.tif (1.0 MiB)." in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_of_countless_files_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_FILES", 3)
    build(tmp_path, ["a", "b", "c", "d"])

    with pytest.raises(StorageError, match="more than 3 files"):
        collect(tmp_path)


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no folder"):
        collect(tmp_path / "missing")


def test_the_root_is_the_checkout_around_else_the_folder_itself(tmp_path: Path) -> None:
    build(tmp_path, ["checkout/eat_dist/__init__.py", "checkout/configs/mine.yaml", "plain/mine.yaml"])

    assert find_root(tmp_path / "checkout" / "configs") == tmp_path / "checkout"
    assert find_root(tmp_path / "plain") == tmp_path / "plain"
