"""A run on a cluster that has no workers yet waits for its autoscaler, and does not wait for ever."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoscaled import autoscaled_cluster
from eat_dist.cluster import scaling
from eat_dist.cluster.resources import Node, Placement, place
from eat_dist.config import ClusterConfig
from eat_dist.errors import ClusterError

DRIVER = """
import sys
from eat_dist.cluster.train import plan_placement
from eat_dist.config import RunConfig
from eat_dist.errors import ClusterError

def run(members, seconds):
    return RunConfig.model_validate(
        {"ensemble": {"members": members}, "cluster": {"device": sys.argv[1], "wait_for_nodes": seconds}}
    )

print("placed", plan_placement(run(2, 120), say=lambda text: print("said", text)).gpus)
try:
    plan_placement(run(4, 3))
except ClusterError as error:
    print("refused", error)
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """What the autoscaler is asked for, without one."""
    requests: list[list[dict[str, float]]] = []
    monkeypatch.setattr(scaling, "request_resources", lambda *, bundles: requests.append(bundles))
    monkeypatch.setattr(scaling, "_LOOK_EVERY_S", 0.0)
    return requests


def growing(monkeypatch: pytest.MonkeyPatch, *sizes: list[Node]) -> None:
    """The cluster as it is seen at each look; the last one stays."""
    looks: Iterator[list[Node]] = iter(sizes)
    last = sizes[-1]
    monkeypatch.setattr(scaling, "nodes", lambda: next(looks, last))


def placed(config: ClusterConfig, members: int) -> Placement:
    return scaling.when_there_is_room(
        lambda nodes: place(nodes, members=members, config=config), workers=members, config=config
    )


def test_without_waiting_a_cluster_that_is_too_small_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, asked: list[list[dict[str, float]]]
) -> None:
    growing(monkeypatch, [Node(0, 0)])

    with pytest.raises(ClusterError, match="2 members need 1 GPU each"):
        placed(ClusterConfig(device="cuda"), members=2)

    assert asked == []


def test_the_request_ends_with_the_wait_so_that_idle_nodes_may_go(
    monkeypatch: pytest.MonkeyPatch, asked: list[list[dict[str, float]]]
) -> None:
    growing(monkeypatch, [Node(0, 0)], [Node(0, 0)], [Node(8, 1), Node(8, 1)])

    assert placed(ClusterConfig(device="cuda", wait_for_nodes=60), members=2).gpus == 1

    assert asked == [[{"GPU": 1.0}] * 2, []]


def test_a_wait_that_is_over_says_so_and_ends_the_request(
    monkeypatch: pytest.MonkeyPatch, asked: list[list[dict[str, float]]]
) -> None:
    growing(monkeypatch, [Node(8, 1)])

    with pytest.raises(ClusterError, match=r"room for 1.*Waited 0.01 s .*cluster.wait_for_nodes.*ray status"):
        placed(ClusterConfig(device="cuda", wait_for_nodes=0.01), members=2)

    assert asked[-1] == []


def test_with_auto_gpus_are_asked_for_once_the_first_node_has_shown_one(
    monkeypatch: pytest.MonkeyPatch, asked: list[list[dict[str, float]]]
) -> None:
    first, more = [Node(8, 1)], [Node(8, 1), Node(8, 1)]
    growing(monkeypatch, [Node(0, 0)], [Node(0, 0)], first, first, more)

    placed(ClusterConfig(wait_for_nodes=60), members=2)

    assert asked == [[{"CPU": 1.0}] * 2, [{"GPU": 1.0}] * 2, []]


@pytest.mark.slow
def test_a_real_autoscaler_brings_the_nodes_of_a_run_from_none_behind_a_token() -> None:
    """About forty seconds: a head, its autoscaler, and two nodes that it starts."""
    temporary = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # short, for the sockets in it
    with temporary as folder, autoscaled_cluster(Path(folder), most=2) as environment:
        driver = [sys.executable, "-c", DRIVER, "cuda"]
        done = subprocess.run(driver, env=environment, capture_output=True, text=True, check=False, timeout=200)

    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert lines.get("placed") == "1.0", done.stdout + done.stderr
    assert lines["said"].startswith("waiting up to 120 s for nodes; now: 2 members need 1 GPU each")
    assert "room for 2" in lines["refused"]  # more than the cluster may grow to
    assert "Waited 3 s" in lines["refused"]
