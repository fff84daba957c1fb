"""Which code made a run."""

from __future__ import annotations

import os
import subprocess


def git_state(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Which code runs: the state of the git working tree that ``folder`` is in.

    Returns:
        ``commit`` and ``branch`` in git's words (``(initial)``, ``(detached)``) and ``dirty``: ``"true"``
        with changed or untracked files that are not ignored, else ``"false"``. Empty without git or a
        repository, or if git takes over 10 s.
    """
    # fsmonitor is a program of the repository's choice that may outlive the time limit.
    command = ["git", "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch"]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        status = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = status.stdout.decode(errors="replace").splitlines()
    heads = dict(line.split(" ", 2)[1:] for line in lines if line.startswith("# branch."))
    dirty = any(not line.startswith("#") for line in lines)
    state = {
        "commit": heads.get("branch.oid"),
        "branch": heads.get("branch.head"),
        "dirty": str(dirty).lower(),
    }
    return {name: value for name, value in state.items() if value is not None}
