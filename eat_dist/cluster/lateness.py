"""Who keeps the others waiting: said long before the timeout that makes an error of it.

All members make the same calls of the exchange in the same order, so the number of calls that a member has begun is its
position, and whoever stands behind the others is the one they wait for. (Arrivals at the coordinator do not tell: who
receives a late member's batch is as late itself.) Members say where they stand only while they do not move, from a
thread of their own: an iteration costs nothing more, and a process that is stopped says nothing, which tells as much.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Seconds between two reports of a member that does not move.
_REPORT_EVERY_S = 2.0
# A report older than this is none.
_SILENT_AFTER_S = 3 * _REPORT_EVERY_S
# The others have waited long when nothing was gathered for so many usual iterations, and at least so many seconds.
_LONG_FACTOR = 5.0
_LONG_S = 10.0
# Before an iteration's usual time is known: members start unequally fast, and the first iterations compile.
_LONG_AT_START_S = 60.0
# Seconds between two lines on the same wait.
_AGAIN_AFTER_S = 60.0


class Reporter:
    """A member's side: its position, and the thread that reports it.

    Args:
        tell: Called with the position and whether the member waits for others.
    """

    def __init__(self, tell: Callable[[int, bool], object]) -> None:
        self.position = 0
        self._waiting = False
        self._tell = tell
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="reporter", daemon=True).start()

    def step(self) -> None:
        """A call of the exchange begins."""
        self.position += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The member waits for others inside."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        last = -1
        while not self._closed.wait(_REPORT_EVERY_S):
            if self.position == last:
                self._tell(last, self._waiting)
            last = self.position


@dataclass
class _Standing:
    position: int
    waits: bool
    time: float


class Lateness:
    """The coordinator's side.

    Args:
        members: M.
        replicas: Callers of each member, R; numbered by member · R + replica.
        clock: Seconds.
    """

    def __init__(self, members: int, replicas: int = 1, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.callers = members * replicas
        self._replicas = replicas
        self._clock = clock
        self._intervals: deque[float] = deque(maxlen=50)
        self.restart()

    def restart(self) -> None:
        """The members begin again; nothing said before counts."""
        self._standings: dict[int, _Standing] = {}
        self._places: dict[int, str] = {}
        self._since = self._clock()
        self._said: float | None = None
        self._merged: float | None = None

    def joined(self, caller: int, place: str) -> None:
        """A caller has started; ``place`` names its node and process."""
        self._places[caller] = place

    def stands(self, caller: int, position: int, *, waits: bool) -> None:
        """A caller's report."""
        self._standings[caller] = _Standing(position, waits, self._clock())

    def gathered(self, *, iteration: bool) -> None:
        """Everybody has handed something in; ``iteration``: an iteration's statistics."""
        now = self._clock()
        if iteration:
            if self._merged is not None:
                self._intervals.append(now - self._merged)
            self._merged = now
        self._since, self._said = now, None

    def late(self) -> list[int]:
        """The callers who keep the others waiting; empty while nobody waits unusually long."""
        now = self._clock()
        usual = statistics.median(self._intervals) if self._intervals else None
        long = _LONG_AT_START_S if usual is None else max(_LONG_S, _LONG_FACTOR * usual)
        if now - self._since < long or not self._places:
            return []
        fresh = {caller: s for caller, s in self._standings.items() if now - s.time < _SILENT_AFTER_S}
        if not any(standing.waits for standing in fresh.values()):
            return []
        silent = [caller for caller in range(self.callers) if caller not in fresh]
        if silent:
            return silent
        last = min(standing.position for standing in fresh.values())
        behind = [caller for caller in sorted(fresh) if fresh[caller].position == last]
        # Those of them that wait themselves are innocent, unless all do: then batches are lost between members.
        return [caller for caller in behind if not fresh[caller].waits] or behind

    def message(self, iteration: int) -> str | None:
        """A line about it, once a minute; None when there is nothing (new) to say."""
        now = self._clock()
        late = self.late() if self._said is None or now - self._said >= _AGAIN_AFTER_S else []
        if not late:
            return None
        self._said = now
        waited = f"for {now - self._since:.0f} s (iteration {iteration})"
        if len(late) == self.callers:
            return f"all members wait for each other's batches {waited}: is the network between them up?"
        who = ", ".join(self._name(caller) for caller in late)
        return f"{who} {'keeps' if len(late) == 1 else 'keep'} the others waiting {waited}"

    def _name(self, caller: int) -> str:
        member, replica = divmod(caller, self._replicas)
        who = f"member {member}" + (f" (replica {replica})" if self._replicas > 1 else "")
        place = self._places.get(caller)
        return f"{who} on {place}" if place else f"{who}, which has not started,"
