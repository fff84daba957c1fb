"""Waiting for nodes: at the start of a run on a cluster that is scaling up, and after a node was lost."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# The hooks of Ray Train's controller; its public UserCallback is not told of starts that time out.
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
    TrainControllerState,
)

from eat_dist.cluster.resources import Node, Placement, place_members, shortage, workers_of
from eat_dist.cluster.session import nodes
from eat_dist.config import ClusterConfig, RunConfig
from eat_dist.errors import ClusterError

# How long members wait where cluster.wait_for_nodes is not set: spot instances come back within minutes, or not soon.
_WAIT_S = 1800.0
# Ray Train asks for all members' room again and again; an attempt blocks its controller, and so Ctrl-C.
_ATTEMPT_S = 10.0
_SAY_EVERY_S = 60.0


def place_or_wait(living: Sequence[Node], config: RunConfig, *, launched: bool) -> Placement:
    """What each worker of a training run gets: of the living nodes, or of those that are to come.

    Args:
        living: Nodes.
        config: The run.
        launched: Whether a launcher may add nodes by itself.

    Raises:
        ClusterError: The living nodes cannot hold all members, and no others are to be waited for: nobody launches
            them, and ``wait_for_nodes`` is not set (or 0). Or what is to come cannot be told.
    """
    cluster = config.cluster
    try:
        return place_members(living, config)
    except ClusterError:
        if not (launched if cluster.wait_for_nodes is None else cluster.wait_for_nodes):
            raise
    count, what, _ = workers_of(config)
    has_gpus = any(node.gpus for node in living)
    if cluster.device == "auto" and not has_gpus:
        raise ClusterError(
            f"the {len(living)} living node(s) cannot hold {count} {what}, and which nodes are to come is not "
            "known; set cluster.device to cuda or cpu, then the members wait for them"
        )
    gpus = 0.0 if cluster.device == "cpu" or not (has_gpus or cluster.device == "cuda") else cluster.gpus_per_member
    return place_members([Node(cluster.cpus_per_member or 1.0, math.ceil(gpus))] * count, config)


class PatientStart(ControllerCallback):  # type: ignore[misc]  # Ray is not typed
    """In Ray Train's controller: how long the members may wait for room, and what the user is told meanwhile.

    A start for which there is no room is tried again without counting as one of ``cluster.max_restarts``.

    Args:
        notice: Takes a line for the user.
        placement: What each worker asks for.
        config: How many there are, how long they wait and how often they are started.
        clock: Seconds.
    """

    def __init__(
        self,
        notice: Callable[[str], Any],
        *,
        placement: Placement,
        config: RunConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notice = notice
        self.config = config
        self.placement = placement
        self.seconds = _WAIT_S if config.cluster.wait_for_nodes is None else config.cluster.wait_for_nodes
        self.max_restarts = config.cluster.max_restarts
        self._clock = clock
        self._since: float | None = None
        self._said: float | None = None
        self._failed_starts = 0
        self._restarts = 0

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """See the base class.

        Raises:
            ClusterError: Room did not come in time, or members died whenever they were started. Ends the run.
        """
        if isinstance(current_state, RestartingState):
            self._restarts += 1
            why = one_line(current_state.training_failed_error, self.config)
            self.notice(f"{why}; restart {self._restarts} of all members, from the newest checkpoint")
        elif isinstance(current_state, SchedulingState) and self._since is None:
            self._since = self._clock()
        elif isinstance(current_state, ReschedulingState):
            failure = getattr(current_state.training_failed_error, "controller_failure", None)
            if isinstance(failure, WorkerGroupStartupTimeoutError):
                self._no_room()
            else:
                self._failed_start(current_state.training_failed_error)
        elif isinstance(current_state, RunningState):
            if self._said is not None and self._since is not None:
                self.notice(f"there is room for all members after {self._clock() - self._since:.0f} s: they start")
            self._since = self._said = None
            self._failed_starts = 0

    def _no_room(self) -> None:
        now = self._clock()
        assert self._since is not None, "a start that timed out has begun"
        waited = now - self._since
        missing = shortage(nodes(), self.config, placement=self.placement)
        if waited >= self.seconds:
            raise ClusterError(
                f"{missing}; that did not change in {waited:.0f} s (cluster.wait_for_nodes is {self.seconds:g}). Add "
                f"nodes, or lower what a member asks for; continue with --resume if there is a checkpoint"
            )
        if self._said is None or now - self._said >= _SAY_EVERY_S:
            self._said = now
            self.notice(f"{missing}; waiting, {waited:.0f} of {self.seconds:g} s (cluster.wait_for_nodes)")

    def _failed_start(self, error: BaseException) -> None:
        self._failed_starts += 1
        reason = one_line(error, self.config)
        if self._failed_starts > self.max_restarts:
            raise ClusterError(f"the members could not be started {self._failed_starts} times in a row; {reason}")
        self.notice(f"the members could not be started; {reason}; trying again")


@contextlib.contextmanager
def train_settings(config: ClusterConfig) -> Iterator[None]:
    """What Ray Train's controller takes from the environment of the process that starts it; what is set there stays."""
    settings = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_ATTEMPT_S),
        # Without it a member that hangs before the first gather would hold the others for ever.
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(config.gather_timeout),
    }
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def one_line(error: BaseException, config: RunConfig) -> str:
    """Ray Train's account of what failed, in one line: the lowest worker's failure, else the last words."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return " ".join(str(error).split())[-300:]
    rank, failure = sorted(failures.items())[0]
    who = "member" if config.cluster.replicas_per_member == 1 else "worker"  # whose replica it is, only the grid knows
    return f"{who} {rank} failed: {' '.join(str(cause(failure)).split())[:300]}"


def cause(error: BaseException) -> BaseException:
    """What a remote task raised, out of Ray's wrapping."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error
