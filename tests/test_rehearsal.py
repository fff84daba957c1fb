"""`make rehearse` from its head to its reports, on the digits, and what it leaves behind when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "deploy" / "rehearse.py"
TINY = [
    "--config",
    "configs/digits.yaml",
    "--trials",
    "2",
    "--set",
    "model.widths=[4,8]",
    "--set",
    "data.batch_size=36",
]

pytestmark = [pytest.mark.long, pytest.mark.ray]


def rehearse(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), *TINY, "--out", str(out)]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def processes_of(out: Path) -> list[str]:
    """Command lines of the processes that work in, or for, the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        home = (process.info["environ"] or {}).get("HOME")
        if home == str(out / "home") or any(str(out) in word for word in process.info["cmdline"] or []):
            found.append(" ".join(process.info["cmdline"] or []))
    return found


def test_the_rehearsal_ends_with_a_killed_member_two_measured_trials_and_both_reports(tmp_path: Path) -> None:
    """Slow: a head, an MLflow server, a training job with a death in it and a sweep."""
    out = tmp_path / "out"
    code = rehearse(out).wait(timeout=1500)

    assert code == 0, out.with_suffix(".log").read_text()
    assert processes_of(out) == []
    result = json.loads((out / "rehearsal.json").read_text())
    assert "the run went on from its checkpoint" in result["killed"]
    assert len(result["seconds"]) == 5
    summary = json.loads((out / "runs" / "eat" / "summary.json").read_text())
    assert summary["resumed_from_iteration"] > 0
    trials = json.loads((out / "sweep" / "trials.json").read_text())
    assert [trial["status"] in ("FINISHED", "PRUNED") for trial in trials] == [True, True]
    for page in ("comparison.html", "sweep.html"):
        assert "</html>" in (out / page).read_text()


def test_an_interrupted_rehearsal_leaves_no_process_and_says_so_by_its_exit_code(tmp_path: Path) -> None:
    """Slow: it is interrupted once the job trains."""
    out = tmp_path / "out"
    running = rehearse(out)
    deadline = time.monotonic() + 300
    while not (out / "runs" / "eat" / "config.yaml").exists():
        assert running.poll() is None, out.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, processes_of(out)
        time.sleep(0.5)

    os.kill(running.pid, signal.SIGINT)

    assert running.wait(timeout=180) == 130
    assert "Traceback" not in out.with_suffix(".log").read_text()
    assert processes_of(out) == []
