"""Members of two replicas on Ray: the weights of one worker a member, and workers that sit where they should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_death import train_and_kill

from eat_dist.config import override
from eat_dist.storage import Folder
from small_runs import largest_difference, small_config, train_locally, weights

REPLICAS = "cluster.replicas_per_member=2"


@pytest.mark.ray
@pytest.mark.long
def test_two_replicas_train_the_weights_of_one_and_either_goes_on_from_the_others_checkpoint(
    tmp_path: Path, ray_session: None
) -> None:
    """Slow: Ray Train starts four workers. Transfer, the regulariser, crops and BatchNorm are all in it."""
    from eat_dist.cluster.train import train_on_ray

    config = small_config(
        "ensemble.members=2", "train.epochs=2", "defense.diversity_weight=0.5", "data.augmentation=crop_flip"
    )
    train_locally(config, tmp_path / "one")
    results = train_on_ray(override(config, REPLICAS), num_classes=5, run_folder=Folder.at(tmp_path / "two"))

    assert [(result.iterations, result.nodes) for result in results] == [(10, 1), (10, 1)]
    assert largest_difference(weights(tmp_path / "one", 2), weights(tmp_path / "two", 2)) <= 1e-5
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "model")
    Folder.at(tmp_path / "resumed" / "checkpoints").delete("00000010")
    resumed = train_locally(config, tmp_path / "resumed")
    assert [result.resumed_from for result in resumed] == [5, 5]
    assert largest_difference(weights(tmp_path / "one", 2), weights(tmp_path / "resumed", 2)) <= 1e-5


@pytest.mark.ray
@pytest.mark.long
def test_a_killed_replica_restarts_all_and_changes_no_weight(tmp_path: Path, ray_session: None) -> None:
    """Slow: Ray Train starts four workers three times. Under relay, and resumed by the replicas."""
    from eat_dist.cluster.train import train_on_ray

    config = small_config("ensemble.members=2", "train.epochs=8", "defense.transfer_rule=relay", "attack.num_steps=6")
    config = override(config, REPLICAS)
    train_on_ray(config, num_classes=5, run_folder=Folder.at(tmp_path / "undisturbed"))
    resumed_from = train_and_kill(config, tmp_path / "killed", "member")

    assert len(set(resumed_from)) == 1
    assert resumed_from[0] >= 5
    assert largest_difference(weights(tmp_path / "undisturbed", 2), weights(tmp_path / "killed", 2)) == 0


@pytest.mark.ray
@pytest.mark.long
def test_on_three_nodes_members_are_packed_or_spread_and_their_replicas_sit_together(tmp_path: Path) -> None:
    """Slow: three nodes and two runs. The nodes hold 2, 2 and 1 workers; two members of two replicas need 4."""
    program = Path(__file__).with_name("several_nodes.py")
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 characters
        environment = os.environ | {"HOME": str(tmp_path), "RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, str(program), str(tmp_path)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])

    assert found["pack"] == {"workers": [2, 2], "nodes_of_a_member": [1, 1]}
    assert found["spread"]["workers"] == [2, 1, 1]
    # One member whole where two workers are on a node; the other has to make do with what is left over.
    assert sorted(found["spread"]["nodes_of_a_member"]) == [1, 2]
    # Two GPUs hold not five shares of 0.4 but four, all twelve of 1/6, and not thirteen of 0.1429 but twelve: what
    # placement reckons with, too (tests/test_cluster.py).
    assert (found["0.4"], found["1/6"], found["0.1429"]) == (4, 12, 12)
