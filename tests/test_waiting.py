"""How long members wait for nodes, and what a restart counts; without a cluster."""

from __future__ import annotations

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from eat_dist.cluster import waiting
from eat_dist.cluster.resources import Node, Placement
from eat_dist.cluster.waiting import PatientStart, place_or_wait
from eat_dist.config import ClusterConfig, EnsembleConfig, RunConfig
from eat_dist.errors import ClusterError

TIMED_OUT = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
FAILED = ControllerError(WorkerGroupStartupFailedError("a worker died while it was imported"))
DIED = WorkerGroupError("", {1: RuntimeError("the node\nis gone")})


def run_of(members: int, cluster: ClusterConfig) -> RunConfig:
    return RunConfig(ensemble=EnsembleConfig(members=members), cluster=cluster)


class Controller:
    """Ray Train's controller as the callback sees it, with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: ClusterConfig) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.living = [Node(1, 0)]
        monkeypatch.setattr(waiting, "nodes", lambda: self.living)
        placement = Placement(1.0, 0.0, 1, "gloo")
        self.start = PatientStart(
            self.said.append, placement=placement, config=run_of(2, config), clock=lambda: self.now
        )
        self.state: object = None

    def enter(self, *states: object) -> None:
        for state in states:
            self.start.after_controller_state_update(self.state, state)
            self.state = state

    def attempt(self, error: Exception = TIMED_OUT, seconds: float = 10.0) -> None:
        self.enter(SchedulingState(NoopDecision()))
        self.now += seconds
        self.enter(ReschedulingState(error))


def test_a_start_without_room_is_tried_until_the_time_is_over_and_never_counts_as_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, ClusterConfig(wait_for_nodes=100, max_restarts=0))
    for _ in range(9):
        controller.attempt()
    with pytest.raises(
        ClusterError,
        match=r"^2 members need 1 CPU each; the cluster has 0 GPUs and 1 CPUs on 1 node\(s\), room for 1; "
        r"that did not change in 100 s \(cluster.wait_for_nodes is 100\)",
    ):
        controller.attempt()

    assert len(controller.said) == 2, "one line at first, one a minute later"
    assert "waiting, 10 of 100 s" in controller.said[0]
    assert "waiting, 70 of 100 s" in controller.said[1]


def test_the_time_begins_anew_with_every_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, ClusterConfig(wait_for_nodes=100))
    for _ in range(3):
        for _ in range(8):
            controller.attempt()
        controller.living = [Node(2, 0)]
        controller.enter(SchedulingState(NoopDecision()), RunningState())
        controller.now += 1000.0
        controller.living = [Node(1, 0)]
        controller.enter(RestartingState(DIED))

    assert "there is room for all members after 80 s: they start" in controller.said
    last = "member 1 failed: the node is gone; restart 3 of all members, from the newest checkpoint"
    assert controller.said[-1] == last


def test_room_that_others_hold_is_said_to_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, ClusterConfig())
    controller.living = [Node(2, 0)]
    controller.attempt()

    assert "room for 2, but other work holds some of it; waiting, 10 of 1800 s" in controller.said[0]


def test_members_that_die_whenever_they_are_started_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, ClusterConfig(max_restarts=2))
    controller.attempt(FAILED)
    controller.attempt(FAILED)
    with pytest.raises(ClusterError, match=r"could not be started 3 times in a row; .*a worker died while"):
        controller.attempt(FAILED)


def test_what_the_living_nodes_hold_is_placed_there() -> None:
    placement = place_or_wait([Node(4, 0)], run_of(2, ClusterConfig()), launched=True)

    assert placement.cpus == 2.0


@pytest.mark.parametrize(
    ("living", "config", "launched", "resources"),
    [
        ([Node(0, 0)], ClusterConfig(device="cuda"), True, {"GPU": 1.0}),
        ([Node(0, 0)], ClusterConfig(device="cuda", wait_for_nodes=60), False, {"GPU": 1.0}),
        ([Node(0, 0), Node(8, 1)], ClusterConfig(gpus_per_member=0.5), True, {"GPU": 0.5}),
        ([Node(0, 0)], ClusterConfig(device="cpu"), True, {"CPU": 1.0}),
        ([Node(2, 0)], ClusterConfig(device="cpu", cpus_per_member=4), True, {"CPU": 4.0}),
    ],
)
def test_what_they_do_not_hold_is_waited_for_where_nodes_may_come(
    living: list[Node], config: ClusterConfig, launched: bool, resources: dict[str, float]
) -> None:
    placement = place_or_wait(living, run_of(3, config), launched=launched)

    assert placement.resources == resources


@pytest.mark.parametrize(
    ("config", "launched", "message"),
    [
        (ClusterConfig(device="cuda"), False, "3 members need 1 GPU each"),
        (ClusterConfig(device="cuda", wait_for_nodes=0), True, "3 members need 1 GPU each"),
        (ClusterConfig(), True, "set cluster.device to cuda or cpu"),
    ],
)
def test_it_is_refused_where_none_come_or_what_they_are_cannot_be_told(
    config: ClusterConfig, launched: bool, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        place_or_wait([Node(0, 0)], run_of(3, config), launched=launched)
