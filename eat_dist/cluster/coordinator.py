"""The coordinator: one named actor that gathers every member's statistics and hands the merged ones back.

It lives beside the members, not in their way: statistics are below 10 kB, tensors never come here, and a member hands
in before its backward pass and asks after it. It is rebuilt from nothing: whoever begins a new generation (the
members, after Ray Train restarted them) brings the statistics of its checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eat_dist.cluster.answer import Answer
from eat_dist.cluster.lateness import Lateness
from eat_dist.errors import EatError, MemberLateError
from eat_dist.exchange import late_message
from eat_dist.robustness.statistics import EnsembleStatistics, MemberStatistics, Policy, merge

# Progress that the driver has not fetched yet; older iterations are dropped (the run folder has them all).
_KEPT_ITERATIONS = 2000

_STATISTICS = "statistics"

# Seconds between two looks at who is late.
_LOOK_EVERY_S = 1.0

_logger = logging.getLogger(__name__)


class RunAbortedError(Exception):
    """A member stopped the run for a reason that a restart would not mend; the coordinator keeps it."""


class StaleGenerationError(Exception):
    """A call of members that Ray Train has replaced since."""


@dataclass
class _Slot:
    values: dict[int, Any] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    result: Any = None
    reads: int = 0


class CoordinatorState:
    """The actor's body (an ordinary class, so that it can be read and tested as one).

    Every replica of a member calls, and waits for all others; what it hands in is the same in all of them, but for the
    times, and the first replica's is taken. Callers are numbered by member · replicas + replica.

    Args:
        policy: Members, rule and momentum.
        timeout: Seconds until a missing member is an error.
        replicas: Processes that train one member, R.
    """

    def __init__(self, policy: Policy, timeout: float, replicas: int = 1) -> None:
        self.policy = policy
        self.timeout = timeout
        self.replicas = replicas
        self.callers = policy.members * replicas
        self.generation = 0
        self.ensemble: EnsembleStatistics | None = None
        self.progress: deque[EnsembleStatistics] = deque(maxlen=_KEPT_ITERATIONS)
        self.results: dict[int, Any] = {}
        self.failure: EatError | None = None
        self.lateness = Lateness(policy.members, replicas)
        self.notices: list[str] = []
        self._slots: dict[tuple[str, int], _Slot] = {}
        self._look: asyncio.Task[None] | None = None

    async def new_generation(self) -> int:
        """The number of members that start, above that of all before them, whichever node they are on.

        By this node's clock, for an actor that was restarted knows no earlier number; a member's may be further behind
        another node's than a restart takes.
        """
        return max(self.generation + 1, time.time_ns())

    async def join(self, generation: int, caller: int, place: str) -> None:
        """A caller has started, on the node and in the process that ``place`` names."""
        self._enter(generation)
        self.lateness.joined(caller, place)
        self._look = self._look or asyncio.create_task(self._look_for_late_members())

    async def stands(self, generation: int, caller: int, position: int, waits: bool) -> None:
        """Where a caller stands that has not moved for a while (:mod:`eat_dist.cluster.lateness`)."""
        if generation == self.generation:
            self.lateness.stands(caller, position, waits=waits)

    async def notice(self, text: str) -> None:
        """Leave a line for the user; it is in the actor's log, too."""
        _logger.warning("%s", text)
        self.notices.append(text)

    async def gather(self, generation: int, topic: str, number: int, caller: int, value: Any) -> Any:
        """Every member's value by rank, once all are there.

        Raises:
            MemberLateError: Some did not come in time; they are named.
            RunAbortedError: A member stopped the run meanwhile.
            StaleGenerationError: The caller has been replaced.
        """
        return await self._gather(generation, (topic, number), caller, value, list)

    async def merge(
        self, generation: int, caller: int, statistics: MemberStatistics, previous: EnsembleStatistics | None
    ) -> Answer:
        """Merge all members' statistics of an iteration.

        Args:
            generation: Of the caller.
            caller: Its number.
            statistics: Its measurements.
            previous: In the first call of a generation what its checkpoint holds, else None.

        Returns:
            What the merged statistics change in those that the caller has.
        """
        self._enter(generation)
        if previous is not None:
            self.ensemble = previous

        def combine(values: list[MemberStatistics]) -> list[Answer]:
            assert self.ensemble is not None, "the first call of a generation brings the statistics to start from"
            before, self.ensemble = self.ensemble, merge(self.ensemble, values, policy=self.policy)
            self.progress.append(self.ensemble)
            answer = Answer.of(before, self.ensemble)
            brief = answer.to(1)
            return [answer] + [brief] * (self.callers - 1)

        answers: list[Answer] = await self._gather(
            generation, (_STATISTICS, statistics.iteration), caller, statistics, combine
        )
        return answers[caller]

    async def since(self, iteration: int) -> list[EnsembleStatistics]:
        """The merged statistics of the iterations after ``iteration``; those before it are dropped."""
        while self.progress and self.progress[0].iteration <= iteration:
            self.progress.popleft()
        return [entry for entry in self.progress if entry.iteration > iteration]

    async def take_notices(self) -> list[str]:
        """The lines left since the last call."""
        taken, self.notices = self.notices, []
        return taken

    async def finish(self, rank: int, result: Any) -> None:
        """A member is done."""
        self.results[rank] = result

    async def abort(self, error: EatError) -> None:
        """Stop the run: everybody who waits or will wait is told. The first reason is kept."""
        self.failure = self.failure or error
        for slot in self._slots.values():
            slot.complete.set()

    async def outcome(self) -> tuple[dict[int, Any], EatError | None]:
        """Results by rank, and why the run was stopped, if it was."""
        return self.results, self.failure

    async def process_id(self) -> int:
        """Of the actor's own process (the test that kills it needs it)."""
        import os  # noqa: PLC0415

        return os.getpid()

    async def _gather(self, generation: int, key: tuple[str, int], caller: int, value: Any, combine: Any) -> Any:
        self._enter(generation)
        slot = self._slots.setdefault(key, _Slot())
        slot.values[caller] = value
        if len(slot.values) == self.callers:
            slot.result = combine([slot.values[first] for first in range(0, self.callers, self.replicas)])
            self.lateness.gathered(iteration=key[0] == _STATISTICS)
            slot.complete.set()
        try:
            await asyncio.wait_for(slot.complete.wait(), self.timeout)
        except TimeoutError:
            missing = set(range(self.callers)) - set(slot.values)
            late = missing & set(self.lateness.late()) or missing  # whoever waits for a late member is not to blame
            raise MemberLateError(late_message(key, late, self.timeout, replicas=self.replicas)) from None
        self._enter(generation)
        slot.reads += 1
        if slot.reads == self.callers:
            self._slots.pop(key, None)
        return slot.result

    async def _look_for_late_members(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            message = self.lateness.message(self.ensemble.iteration if self.ensemble else 0)
            if message is not None:
                await self.notice(message)

    def _enter(self, generation: int) -> None:
        if self.failure is not None:
            raise RunAbortedError(str(self.failure))
        if generation > self.generation:
            self.generation = generation
            self.lateness.restart()
            for slot in self._slots.values():  # whoever still waits is of a generation that is gone
                slot.complete.set()
            self._slots = {}
        elif generation < self.generation:
            raise StaleGenerationError(f"generation {generation} was replaced by {self.generation}")


def start_coordinator(name: str, policy: Policy, *, timeout: float, replicas: int = 1) -> Any:
    """Start the actor, on the caller's node: if that is lost, so is the run; another may be a spot instance.

    ``max_restarts=-1`` brings it back after its process died, empty; ``max_task_retries=0`` lets the calls that were
    under way fail instead of being repeated, because a member may already have had its answer: then the members
    restart together from the checkpoint.

    Args:
        name: Unique to the run, so that two runs on one cluster never share a coordinator.
        policy: Members, rule and momentum.
        timeout: Seconds until a missing member is an error.
        replicas: Processes that train one member.
    """
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)(CoordinatorState)
    # Beside the driver, which no spot instance holds, and not within what a trial of a sweep has reserved. Not
    # softly: Ray takes that for a wish, and starts it elsewhere where a worker is ready sooner.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(name=name, scheduling_strategy=here).remote(policy, timeout, replicas)
