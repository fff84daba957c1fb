"""Ctrl-C works during and after what Ray does with handlers of its own, and is never swallowed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from eat_dist import cli
from eat_dist.cluster.signals import own_handlers_after

BOTH = (signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[Any]]:
    """The command line's, in place before and after."""
    before = [signal.getsignal(number) for number in BOTH]
    ours = [signal.default_int_handler, signal.SIG_IGN]
    for number, handler in zip(BOTH, ours, strict=True):
        signal.signal(number, handler)
    yield ours
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


def in_place() -> list[Any]:
    return [signal.getsignal(number) for number in BOTH]


def take() -> None:
    """As a library does, which swallows both."""
    for number in BOTH:
        signal.signal(number, lambda *_: None)


def fail() -> None:
    take()
    raise ZeroDivisionError


def test_handlers_are_put_back_however_the_block_ends(handlers: list[Any]) -> None:
    with own_handlers_after():
        take()
    assert in_place() == handlers
    with pytest.raises(ZeroDivisionError), own_handlers_after():
        fail()
    assert in_place() == handlers
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_that_was_swallowed_is_raised_when_the_block_has_ended(
    handlers: list[Any], number: signal.Signals
) -> None:
    went_on = []

    def go_on() -> None:
        take()
        os.kill(os.getpid(), number)
        went_on.append(True)

    with pytest.raises(KeyboardInterrupt), own_handlers_after():
        go_on()
    assert went_on
    assert in_place() == handlers


def test_other_signals_are_not_taken_for_ctrl_c() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: noted.append(number))
    try:
        with own_handlers_after():
            os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert noted == [signal.SIGUSR2]


def test_whoever_noted_signals_before_does_so_after(handlers: list[Any]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with own_handlers_after():
            pass
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def test_beside_the_main_thread_nothing_is_done(handlers: list[Any]) -> None:
    done: list[bool] = []

    def work() -> None:
        with own_handlers_after():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
    assert in_place() == handlers


def test_sigterm_is_not_swallowed_either(handlers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line hands it on to whoever handles Ctrl-C."""

    def command() -> None:
        try:
            with own_handlers_after():
                take()
                os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:  # as typer does
            sys.exit(cli.EXIT_INTERRUPTED)

    monkeypatch.setattr(cli, "app", command)
    monkeypatch.setattr(sys, "argv", ["eat-dist", "train"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == cli.EXIT_TERMINATED
    assert in_place() == handlers


class OneTrial:
    """A book of one trial."""

    def __init__(self, at_the_end: Callable[[], None] = lambda: None) -> None:
        self.left = 1
        self.ended: list[str] = []
        self.at_the_end = at_the_end

    def begin(self) -> Mapping[str, Any] | None:
        self.left -= 1
        return {"id": "0000"} if self.left >= 0 else None

    def learn(self, trial: str, result: Mapping[str, Any]) -> None: ...

    def end(self, trial: str, *, error: str | None) -> None:
        self.ended.append(trial)
        self.at_the_end()

    def suspend(self, trial: str, *, reason: str) -> None: ...


def work_a_little(task: Mapping[str, Any], report: Any) -> None:
    report({"epoch": 1})


@pytest.mark.ray
def test_the_first_ctrl_c_after_trials_is_heard(ray_session: None, handlers: list[Any]) -> None:
    """And one between the end of the last trial and the end of Tune, too: a study's next batch would begin."""
    import ray.cloudpickle

    from eat_dist.cluster.tune import run_trials

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run_trials(work_a_little, OneTrial(), trials=1, concurrent=1, halving=None, max_failures=0)
    assert in_place() == handlers

    late = OneTrial(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_trials(work_a_little, late, trials=1, concurrent=1, halving=None, max_failures=0)
    assert late.ended == ["0000"]
    assert in_place() == handlers
