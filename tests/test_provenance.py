"""What git says of the code that a run was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from eat_dist.provenance import git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_git_state_names_commit_branch_and_whether_files_changed(tmp_path: Path) -> None:
    git(tmp_path, "init", "--initial-branch", "trunk")
    (tmp_path / "a").write_text("1")
    assert git_state(tmp_path) == {"commit": "(initial)", "branch": "trunk", "dirty": "true"}
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--message", "first")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "branch": "trunk", "dirty": "false"}
    assert git_state(tmp_path) == clean
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == clean | {"dirty": "true"}


def test_git_state_is_empty_without_a_repository_or_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == {}
    assert git_state(tmp_path / "missing") == {}
    git(tmp_path, "init")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {}
