"""A run on a cluster that has no workers yet waits for its autoscaler."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from autoscaled import autoscaled_cluster

DRIVER = """
import os
import sys
address = os.environ["RAY_ADDRESS"]  # which conftest, behind small_runs, removes
from eat_dist.cluster.train import train_on_ray
from eat_dist.config import override
from eat_dist.storage import Folder
from small_runs import small_config

config = small_config("ensemble.members=2", "train.epochs=1", "cluster.device=cpu", "cluster.cpus_per_member=1")
config = override(config, "cluster.wait_for_nodes=240", f"cluster.address={address}")
folder = Folder.at(sys.argv[1])
results = train_on_ray(config, num_classes=5, run_folder=folder, on_notice=lambda text: print("notice", text))
print("trained", [result.iterations for result in results])
"""


@pytest.mark.long
@pytest.mark.ray
def test_a_real_autoscaler_brings_the_nodes_of_a_run_from_none_behind_a_token() -> None:
    """Slow: a head, its autoscaler, two nodes that it starts, and two members."""
    temporary = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # short, for the sockets in it
    with temporary as folder, autoscaled_cluster(Path(folder), most=2) as environment:
        here = str(Path(__file__).parent)
        environment["PYTHONPATH"] = f"{here}:{environment['PYTHONPATH']}" if "PYTHONPATH" in environment else here
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "1"  # so that the first try finds no room yet
        driver = [sys.executable, "-c", DRIVER, f"{folder}/run"]
        done = subprocess.run(driver, env=environment, capture_output=True, text=True, check=False, timeout=280)

    said = done.stdout + done.stderr
    assert "trained [5, 5]" in done.stdout, said
    assert "notice 2 members need 1 CPU each; the cluster has 0 GPUs and 0 CPUs on 1 node(s), room for 0; wait" in said
