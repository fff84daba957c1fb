"""Connecting to Ray."""

from __future__ import annotations

import logging
import os
import signal
import threading

import ray

from eat_dist.cluster.resources import Node
from eat_dist.config import ClusterConfig
from eat_dist.errors import ClusterError

# A local cluster holds statistics and a few megabytes of results; Ray's default would reserve a third of the memory.
_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
_NODE_GROUP = "ray.io/node-group"


def connect(config: ClusterConfig) -> None:
    """Join the configured cluster, or the one RAY_ADDRESS names, or start one on this machine.

    Raises:
        ClusterError: The cluster does not answer, or refuses the token, or is named by the address of Ray Client.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):  # a sweep's driver would run on the head, and its book cannot travel there
        raise ClusterError(
            f"'{address}' is an address of Ray Client, over which nothing is started; run the command on the cluster's "
            "head with cluster.address=auto, or send it there: eat-dist submit … --address http://HEAD:8265"
        )
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise blank the GPUs of its zero-GPU actors with a deprecated default, and warn about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    local = {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,  # what goes wrong in a worker comes back as its error
            **(local if address == "local" else {}),
        )
    except Exception as error:  # what Ray raises where its own processes do not start in time is no narrower
        reason = " ".join(str(error).split())
        hint = (
            "; the cluster requires a token: export RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
            if "auth" in reason.lower()
            else ""
        )
        raise ClusterError(f"cannot join the Ray cluster at '{address}': {reason}{hint}") from error
    # Ray puts its own in place, below Python's too: it prints a stack of addresses and aborts the process where ending
    # takes longer than three seconds, so that a run would not be closed (github.com/ray-project/ray/pull/64830).
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def nodes() -> list[Node]:
    """What the living nodes offer."""
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def is_launched() -> bool:
    """Whether a launcher (``ray up``, KubeRay) runs the cluster, and so may add and replace nodes by itself.

    It gives every node that it starts, the head too, the label of its group. Which nodes it could add Ray does not say.
    """
    return any(node["Alive"] and node["Labels"].get(_NODE_GROUP) for node in ray.nodes())
