"""One driver at a time works on a run folder: a file in it, the lease, says who.

The driver renews its lease from a thread. A lease of a process on this machine is dead when that process is gone; any
other is dead when it was not renewed for ``EXPIRES_AFTER_S``. Whoever comes next takes a dead lease over. Ages are
differences of two times given by the store that holds the folder, so clocks of several machines need not agree.

On a local disk or NFS the file is created exclusively: of two who start at the same instant one gets it. Object stores
offer no such step through pyarrow, and a dead lease is replaced, not created: there each writes, waits ``SETTLE_S`` and
reads back who was last. Two could both go on only where one is slower than that between looking and writing; the one
whose lease was overwritten finds out at its next renewal, and stops.
"""

from __future__ import annotations

import _thread
import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eat_dist.errors import StorageError
from eat_dist.storage import Folder

LEASE = "lease.json"
RENEW_EVERY_S = 15.0
EXPIRES_AFTER_S = 90.0
SETTLE_S = 2.0
SCHEMA = 1
# Where `eat-dist submit` says which submission a process belongs to.
JOB_VARIABLE = "EAT_DIST_JOB"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as the file says.

    Attributes:
        token: Random; tells two leases apart.
        host: Its machine's name, for people.
        process: Its number there.
        started: When that process began, in the kernel's ticks, so that a reused number is not taken for it.
        space: Identifies the running kernel and its space of process numbers (a container has its own); empty where
            it is not known, and then only the lease's age counts.
        job: The submission it runs in, if any.
        since: When the lease was taken, by the holder's clock.
    """

    token: str
    host: str
    process: int
    started: str
    space: str
    job: str | None
    since: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            process=os.getpid(),
            started=_start_of(os.getpid()) or "",
            space=_process_space(),
            job=os.environ.get(JOB_VARIABLE),
            since=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        )

    @property
    def runs(self) -> bool | None:
        """Whether that process of this machine runs; None where it is one of another machine or container."""
        if self.space == "" or self.space != _process_space():
            return None
        return _start_of(self.process) == self.started

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.process} on {self.host}{job} since {self.since}"


def check_not_held(folder: Folder) -> None:
    """Refuse a folder on which somebody works, without writing into it.

    Raises:
        StorageError: Who holds it, and since when.
    """
    found = _read(folder)
    if found is None:
        return
    runs = found.holder.runs if found.holder is not None else None
    if runs is None:
        age = _age(folder)
        runs = age is not None and age < EXPIRES_AFTER_S
    if runs:
        raise _refusal(folder, found.holder)


def wait_for_the_dead(folder: Folder) -> None:
    """Wait until the lease of a process that died elsewhere has expired; of a living one it is refused later.

    Where a run goes on by itself after a death, on another machine, nobody is there to try again.
    """
    deadline = time.monotonic() + EXPIRES_AFTER_S + RENEW_EVERY_S
    while time.monotonic() < deadline:
        found = _read(folder)
        if found is None or (found.holder is not None and found.holder.runs is not None):
            return
        if (age := _age(folder)) is None or age >= EXPIRES_AFTER_S:
            return
        time.sleep(RENEW_EVERY_S / 5)


@contextlib.contextmanager
def holding(folder: Folder) -> Iterator[None]:
    """Hold the folder's lease; it is made where it is not there, and nothing is left of a lease at the end.

    Raises:
        StorageError: Somebody else holds it, or took it over after this process had not renewed it in time.
    """
    me, made = Holder.here(), _missing(folder)
    _take(folder, me)
    renewal = _Renewal(folder, me)
    renewal.start()
    try:
        yield
    except KeyboardInterrupt:
        if renewal.lost:
            raise renewal.error() from None
        raise
    finally:
        renewal.stop()
        _release(folder, me, made)
    if renewal.lost:
        raise renewal.error()


def _take(folder: Folder, me: Holder) -> None:
    content = (json.dumps({"schema": SCHEMA, **asdict(me)}, indent=2) + "\n").encode()
    while not folder.write_new(LEASE, content):
        if _read(folder) is not None:  # else it was released in between
            check_not_held(folder)
            folder.write(LEASE, content)
            break
    else:
        if folder.is_local:
            return
    time.sleep(SETTLE_S)
    last = _read(folder)
    if last is None or last.holder != me:
        raise _refusal(folder, last.holder if last is not None else None)


def _release(folder: Folder, me: Holder, made: list[Path]) -> None:
    with contextlib.suppress(StorageError):  # it expires by itself
        found = _read(folder)
        if found is not None and found.holder == me:
            folder.delete(LEASE)
    with contextlib.suppress(OSError):  # not empty: there is a run in it
        for path in made:
            path.rmdir()


def _missing(folder: Folder) -> list[Path]:
    """Which folders of a path on disk are not there, innermost first."""
    path = Path(folder.path)
    return [part for part in (path, *path.parents) if not part.exists()] if folder.is_local else []


class _Renewal(threading.Thread):
    """Writes the lease again and again, and interrupts the main thread once it is another's."""

    def __init__(self, folder: Folder, me: Holder) -> None:
        super().__init__(name="lease", daemon=True)
        self.folder = folder
        self.me = me
        self.lost = False
        self._done = threading.Event()
        # Elsewhere (a trial in a thread of its own) the run goes on to its end, and fails then.
        self._interrupts = threading.current_thread() is threading.main_thread()

    def run(self) -> None:
        while not self._done.wait(RENEW_EVERY_S):
            try:
                found = _read(self.folder)
                if found is None or found.holder != self.me:
                    self.lost = True
                    _LOG.warning("%s", self.error())
                    if self._interrupts:
                        _thread.interrupt_main()
                    return
                self.folder.write(LEASE, found.content)
            except StorageError as error:  # a full disk, a store that does not answer: it may come back
                _LOG.warning("the lease of '%s' could not be renewed: %s", self.folder, error)

    def stop(self) -> None:
        self._done.set()
        self.join(timeout=RENEW_EVERY_S)

    def error(self) -> StorageError:
        return StorageError(
            f"'{self.folder}' was taken over by somebody else (or deleted) while this run was not able to renew its "
            f"lease for {EXPIRES_AFTER_S:.0f} s; this run stops, the other one goes on"
        )


