"""Two drivers on one run folder: the second is refused while the first lives, and gets the folder when it has died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eat_dist.errors import StorageError
from eat_dist.runs import lease
from eat_dist.runs.lease import LEASE, Holder, check_not_held, holding
from eat_dist.storage import Folder

HOLD = """
import sys, time
from eat_dist.runs.lease import holding
from eat_dist.storage import Folder
with holding(Folder.at(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def other_driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease of ``tmp_path/run``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def put_lease(folder: Folder, *, age: float = 0.0, **changes: Any) -> None:
    """A lease of somebody on another machine, last renewed ``age`` seconds ago."""
    values = vars(replace(Holder.here(), host="node-7", process=4711, space="another kernel", **changes))
    folder.write_json(LEASE, {"schema": 1, **values})
    os.utime(folder.file(LEASE), (time.time() - age,) * 2)


def test_the_second_is_told_who_holds_the_folder_since_when_and_the_first_goes_on(
    tmp_path: Path, other_driver: subprocess.Popen[str]
) -> None:
    folder = Folder.at(tmp_path / "run")

    with pytest.raises(StorageError) as refused, holding(folder):
        pytest.fail("held twice")

    since = folder.read_json(LEASE)["since"]
    assert f"process {other_driver.pid} on " in str(refused.value)
    assert f"since {since}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert other_driver.poll() is None
    assert folder.read_json(LEASE)["process"] == other_driver.pid


def test_a_driver_killed_on_this_machine_leaves_the_folder_free_at_once(
    tmp_path: Path, other_driver: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    folder = Folder.at(tmp_path / "run")
    other_driver.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other_driver.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie of this process

    with holding(folder):
        assert folder.read_json(LEASE)["process"] == os.getpid()

    assert not folder.exists(LEASE)


def test_a_process_number_that_was_given_anew_is_not_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    folder = Folder.at(tmp_path)
    holder = replace(Holder.here(), token="earlier", started="1")
    folder.write_json(LEASE, {"schema": 1, **vars(holder)})

    with holding(folder):
        assert folder.read_json(LEASE)["token"] != "earlier"


@pytest.mark.parametrize("content", ["another machine's", "being written"])
def test_what_this_machine_cannot_look_up_is_dead_only_after_the_stated_time(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    folder = Folder.at(tmp_path)

    def put(age: float) -> None:
        put_lease(folder, age=age)
        if content == "being written":
            (tmp_path / LEASE).write_bytes(b'{"schema"')
            os.utime(tmp_path / LEASE, (time.time() - age,) * 2)

    put(lease.EXPIRES_AFTER_S - 20)
    with pytest.raises(StorageError, match=r"node-7|somebody"):
        check_not_held(folder)
    put(lease.EXPIRES_AFTER_S + 1)
    check_not_held(folder)
    with holding(folder):
        assert folder.read_json(LEASE)["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []  # no probe is left either


def test_of_many_that_start_at_the_same_instant_one_gets_the_folder(tmp_path: Path) -> None:
    start, go_on, held, refused = threading.Barrier(8), threading.Event(), [], []

    def attempt() -> None:
        start.wait()
        try:
            with holding(Folder.at(tmp_path / "run")):
                held.append(1)
                go_on.wait(30)
        except StorageError:
            refused.append(1)
        if len(refused) == 7:
            go_on.set()

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert (len(held), len(refused)) == (1, 7)


def test_without_exclusive_creation_the_one_who_wrote_last_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead lease is replaced as in a bucket; somebody who does so too, a moment later, has it."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.5)
    folder = Folder.at(tmp_path)
    put_lease(folder, age=1000)

    def overwrite() -> None:
        while folder.read_json(LEASE)["process"] != os.getpid():
            time.sleep(0.01)
        put_lease(folder)

    rival = threading.Thread(target=overwrite)
    rival.start()
    with pytest.raises(StorageError, match="process 4711 on node-7"), holding(folder):
        pytest.fail("held twice")
    rival.join()
    assert folder.read_json(LEASE)["host"] == "node-7"  # and it is left alone


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder in a bucket of an S3 server on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1").create_bucket(Bucket="bucket")
    yield Folder.at(f"s3://bucket/runs/a?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}")
    server.stop()


def test_in_a_bucket_of_several_that_start_at_the_same_instant_one_gets_the_folder(
    bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 2.0)
    start, go_on, held, refused = threading.Barrier(4), threading.Event(), [], []

    def attempt() -> None:
        start.wait()
        try:
            with holding(bucket):
                held.append(1)
                go_on.wait(30)
        except StorageError as error:
            refused.append(str(error))
        if len(refused) == 3:
            go_on.set()

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert (len(held), len(refused)) == (1, 3)
    assert f"is being worked on by process {os.getpid()} on " in refused[0]
    assert not bucket.exists(LEASE)


def test_in_a_bucket_a_lease_of_another_machine_holds_until_it_expires(
    bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    values = vars(replace(Holder.here(), host="node-7", process=4711, space="another kernel"))
    bucket.write_json(LEASE, {"schema": 1, **values})

    with pytest.raises(StorageError, match="process 4711 on node-7"), holding(bucket):
        pytest.fail("held twice")
    monkeypatch.setattr(lease, "EXPIRES_AFTER_S", 2.0)
    time.sleep(3.5)  # times in a bucket are whole seconds
    with holding(bucket):
        assert bucket.read_json(LEASE)["process"] == os.getpid()
    assert not bucket.exists(LEASE)


def test_the_lease_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.05)
    folder = Folder.at(tmp_path)
    with holding(folder):
        os.utime(tmp_path / LEASE, (0, 0))
        deadline = time.monotonic() + 30
        while folder.stamp(LEASE).mtime_ns == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_one_whose_lease_was_taken_over_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.05)
    folder = Folder.at(tmp_path)

    def work() -> None:
        with holding(folder):
            put_lease(folder)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                time.sleep(0.01)

    with pytest.raises(StorageError, match="was taken over by somebody else"):
        work()

    assert json.loads((tmp_path / LEASE).read_text())["host"] == "node-7"  # the other's stays


def test_nothing_is_left_of_a_lease_and_of_the_folders_made_for_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a check failed"), holding(Folder.at(tmp_path / "runs" / "a")):
        raise RuntimeError("a check failed")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age", "waits"), [(0.0, True), (lease.EXPIRES_AFTER_S + 1, False)])
def test_what_goes_on_by_itself_waits_until_the_lease_of_a_dead_machine_has_expired(
    tmp_path: Path, age: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody renews it, so it expires: here as soon as somebody waits."""
    folder = Folder.at(tmp_path / "run")
    put_lease(folder, age=age)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        put_lease(folder, age=lease.EXPIRES_AFTER_S + 1)

    monkeypatch.setattr(lease.time, "sleep", wait)
    lease.wait_for_the_dead(folder)

    assert len(waited) == int(waits)
    check_not_held(folder)


def test_nobody_waits_for_the_living(
    tmp_path: Path, other_driver: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.at(tmp_path / "run")
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: pytest.fail("waited"))

    lease.wait_for_the_dead(folder)

    with pytest.raises(StorageError, match="is being worked on"):
        check_not_held(folder)
