"""Members that share a process end with it: whatever stops it, none goes on behind its back."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from eat_dist.exchange import Board, LocalExchange, run_together
from eat_dist.robustness.statistics import Policy
from small_runs import small_config


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_stops_all_members_before_it_is_passed_on(number: signal.Signals, raised: type[BaseException]) -> None:
    board = Board(2, timeout=20)
    policy = Policy.of(small_config("ensemble.members=2"), num_classes=2)
    # As the command line has them; a shell that starts this in the background has Ctrl-C ignored.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)

    def member(rank: int) -> Callable[[], None]:
        def go_on_for_ever() -> None:
            exchange = LocalExchange(board, rank, policy=policy)
            try:
                for iteration in range(10**9):
                    exchange.agree("iteration", iteration)
                    if (rank, iteration) == (1, 3):
                        os.kill(os.getpid(), number)
            finally:
                if rank == 0:  # the first that is waited for is in the middle of an iteration, and ends last
                    time.sleep(0.3)

        return go_on_for_ever

    try:
        with pytest.raises(raised):
            run_together([member(0), member(1)], board)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("member_")]
    board.fail(SystemExit())  # so that a test that fails ends all the same
    assert left == []
