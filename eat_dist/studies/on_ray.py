"""The runs of a study side by side on a Ray cluster, as many as it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from eat_dist.cluster.capacity import RunsCapacity, capacity_of_runs
from eat_dist.cluster.resources import workers_of
from eat_dist.cluster.session import connect, nodes
from eat_dist.cluster.tune import run_trials
from eat_dist.config import RunConfig
from eat_dist.console import Console
from eat_dist.errors import ClusterError
from eat_dist.studies.book import Ledger
from eat_dist.studies.plan import StudyRun
from eat_dist.studies.task import environment_for_mlflow, run_task

LedgerOf = Callable[[Sequence[StudyRun], Callable[[StudyRun], RunConfig]], Ledger]


@dataclass(frozen=True)
class Batch:
    """Runs that ask the cluster for the same, so that nodes are full or not, whatever their order.

    Attributes:
        runs: In order.
        room: How many of them at once, and what each gets.
    """

    runs: Sequence[StudyRun]
    room: RunsCapacity

    def config_of(self, run: StudyRun) -> RunConfig:
        """A run with what was worked out for it."""
        return run.config.model_copy(update={"cluster": self.room.cluster})


def plan_batches(runs: Sequence[StudyRun], *, concurrent: int | None) -> list[Batch]:
    """Runs with the same section ``cluster`` and number of workers together, in the order of their first.

    Raises:
        ClusterError: One run, or ``concurrent`` of them, do not fit; with the arithmetic.
    """
    alike: dict[str, list[StudyRun]] = {}
    for run in runs:
        cluster = run.config.cluster
        workers = workers_of(run.config)[0] if cluster.backend == "ray" else 1
        alike.setdefault(json.dumps([cluster.model_dump(mode="json"), workers]), []).append(run)
    connect(runs[0].config.cluster)
    there = nodes()
    return [
        Batch(group, capacity_of_runs(there, group[0].config, runs=len(group), concurrent=concurrent))
        for group in alike.values()
    ]


def run_batches(batches: Sequence[Batch], ledger_of: LedgerOf, *, console: Console) -> None:
    """Batch after batch, each filling the cluster; what two batches ask for is never asked at once.

    Raises:
        ClusterError: Nodes are gone.
        KeyboardInterrupt: Ctrl-C.
    """
    for batch in batches:
        ledger = ledger_of(batch.runs, batch.config_of)
        asked = " and ".join(f"{amount:g} {kind}" for kind, amount in batch.room.resources.items())
        each = f"{asked} each" if asked else "their members in Ray workers"
        console.say(f"{len(batch.runs)} runs, {batch.room.concurrent} at once, {each}")
        try:
            run_trials(
                partial(run_task, environment=environment_for_mlflow()),
                ledger,
                trials=len(batch.runs),
                concurrent=batch.room.concurrent,
                halving=None,
                max_failures=batch.room.cluster.max_restarts,
                resources=batch.room.resources,
            )
        except ClusterError as error:
            raise ClusterError(
                f"{str(error).rstrip('.')}. That has stopped the study; once it is mended, the same command goes on"
            ) from error
        finally:
            unfinished = ledger.left > 0 or ledger.under_way
            ledger.interrupt()
        if unfinished:
            raise KeyboardInterrupt
