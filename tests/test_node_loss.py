"""Nodes that are lost, and nodes that are still to come, cost time, and no number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from losing_nodes import KILL_AFTER, config_of
from small_runs import largest_difference, train_locally, weights


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_lost_nodes_change_no_weight_whether_another_is_free_or_comes_later(tmp_path: Path) -> None:
    """Slow: one cluster of up to four nodes, on which the members are started three times.

    The run begins before there is any node for it; the first node is lost with another free, the second with none.
    """
    config = config_of()
    train_locally(config, tmp_path / "undisturbed")
    temporary = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need a short path
    environment = os.environ | {
        "RAY_TMPDIR": temporary,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    try:
        script = Path(__file__).with_name("losing_nodes.py")
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    told = json.loads((tmp_path / "story.json").read_text())

    at_once, in_vain = told["refusals"]
    assert at_once.startswith("2 members need 1 CPU each; the cluster has 0 GPUs and 0 CPUs on 1 node(s), room for 0.")
    assert "room for 0; that did not change in" in in_vain
    assert "cluster.wait_for_nodes is 3" in in_vain
    assert "\n" not in in_vain

    assert len(told["killed_at"]) == len(KILL_AFTER)
    at_the_start, after_the_second = told["waited_for"]
    assert "2 members need 1 CPU each; the cluster has 0 GPUs and 0 CPUs on 1 node(s), room for 0;" in at_the_start
    assert "room for 1;" in after_the_second
    assert sum("restart" in notice for notice in told["notices"]) == len(KILL_AFTER)
    assert len(set(told["resumed_from"])) == 1
    assert told["resumed_from"][0] >= KILL_AFTER[1] - KILL_AFTER[1] % 5
    assert told["coordinator_with_driver"]
    assert told["launched"] == [False, True], "Ray labels nodes that a launcher starts"
    assert largest_difference(weights(tmp_path / "undisturbed", 2), weights(tmp_path / "ray", 2)) == 0
