"""Ctrl-C while a library of Ray's has a handler of its own in place."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# What Ray Tune and Ray Train put handlers of their own in place for.
_TAKEN = (signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def own_handlers_after() -> Iterator[None]:
    """Put the handlers of Ctrl-C (SIGINT) and SIGUSR1 back that were in place before, however the block ends.

    Ray Tune takes its own away only where somebody has pressed Ctrl-C, and what it leaves behind sets a flag that
    nobody reads any more; Ray Train never does. Both also swallow a signal that comes when all work is done and they
    have not returned yet, so signals are noted beside them. In a thread other than the main one nothing is done: there
    handlers can neither be set nor are they called.

    Raises:
        KeyboardInterrupt: A signal came while the block ran, and it ended as if none had.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _TAKEN}
    with _noting() as came:
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # one that is not Python's cannot be put back
                    signal.signal(number, handler)
    if came.intersection(_TAKEN):
        raise KeyboardInterrupt


@contextlib.contextmanager
def _noting() -> Iterator[set[int]]:
    """The numbers of the signals that come while the block runs, whoever handles them; there when it has ended."""
    came: set[int] = set()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield came
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        with contextlib.suppress(BlockingIOError):  # where a forked process holds the other end
            while numbers := os.read(reader, 4096):
                came.update(numbers)
        os.close(reader)
