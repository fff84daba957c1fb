"""Shared by all tests: one thread a process, no network, one Ray session."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import object_store
import pytest

from report_browser import CHROMIUM, QUIET

# Before torch and ray are imported: threads of several processes on two cores wait for each other by spinning.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
    os.environ.pop(name, None)
os.environ |= object_store.CREDENTIALS
# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402  (after the variable above)

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several test processes one has the Ray cluster, and a module's tests share what it prepared once."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shards that tests prepare do not go into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def tests_outlive_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails leaves its process without Python's finalisation; of a test that is the tests' own."""
    monkeypatch.setattr("eat_dist.cli._leave", sys.exit)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Call ``eat-dist`` in this process (a new one would import torch each time), in an empty working folder.

    It gives the exit code, standard output and standard error.
    """
    from eat_dist import cli

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eat-dist", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The distribution's Chromium, headless (tests/report_browser.py says when there is none)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[object_store.ObjectStore]:
    """An S3 server that anybody may use."""
    with object_store.serving() as store:
        yield store


@pytest.fixture
def bucket(s3: object_store.ObjectStore) -> str:
    """The name of a new bucket in it."""
    name = f"tests-{uuid.uuid4().hex}"
    s3.client.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one Ray cluster of the session: two CPUs, whatever the machine has, so that results do not depend on it."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
    )
    yield
    ray.shutdown()
