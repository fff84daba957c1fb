"""How members reach each other: the protocol, and the form in which all of them share one process.

Who is behind the protocol changes no number (tests/test_parity.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from eat_dist.errors import EatError, MemberLateError
from eat_dist.robustness.statistics import EnsembleStatistics, MemberStatistics, Policy, merge
from eat_dist.robustness.transfer import TransferPlan

Tensors = Mapping[str, torch.Tensor]
Models = list[tuple[nn.Module, nn.Module]]


class Pending(Protocol):
    """Something under way; :meth:`wait` blocks until it is there."""

    def wait(self) -> Any: ...  # noqa: D102


class Exchange(Protocol):
    """What a member knows of the others.

    Every member makes the same calls in the same order; messages of one call have the same keys, shapes and dtypes in
    every member (batch sizes are equal by construction).
    """

    rank: int
    size: int

    def send(self, plan: TransferPlan, tensors: Tensors) -> Pending:
        """Send tensors to the plan's targets; ``wait()`` → list of (sender, tensors) in the plan's order."""
        ...

    def submit(self, statistics: MemberStatistics, previous: EnsembleStatistics) -> Pending:
        """Hand statistics to the coordinator; ``wait()`` → the merged :class:`EnsembleStatistics`."""
        ...

    def agree(self, topic: str, value: Any) -> list[Any]:
        """Gather a small JSON-like value from every member, by rank; a barrier."""
        ...

    def every_model(self, model: nn.Module, loss: nn.Module) -> AbstractContextManager[Models]:
        """All members' (model, loss), for the rule ``joint``; only where they share a process.

        One member at a time is inside, and none comes out before all have been, so nobody changes a model that
        another still attacks.
        """
        ...


class PeerFailedError(Exception):
    """Another member failed first; its own error is the one to show."""


class Board:
    """Where members that share a process leave things for each other."""

    def __init__(self, size: int, *, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self._changed = threading.Condition()
        self._slots: dict[tuple[str, int], dict[int, Any]] = {}
        self._reads: dict[tuple[str, int], int] = {}
        self._failure: BaseException | None = None
        self.one_at_a_time = threading.Lock()

    def put(self, key: tuple[str, int], rank: int, value: Any) -> None:
        """Leave a value."""
        with self._changed:
            self._slots.setdefault(key, {})[rank] = value
            self._changed.notify_all()

    def collect(self, key: tuple[str, int]) -> list[Any]:
        """Everybody's values by rank; waits for those that are missing.

        Raises:
            MemberLateError: Some did not come in time; they are named.
            PeerFailedError: A member failed meanwhile.
        """

        def ready() -> bool:
            return self._failure is not None or len(self._slots.get(key, {})) == self.size

        with self._changed:
            in_time = self._changed.wait_for(ready, self.timeout)
            if self._failure is not None:
                raise PeerFailedError(str(self._failure))
            slot = self._slots.get(key, {})
            if not in_time:
                raise MemberLateError(late_message(key, set(range(self.size)) - set(slot), self.timeout))
            values = [slot[rank] for rank in range(self.size)]
            self._reads[key] = self._reads.get(key, 0) + 1
            if self._reads[key] == self.size:  # the last reader clears the slot
                del self._slots[key], self._reads[key]
            return values

    def fail(self, error: BaseException) -> None:
        """Wake everybody up with a failure."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


def late_message(key: tuple[str, int], late: set[int], timeout: float, *, replicas: int = 1) -> str:
    """Say who is late with what; ``late`` counts replicas, all of member 0 first."""
    places = [divmod(place, replicas) for place in sorted(late)]
    who = ", ".join(f"member {rank}" + (f" (replica {replica})" if replicas > 1 else "") for rank, replica in places)
    return (
        f"{who} did not hand in '{key[0]}' number {key[1]} within {timeout:g} s; look at that member's log, or raise "
        f"cluster.gather_timeout if its iterations are that slow"
    )


class _Waiting:
    def __init__(self, get: Callable[[], Any]) -> None:
        self._get = get

    def wait(self) -> Any:
        return self._get()


class LocalExchange:
    """One member's end of a :class:`Board`. Tensors are passed by reference; nobody changes what it received."""

    def __init__(self, board: Board, rank: int, *, policy: Policy) -> None:
        self.board = board
        self.rank = rank
        self.size = board.size
        self.policy = policy
        self._counts: dict[str, int] = {}

    def send(self, plan: TransferPlan, tensors: Tensors) -> Pending:
        """See :class:`Exchange`."""
        key = self._put("adversarial batch", {name: tensor.detach() for name, tensor in tensors.items()})

        def receive() -> list[tuple[int, Tensors]]:
            everybody = self.board.collect(key)
            return [(sender, everybody[sender]) for sender in plan.sources[self.rank]]

        return _Waiting(receive)

    def submit(self, statistics: MemberStatistics, previous: EnsembleStatistics) -> Pending:
        """See :class:`Exchange`. Merging is a pure function, so every member does it for itself."""
        key = self._put("statistics", statistics)
        return _Waiting(lambda: merge(previous, self.board.collect(key), policy=self.policy))

    def agree(self, topic: str, value: Any) -> list[Any]:
        """See :class:`Exchange`."""
        return self.board.collect(self._put(topic, value))

    @contextmanager
    def every_model(self, model: nn.Module, loss: nn.Module) -> Iterator[Models]:
        """See :class:`Exchange`."""
        pairs = self.board.collect(self._put("model", (model, loss)))
        with self.board.one_at_a_time:
            yield pairs
        self.agree("joint attack", self.rank)

    def _put(self, topic: str, value: Any) -> tuple[str, int]:
        key = (topic, self._counts.get(topic, 0))
        self._counts[topic] = key[1] + 1
        self.board.put(key, self.rank, value)
        return key


def run_together(works: Sequence[Callable[[], Any]], board: Board) -> list[Any]:
    """Run one function a member, each in a thread; results by rank.

    Raises:
        The error of the first member whose error is not merely the echo of another's; what a signal raises stops all.
    """

    def run(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except BaseException as error:
            board.fail(error)
            raise

    # No Thread.join to wait with: one that a signal interrupts takes its thread for ended, which it is not, and the
    # next returns at once (Python up to 3.12, github.com/python/cpython/issues/90882). The executor joins after wait.
    with ThreadPoolExecutor(len(works), thread_name_prefix="member") as threads:
        try:
            ends = [threads.submit(run, work) for work in works]
            # With a timeout, for a signal that another thread takes, or that comes just before this one blocks, wakes
            # nobody: Python would call its handler when the run is over.
            while wait(ends, timeout=0.5).not_done:
                pass
        except BaseException as stop:  # Ctrl-C, SIGTERM as SystemExit: no member may go on when the lease is gone
            board.fail(stop)
            raise
    errors = [error for end in ends if (error := end.exception()) is not None]
    own = [error for error in errors if not isinstance(error, PeerFailedError)]
    if own:
        raise own[0]
    if errors:
        raise EatError(str(errors[0]))
    return [end.result() for end in ends]
