"""An evaluation on Ray workers is that of one process, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from torch import nn

from eat_dist.cluster.evaluate import RayWorkers, _result
from eat_dist.config import ClusterConfig, EvaluationConfig
from eat_dist.data.images import ImageSet
from eat_dist.errors import ClusterError, ConfigError, DataError, MembersFailedError
from eat_dist.evaluation import Victim
from eat_dist.evaluation.crafting import Embed
from evaluation_cases import FULL, content, full_evaluation, measure, undefended, unseen, untrained

pytestmark = pytest.mark.ray

QUICK = EvaluationConfig(num_steps=3, kmeans_seeds=1, batch_size=10)


@dataclass(frozen=True)
class Build:
    """Makes what is attacked, in a worker."""

    model: nn.Module
    test: ImageSet

    def __call__(self, device: torch.device) -> Victim:
        return Victim.of(self.model, self.test, seed=0, device=device)


@pytest.fixture
def workers(ray_session: None) -> Iterator[Callable[..., RayWorkers]]:
    """Starts workers, and ends them when the test is over. They cannot import this file, and get its classes whole."""
    started: list[RayWorkers] = []

    def start(model: nn.Module, *, count: int = 2, **settings: Any) -> RayWorkers:
        started.append(RayWorkers(Build(model, unseen(12)), count=count, config=ClusterConfig(**settings)))
        return started[-1]

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield start
    for pool in started:
        pool.close()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def worker_processes() -> list[psutil.Process]:
    """Ray names a worker's process after what it runs."""
    return [child for child in psutil.Process().children(recursive=True) if "ray::_Worker" in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def on(pool: RayWorkers) -> Callable[[Victim], RayWorkers]:
    return lambda victim: pool


def test_two_workers_give_the_bytes_of_one_process(workers: Callable[..., RayWorkers], tmp_path: Path) -> None:
    """Quick, in more batches than the workers have under way at a time; also with an unfinished one before."""
    model = undefended()
    alone = measure(model, unseen(12), tmp_path / "alone", config=QUICK)
    pool = workers(model)
    assert measure(model, unseen(12), tmp_path / "two", config=QUICK, workers=on(pool)) == alone
    assert content(tmp_path / "two") == content(tmp_path / "alone")
    for path in sorted((tmp_path / "two" / "parts").iterdir())[::2]:
        path.unlink()
    (tmp_path / "two" / "summary.json").unlink()
    assert measure(model, unseen(12), tmp_path / "two", config=QUICK, workers=on(pool)) == alone
    assert content(tmp_path / "two") == content(tmp_path / "alone")


@pytest.mark.slow
def test_two_workers_give_the_full_evaluation_of_one_process(
    workers: Callable[..., RayWorkers], tmp_path: Path
) -> None:
    """Slow: a whole evaluation, and worker processes that import torch."""
    measure(undefended(), unseen(12), tmp_path, config=FULL, workers=on(workers(undefended())))
    assert content(tmp_path) == content(full_evaluation().folder)


def test_a_killed_worker_is_started_again_and_changes_nothing(
    workers: Callable[..., RayWorkers], tmp_path: Path
) -> None:
    """SIGKILL of one of two in the middle of an attack; the new one has to learn the clean embeddings anew."""
    model, killed = undefended(), []
    alone = measure(model, unseen(12), tmp_path / "alone", config=QUICK)

    def kill(part: str, done: float, total: float) -> None:
        if part.startswith("member_0") and not killed:
            process = worker_processes()[0]
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    pool = workers(model)
    assert measure(model, unseen(12), tmp_path / "killed", config=QUICK, workers=on(pool), on_progress=kill) == alone
    assert killed
    assert content(tmp_path / "killed") == content(tmp_path / "alone")


@dataclass(frozen=True)
class Dying:
    """A job that takes its process with it."""

    def __call__(self, victim: Victim, indices: torch.Tensor) -> None:
        os._exit(1)


def test_a_worker_that_dies_again_and_again_is_one_line(workers: Callable[..., RayWorkers]) -> None:
    pool = workers(untrained(1), count=1, max_restarts=1)
    with pytest.raises(ClusterError, match="a worker of the evaluation died and could not be started again") as error:
        list(pool.map(Dying(), [torch.arange(3)]))
    assert "\n" not in str(error.value)
    assert "give the same command again, with fewer --workers" in str(error.value)


def test_results_come_in_the_order_of_the_batches(workers: Callable[..., RayWorkers]) -> None:
    """Batches of different sizes take different times."""
    pool = workers(untrained(1))
    batches: Sequence[torch.Tensor] = torch.arange(60).split([1, 20, 2, 20, 1, 1, 5, 10])
    found = list(pool.map(Embed(), batches))
    victim = Build(untrained(1), unseen(12))(torch.device("cpu"))
    for batch, embedded in zip(batches, found, strict=True):
        assert torch.equal(embedded["ensemble"], Embed()(victim, batch)["ensemble"])


@dataclass(frozen=True)
class Failing:
    def __call__(self, victim: Victim, indices: torch.Tensor) -> None:
        raise ConfigError("in the worker's own words")


def test_what_the_user_can_mend_comes_back_in_the_workers_own_words(workers: Callable[..., RayWorkers]) -> None:
    with pytest.raises(ConfigError, match=r"^in the worker's own words$"):
        list(workers(untrained(1), count=1).map(Failing(), [torch.arange(3)]))


@dataclass(frozen=True)
class BuildingWithout:
    """Data that only the driver's machine has."""

    def __call__(self, device: torch.device) -> Victim:
        raise DataError("data.root '/data/omniglot' has no images_background.zip; fetch it, see docs/datasets.md")


@pytest.mark.usefixtures("workers")  # which hand over this file's classes
def test_what_a_worker_lacks_to_begin_comes_back_in_its_own_words() -> None:
    pool = RayWorkers(BuildingWithout(), count=1, config=ClusterConfig())
    try:
        with pytest.raises(DataError, match=r"^data.root '/data/omniglot' has no .* see docs/datasets.md$"):
            list(pool.map(Embed(), [torch.arange(3)]))
    finally:
        pool.close()


@pytest.mark.parametrize("kind", [partial(ray.exceptions.RayActorError, None), ray.exceptions.OutOfMemoryError])
def test_of_a_death_the_end_of_what_ray_says_is_told_without_colours(
    kind: Callable[[str], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    says = (
        "\x1b[36mray::_Worker.do()\x1b[39m died\n" + "  an id\n" * 100 + "The node ran out of\n\x1b[31mmemory\x1b[0m."
    )

    def get(reference: Any) -> None:
        raise kind(says)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(MembersFailedError) as told:
        _result(None)
    assert not set(str(told.value)) & {"\x1b", "\n"}
    assert "started again: … " in str(told.value)
    assert "an id The node ran out of memory. Finished attacks are kept" in str(told.value)


def test_more_workers_than_cpus_are_refused_with_the_arithmetic(workers: Callable[..., RayWorkers]) -> None:
    with pytest.raises(ClusterError, match=r"3 \w+ need 1 CPU each; the cluster has 0 GPUs and 2 CPUs .* room for 2"):
        workers(untrained(1), count=3)
