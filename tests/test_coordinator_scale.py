"""The benchmark of the coordinator runs, and what it says of sizes holds."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from types import ModuleType

import pytest
from ray.cloudpickle import register_pickle_by_value

from conftest import REPOSITORY


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "coordinator_scale", REPOSITORY / "benchmarks" / "coordinator_scale.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["coordinator_scale"] = module  # dataclasses look it up
    specification.loader.exec_module(module)
    register_pickle_by_value(module)  # Ray's workers cannot import it
    return module


@pytest.mark.ray
def test_members_that_only_sleep_and_send_are_measured(benchmark: ModuleType, ray_session: None) -> None:
    costs = [
        benchmark.measure(members, iterations=3, sleep=0.01, classes=10, batch_size=20, processes=2)
        for members in (2, 4)
    ]

    assert all(cost.beyond_sleep > 0 for cost in costs)
    assert costs[1].bytes_in == pytest.approx(2 * costs[0].bytes_in, rel=0.1)


@pytest.mark.ray
def test_what_members_get_back_grows_with_the_members_and_not_with_their_square(
    benchmark: ModuleType, ray_session: None
) -> None:
    """Member 0 alone gets everybody's measurements; the others' answers hold a few numbers a member."""

    def bytes_a_member(members: int) -> float:
        _, answers = asyncio.run(benchmark.traffic(benchmark.policy_of(members, 100), 180))
        return float(answers / members)

    assert bytes_a_member(128) < 2 * 2900
    assert bytes_a_member(128) < 4 * bytes_a_member(16), "eight times as many members"


@pytest.mark.ray
def test_what_a_member_hands_in_is_below_ten_kilobytes_for_any_number_of_classes(
    benchmark: ModuleType, ray_session: None
) -> None:
    policy = benchmark.policy_of(128, 11318)

    assert benchmark.size_of(benchmark.measured(5, 3, policy, 180)) < 10_000