@dataclass(frozen=True)
class _Found:
    content: bytes
    holder: Holder | None  # None: not readable, e.g. being written at this moment


def _read(folder: Folder) -> _Found | None:
    """The lease that is there; None where there is none."""
    if not folder.exists(LEASE):
        return None
    try:
        content = folder.read(LEASE)
    except StorageError:
        if not folder.exists(LEASE):  # released in between
            return None
        raise
    try:
        values: dict[str, Any] = json.loads(content)
        return _Found(content, Holder(**{name: value for name, value in values.items() if name != "schema"}))
    except (ValueError, TypeError, AttributeError):
        return _Found(content, None)


def _age(folder: Folder) -> float | None:
    """Seconds since the lease was renewed, by the clock of the store that holds it; None where it is gone."""
    probe = f".lease-probe-{uuid.uuid4().hex[:8]}"
    folder.write(probe, b"")
    now = folder.stamp(probe).mtime_ns
    folder.delete(probe)
    if not folder.exists(LEASE):
        return None
    renewed = folder.stamp(LEASE).mtime_ns
    return 0.0 if now is None or renewed is None else (now - renewed) / 1e9


def _refusal(folder: Folder, holder: Holder | None) -> StorageError:
    who = str(holder) if holder is not None else "somebody"
    return StorageError(
        f"'{folder}' is being worked on by {who}; wait for its end or stop it. If it has died, the folder is free "
        f"{EXPIRES_AFTER_S:.0f} s after its last sign of life"
    )


def _process_space() -> str:
    """The running kernel and this process's namespace of process numbers; empty off Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(process: int) -> str | None:
    """When a process began, in ticks since boot; None where it does not run (any more)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in ("Z", "X") else started  # a zombie is dead; its parent has only not looked yet
