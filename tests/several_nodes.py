"""Placement on three nodes of one machine, as a program: a second cluster cannot live beside a test session's own.

Prints one line of JSON (tests/test_replicas_on_ray.py reads it).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

import conftest  # noqa: F401  (sets the environment that Ray and torch start with)
from eat_dist.cluster.train import train_on_ray
from eat_dist.config import RunConfig
from eat_dist.storage import Folder
from small_runs import small_config


def workers_by_node(before: set[str]) -> list[int]:
    """How many bundles of the placement group that is new since ``before`` were on each node, most first."""
    table = ray.util.placement_group_table()
    (new,) = [table[key] for key in set(table) - before]
    return sorted(Counter(new["bundles_to_node_id"].values()).values(), reverse=True)


def train(config: RunConfig, folder: Path) -> dict[str, Any]:
    before = set(ray.util.placement_group_table())
    results = train_on_ray(config, num_classes=5, run_folder=Folder.at(folder))
    return {"workers": workers_by_node(before), "nodes_of_a_member": [result.nodes for result in results]}


def shares_of_a_gpu_that_fit(share: float, at_most: int) -> int:
    """How many bundles of a share Ray finds room for."""
    for count in range(1, at_most + 1):
        group = placement_group([{"GPU": share}] * count)
        there = group.wait(timeout_seconds=2)
        remove_placement_group(group)
        if not there:
            return count - 1
    return at_most


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for cpus, gpus in ((2, 0), (2, 0), (1, 2)):
        cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        options = ["ensemble.members=2", "train.epochs=1", "cluster.device=cpu", "cluster.cpus_per_member=1"]
        found: dict[str, Any] = {}
        for placement in ("pack", "spread"):
            config = small_config(*options, "cluster.replicas_per_member=2", f"cluster.placement={placement}")
            found[placement] = train(config, folder / placement)
        found["0.4"] = shares_of_a_gpu_that_fit(0.4, 5)
        found["1/6"] = shares_of_a_gpu_that_fit(1 / 6, 12)
        found["0.1429"] = shares_of_a_gpu_that_fit(0.1429, 13)
        print(json.dumps(found))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
