"""What stops a run, Ctrl-C or SIGTERM, stops all of it, closes it, and is one line with an exit code of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

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
                        time.sleep(0.1)  # the main thread waits by now: a signal to this one wakes nobody
                        signal.pthread_kill(threading.get_ident(), number)
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


def stopped(
    folder: Path, number: signal.Signals, *words: str, background: bool = False, address: str = ""
) -> tuple[int, str]:
    """Exit code and standard error of a training run that gets a signal after its first checkpoint."""
    slow = small_config("tracking.enabled=false", "train.epochs=400", "evaluation.protocol=none", *words)
    (folder / "slow.yaml").write_text(json.dumps(slow.model_dump(mode="json")))
    on_ctrl_c = signal.SIG_IGN if background else signal.default_int_handler
    before = signal.signal(signal.SIGINT, on_ctrl_c)  # a process inherits it where it is ignored
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "eat_dist", "train", "--config", "slow.yaml", "--run-dir", "out"],
            cwd=folder,
            env=os.environ | ({"RAY_ADDRESS": address} if address else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 90
    while not list(folder.glob("out/checkpoints/*/checkpoint.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert list(folder.glob("out/checkpoints/*/checkpoint.json"))
    assert (folder / "out" / "config.yaml").exists()
    assert not (folder / "out" / "lease.json").exists()
    return process.returncode, error


@pytest.mark.parametrize(("number", "background", "code"), [(signal.SIGINT, False, 130), (signal.SIGTERM, True, 143)])
def test_a_signal_is_one_line_that_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, background: bool, code: int
) -> None:
    ended = stopped(tmp_path, number, background=background)
    assert ended == (code, "interrupted; continue with: eat-dist train --resume RUN_DIR\n")


@pytest.mark.ray
def test_sigterm_on_ray_is_one_line_too(tmp_path: Path, ray_session: None) -> None:
    """Ray's own handler prints addresses, and aborts what takes longer than three seconds to end."""
    import ray

    address = ray.get_runtime_context().gcs_address
    ended = stopped(tmp_path, signal.SIGTERM, "cluster.backend=ray", "ensemble.members=1", address=address)
    assert ended == (143, "interrupted; continue with: eat-dist train --resume RUN_DIR\n")
