"""An evaluation's jobs shared out among Ray workers: images are independent of each other, so any number will do."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
import torch

from eat_dist.cluster.resources import place
from eat_dist.cluster.session import connect, nodes
from eat_dist.config import ClusterConfig
from eat_dist.errors import EatError, MembersFailedError
from eat_dist.evaluation.victim import Job, Victim, do

Result = TypeVar("Result")

# Batches under way for each worker: the next one waits there when one is done.
_AHEAD = 2
# Characters of Ray's account of a death that are told.
_WORDS = 300
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def has_gpus(config: ClusterConfig) -> bool:
    """Whether the cluster, which is joined, has GPUs."""
    connect(config)
    return sum(node.gpus for node in nodes()) > 0


class RayWorkers:
    """Workers (:class:`eat_dist.evaluation.victim.Workers`) on a cluster.

    The batches are those that one process would make, and come back in their order: the results are the same. A worker
    that dies is started again and its batches are done again, ``cluster.max_restarts`` times.

    Args:
        build: Makes the attacked models with their test set, on the device given; picklable, called in every worker
            when it is given its first batch. What it raises that the user can mend, :meth:`map` raises.
        count: Workers.
        config: Where they run.

    Raises:
        ClusterError: The cluster cannot hold them all.
    """

    def __init__(self, build: Callable[[torch.device], Victim], *, count: int, config: ClusterConfig) -> None:
        connect(config)
        placement = place(nodes(), members=count, config=config, what="workers", fewer="--workers")
        if not placement.gpus and config.cpus_per_member is None:
            # A whole CPU each: workers that take turns on one gain nothing.
            whole = config.model_copy(update={"cpus_per_member": 1.0})
            placement = place(nodes(), members=count, config=whole, what="workers", fewer="--workers")
        device = "cuda" if placement.gpus else "cpu"
        options = {
            "num_cpus": placement.cpus,
            "num_gpus": placement.gpus,
            "max_restarts": config.max_restarts,
            "max_task_retries": config.max_restarts,
            "scheduling_strategy": "DEFAULT",  # not within what a trial of a sweep, if this is one, has reserved
        }
        actor = ray.remote(**options)(_Worker)
        self._workers = [actor.remote(build, device, placement.threads, os.getcwd()) for _ in range(count)]
        self._clean: list[Any] = []

    def learn(self, clean: Mapping[str, torch.Tensor]) -> None:
        """Put the clean embeddings where every worker can read them."""
        self._clean = [ray.put(dict(clean))]

    def map(self, job: Job[Result], batches: Sequence[torch.Tensor]) -> Iterator[Result]:
        """The job's results in the order of the batches."""
        waiting: deque[Any] = deque()
        for place_in_line, batch in enumerate(batches):
            worker = self._workers[place_in_line % len(self._workers)]
            waiting.append(worker.do.remote(job, batch, self._clean))
            if len(waiting) > _AHEAD * len(self._workers):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            ray.kill(worker)


class _Worker:
    def __init__(self, build: Callable[[torch.device], Victim], device: str, threads: int, working_folder: str) -> None:
        torch.set_num_threads(threads)
        # What the user named relative to his folder, a run or a module, is not beside Ray's own.
        if os.path.isdir(working_folder):
            os.chdir(working_folder)
        self.build = partial(build, torch.device(device))
        self.victim: Victim | None = None
        self.learnt: Any = None

    def do(self, job: Job[Result], batch: torch.Tensor, clean: Sequence[Any]) -> Result:
        """Do a job; ``clean`` holds a reference to the embeddings: they are read once, and after a restart again."""
        # Not when the actor is made: what is raised there Ray takes for its death, and tells in words of its own.
        if self.victim is None:
            self.victim = self.build()
        if clean and clean[0] != self.learnt:
            self.victim.learn(ray.get(clean[0]))
            self.learnt = clean[0]
        return do(job, self.victim, batch)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (EatError, ValueError)):
            raise error.cause from None
        raise
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise MembersFailedError(
            f"a worker of the evaluation died and could not be started again: {_last_words(error)}. Finished attacks "
            f"are kept; give the same command again, with fewer --workers if memory ran out"
        ) from error


def _last_words(error: BaseException) -> str:
    """The end of Ray's account, in one line without colours: the reason comes after ids and calls."""
    words = " ".join(_COLOUR.sub("", str(error)).split()).rstrip(".")
    return words if len(words) <= _WORDS else f"… {words[-_WORDS:].partition(' ')[2]}"
