"""Waiting for nodes that an autoscaler has yet to start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray
from ray.autoscaler.sdk import request_resources

from eat_dist.cluster.resources import Node
from eat_dist.cluster.session import nodes
from eat_dist.config import ClusterConfig
from eat_dist.errors import ClusterError

Placed = TypeVar("Placed")

_LOOK_EVERY_S = 2.0


def when_there_is_room(
    place_on: Callable[[Sequence[Node]], Placed],
    *,
    workers: int,
    config: ClusterConfig,
    say: Callable[[str], None] | None = None,
) -> Placed:
    """Place on the nodes there are; else ask the autoscaler for more, up to ``cluster.wait_for_nodes`` seconds.

    What is asked for is the cluster's size, not room beside other jobs. The request ends with the wait: nodes that then
    idle may go.

    Args:
        place_on: Works out a placement; raises ClusterError where the nodes do not hold it.
        workers: How many there will be.
        config: What each gets.
        say: Is told, once, that there is something to wait for.

    Raises:
        ClusterError: No room after that time; what ``place_on`` said, and how long was waited.
    """
    begin = time.monotonic()
    try:
        return place_on(nodes())
    except ClusterError as error:
        if not config.wait_for_nodes:
            raise
        if say is not None:
            say(f"waiting up to {config.wait_for_nodes:g} s for nodes; now: {error}")
    with _requests_that_end():
        while True:
            there = nodes()
            request_resources(bundles=[_bundle(there, config)] * workers)
            time.sleep(_LOOK_EVERY_S)
            try:
                return place_on(nodes())
            except ClusterError as error:
                if time.monotonic() - begin >= config.wait_for_nodes:
                    raise ClusterError(
                        f"{error} Waited {config.wait_for_nodes:g} s for an autoscaler to add nodes "
                        f"(cluster.wait_for_nodes); it may have reached its limit, or the cloud has none to give: see "
                        f"'ray status'"
                    ) from error


def _bundle(there: Sequence[Node], config: ClusterConfig) -> dict[str, float]:
    """What a node must hold for one worker. With ``auto`` a GPU as soon as the first one is seen."""
    if config.device == "cuda" or (config.device == "auto" and any(node.gpus for node in there)):
        wanted = {"GPU": config.gpus_per_member, "CPU": config.cpus_per_member or 0.0}
    else:
        wanted = {"CPU": config.cpus_per_member or 1.0}
    return {name: amount for name, amount in wanted.items() if amount}


@contextlib.contextmanager
def _requests_that_end() -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):
            request_resources(bundles=[])
