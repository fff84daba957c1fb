"""Who keeps the others waiting, worked out from where the members say they stand; without a cluster."""

from __future__ import annotations

import pytest

from eat_dist.cluster.lateness import Lateness


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def three_members(clock: Clock, *, iteration_s: float = 1.0) -> Lateness:
    """Ten iterations done; now nothing has happened for 30 seconds."""
    lateness = Lateness(3, clock=clock)
    for rank in range(3):
        lateness.joined(rank, f"node 10.0.0.{rank}")
    for _ in range(10):
        clock.now += iteration_s
        lateness.gathered(iteration=True)
    clock.now += 30.0
    return lateness


def test_the_member_behind_is_late_and_not_the_one_that_waits_for_its_batch() -> None:
    clock = Clock()
    lateness = three_members(clock)
    lateness.stands(0, 23, waits=True)  # has everything but the merged statistics
    lateness.stands(1, 22, waits=True)  # waits for member 2's batch
    lateness.stands(2, 21, waits=False)

    assert lateness.message(10) == "member 2 on node 10.0.0.2 keeps the others waiting for 30 s (iteration 10)"


def test_a_member_that_says_nothing_is_late() -> None:
    clock = Clock()
    lateness = three_members(clock)
    lateness.stands(1, 21, waits=False)
    clock.now += 10.0  # that was long ago
    lateness.stands(0, 23, waits=True)
    lateness.stands(2, 22, waits=True)

    assert lateness.late() == [1]


def test_members_that_wait_for_nothing_but_each_other_have_lost_their_network() -> None:
    clock = Clock()
    lateness = three_members(clock)
    for rank in range(3):
        lateness.stands(rank, 22, waits=True)

    assert "all members wait for each other's batches for 30 s" in str(lateness.message(10))


@pytest.mark.parametrize("waits", [False, True])
def test_slow_iterations_are_nobodys_fault(waits: bool) -> None:
    """Nobody waits; or somebody does, but not longer than iterations have always taken."""
    clock = Clock()
    lateness = three_members(clock, iteration_s=20.0 if waits else 1.0)
    for rank in range(3):
        lateness.stands(rank, 21, waits=waits and rank == 0)

    assert lateness.message(10) is None


def test_the_line_comes_again_after_a_minute_and_anew_after_the_next_iteration() -> None:
    clock = Clock()
    lateness = three_members(clock)

    def line() -> str | None:
        lateness.stands(0, 22, waits=True)
        lateness.stands(1, 22, waits=True)
        lateness.stands(2, 21, waits=False)
        return lateness.message(10)

    assert line() is not None
    clock.now += 30
    assert line() is None
    clock.now += 31
    assert "91 s" in str(line())
    lateness.gathered(iteration=True)
    assert line() is None
    clock.now += 200
    assert "200 s" in str(line())


def test_nobody_is_late_while_members_start_within_a_minute() -> None:
    clock = Clock()
    lateness = Lateness(2, clock=clock)
    lateness.joined(0, "node a")
    clock.now += 50
    lateness.stands(0, 1, waits=True)
    assert lateness.message(0) is None
    clock.now += 20
    lateness.stands(0, 1, waits=True)
    assert lateness.message(0) == ("member 1, which has not started, keeps the others waiting for 70 s (iteration 0)")
