"""A driver of its own, for tests/test_node_loss.py: trains on a cluster of several nodes that come and go.

A process that has a session of Ray already cannot have this one, so it is a script:
``python tests/losing_nodes.py OUT`` writes ``OUT/ray`` (the run's folder) and ``OUT/story.json`` (what was seen).
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from eat_dist.cluster.session import is_launched
from eat_dist.cluster.train import train_on_ray
from eat_dist.config import RunConfig, override
from eat_dist.errors import ClusterError
from eat_dist.storage import Folder
from small_runs import small_config

MEMBERS = 2
# In the middle of an epoch of five iterations.
KILL_AFTER = (12, 42)
# Nodes come so long after they were asked for: several attempts, more than max_restarts would allow if they counted.
COMES_AFTER_S = 8.0
_STORE = {"object_store_memory": 80 * 2**20}


def config_of() -> RunConfig:
    return small_config(
        "ensemble.members=2",
        "train.epochs=20",
        "attack.num_steps=10",
        "name=nodes",
        "cluster.device=cpu",
        "cluster.cpus_per_member=1",
        "cluster.wait_for_nodes=900",
        "cluster.max_restarts=2",
    )


class Story:
    """The main thread's work while the members train: ``add_node`` needs the main thread."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.notices: list[str] = []
        self.killed_at: list[int] = []
        self.waited_for: list[str] = []

    def run(self, config: RunConfig, folder: Path) -> Any:
        def train() -> None:
            try:
                results = train_on_ray(
                    config,
                    num_classes=5,
                    run_folder=Folder.at(folder),
                    on_iteration=lambda ensemble: self.events.put(("iteration", ensemble.iteration)),
                    on_notice=lambda text: self.events.put(("notice", text)),
                )
                self.events.put(("end", results))
            except BaseException as error:
                self.events.put(("end", error))

        threading.Thread(target=train, daemon=True).start()
        while True:
            kind, value = self.events.get(timeout=600)
            if kind == "end":
                return value
            if kind == "iteration":
                self._kill_a_node_if_due(value)
            else:
                print(f"notice: {value}", flush=True)
                self.notices.append(value)
                self._bring_what_is_missing(value)

    def _kill_a_node_if_due(self, iteration: int) -> None:
        kills = len(self.killed_at)
        if kills == len(KILL_AFTER) or iteration < KILL_AFTER[kills]:
            return
        free = ray._private.state.available_resources_per_node()
        used = [node for node in self.cluster.worker_nodes if free.get(node.node_id, {}).get("CPU", 0) < 1]
        self.killed_at.append(iteration)
        print(f"killing a node that trains, after iteration {iteration}", flush=True)
        self.cluster.remove_node(used[0], allow_graceful=False)

    def _bring_what_is_missing(self, notice: str) -> None:
        if "wait_for_nodes" not in notice or len(self.waited_for) > len(self.killed_at):
            return
        self.waited_for.append(notice)
        time.sleep(COMES_AFTER_S)
        # At the beginning all that is needed and a spare; later one for one.
        self._add_nodes(MEMBERS + 1 if len(self.waited_for) == 1 else 1)

    def _add_nodes(self, count: int) -> None:
        goal = living_nodes() + count
        while living_nodes() < goal:
            try:
                self.cluster.add_node(num_cpus=1, **_STORE)
            except Exception as error:
                print(f"a node has not started: {error}", flush=True)
                time.sleep(10)


def living_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def coordinator_is_with_the_driver(config: RunConfig) -> bool:
    """Whether actors like the run's are where this process is; several, since chance could have one so."""
    from eat_dist.cluster.coordinator import start_coordinator
    from eat_dist.robustness.statistics import Policy

    here = ray.get_runtime_context().get_node_id()
    actors = [start_coordinator(f"where-{number}", Policy.of(config, 5), timeout=1) for number in range(3)]
    ray.get([actor.process_id.remote() for actor in actors])
    places = {ray._private.state.actors(actor._actor_id.hex())["Address"]["NodeID"] for actor in actors}
    for actor in actors:
        ray.kill(actor)
    return places == {here}


def main(out: Path) -> None:
    config = config_of()
    # The usual patience of the head, but five looks at a node that does not answer take five seconds.
    health = {"health_check_period_ms": 1000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health, **_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    launched = [is_launched()]
    os.environ["RAY_NODE_TYPE_NAME"] = "workers"  # as launchers start nodes
    refusals = []
    for wait in ("0", "3"):  # not to be waited for; and waited for in vain
        try:
            train_on_ray(
                override(config, f"cluster.wait_for_nodes={wait}"), num_classes=5, run_folder=Folder.at(out / wait)
            )
        except ClusterError as error:
            refusals.append(str(error))
            print(f"refused: {error}", flush=True)
    story = Story(cluster)
    end = story.run(config, out / "ray")
    if isinstance(end, BaseException):
        raise end
    told = {
        "refusals": refusals,
        "notices": story.notices,
        "killed_at": story.killed_at,
        "waited_for": story.waited_for,
        "resumed_from": [result.resumed_from for result in end],
        "launched": [*launched, is_launched()],
        "coordinator_with_driver": coordinator_is_with_the_driver(config),
    }
    (out / "story.json").write_text(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
