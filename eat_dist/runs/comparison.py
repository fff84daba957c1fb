"""Runs side by side: which are meant, in what order, and in what they differ."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from eat_dist.errors import ConfigError, StorageError
from eat_dist.evaluation.measured import unlike
from eat_dist.report.reading import read_runs
from eat_dist.runs.saved import config_of
from eat_dist.runs.summary import flat_figures, measured_with, summary_of
from eat_dist.runs.target import names_run
from eat_dist.runs.tracked import FAILED, MEASURED
from eat_dist.storage import Folder
from eat_dist.tracking.reading import TrackedRun, find_runs
from eat_dist.tracking.sending import flattened

FIGURES = ("worst/r_at_1", "worst/nmi", "clean/r_at_1", "clean/nmi")
"""Shown of every run that has them; runs are sorted by the first that any has."""
FIXED = ("data.dataset", "defense.name", "defense.transfer_rule", "ensemble.members", "seed")
"""Params with a column of their own."""

# Where and how a run was done, which changes no number of it.
_PLACES = ("name", "data.root", "data.test_root", "data.shards", "data.cache", "data.workers", "evaluation.batch_size")
_PLACES_BELOW = ("tracking.", "cluster.", "checkpoint.")
_LOWER_IS_BETTER = ("_loss", "_rate", "displacement", "_norm", "vulnerability", "perturbation", "_std", "_mib")


@dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        key: MLflow's id, or the folder of a run that was named by its folder (a copy of a run has its id, too).
        name: Of the run.
        status: MLflow's word, with the age of the last news of a run under way.
        parent: The key of the run that it is a trial of.
        started: Milliseconds since 1970.
        folder: Path or URL of the run folder; None where it is not known.
        params: Flat, as text.
        metrics: The final figures among them.
        measured: What those were measured with, as :func:`eat_dist.evaluation.measured.measurement` has it.
        failed_checks: Names of the sanity checks that failed: then the figures are not to be quoted.
    """

    key: str
    name: str
    status: str
    parent: str | None
    started: int
    folder: str | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    measured: Mapping[str, str]
    failed_checks: str = ""


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they are shown.

    Attributes:
        rows: With their depth: 1 for a trial beneath its parent, else 0.
        sort: The metric they are sorted by, the best first; None: no run has figures, the newest is first.
    """

    rows: Sequence[tuple[int, Row]]
    sort: str | None

    @cached_property
    def figures(self) -> list[str]:
        """Metrics with a column, the sorted one first."""
        there = {name for _, row in self.rows for name in row.metrics}
        return [name for name in dict.fromkeys((self.sort, *FIGURES)) if name is not None and name in there]

    @cached_property
    def differing(self) -> list[str]:
        """Params in which runs differ, without those that have a column and those that change no number."""
        values: dict[str, set[str]] = {}
        described = [row for _, row in self.rows if "data.dataset" in row.params]  # a sweep has params of its own
        for row in described:
            for name, value in row.params.items():
                values.setdefault(name, set()).add(value)
        hidden = {*FIXED, *_PLACES}
        return sorted(
            name
            for name, found in values.items()
            if len(found) > 1 and name not in hidden and not name.startswith(_PLACES_BELOW)
        )

    @cached_property
    def measured_unlike(self) -> list[str]:
        """In which settings of measurement the runs with figures differ: then there is no best among them."""
        measured = [
            {"dataset": row.params.get("data.dataset", ""), **row.measured}
            for _, row in self.rows
            if any(name in row.metrics for name in self.figures)
        ]
        return unlike(measured)

    def best(self, metric: str) -> float | None:
        """The best value among runs that failed no sanity check; None where they were not measured alike, or of one."""
        values = [row.metrics[metric] for _, row in self.rows if metric in row.metrics and not row.failed_checks]
        if self.measured_unlike or len(values) < 2:
            return None
        return min(values) if lower_is_better(metric) else max(values)


def compare(references: Sequence[str], *, sort: str | None, last: int | None, tracking_uri: str | None) -> Comparison:
    """Find the runs and put them in order.

    Args:
        references: Run folders, names or ids of MLflow experiments, ids of MLflow runs; a parent brings its trials.
        sort: Metric; None: the first of :data:`FIGURES` that any run has.
        last: Of an experiment the newest runs alone.
        tracking_uri: MLflow's store; it is not needed for run folders.

    Raises:
        ConfigError: No run has the metric; the message lists the nearest.
        StorageError: Something is not there, or MLflow does not answer.
    """
    if last is not None and last < 1:
        raise ConfigError(f"--last must be at least 1; got {last}")
    folders = [reference for reference in references if _is_run_folder(reference)]
    others = [reference for reference in references if reference not in folders]
    rows = {row.key: row for row in map(_row_of_folder, folders)}
    if others:
        tracked = find_runs(others, tracking_uri=tracking_uri, last=last)
        known = {run.tags.get("run_folder") for run in tracked}
        rows = {key: row for key, row in rows.items() if row.folder not in known}  # one row a run, named twice or not
        rows |= {run.run_id: _row_of_run(run) for run in tracked}
    if not rows:
        raise StorageError(f"no run was found: {', '.join(references)} is empty")
    return Comparison(_in_order(list(rows.values()), metric := _sorted_by(rows.values(), sort)), metric)


def reportable(comparison: Comparison) -> tuple[list[Folder], list[tuple[str, str]]]:
    """The folders that a report can be made of, in order; and (name, reason) of the runs that it leaves out."""
    folders: dict[str, Folder] = {}
    left_out = []
    for _, row in comparison.rows:
        if row.folder is None:
            left_out.append((row.name, "it has no run folder"))
            continue
        try:
            folder = Folder.at(row.folder)
            read_runs([folder])
        except StorageError as error:
            left_out.append((row.name, str(error)))
        else:
            folders[str(folder)] = folder
    return list(folders.values()), left_out


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss, a rate of failure or a distance."""
    return metric.endswith(_LOWER_IS_BETTER)


def _is_run_folder(reference: str) -> bool:
    return names_run(reference) and Folder.at(reference).exists("config.yaml")


def _row_of_folder(reference: str) -> Row:
    folder = Folder.at(reference)
    done = folder.exists("summary.json")
    summary = summary_of(folder) if done else {}
    config = config_of(folder).model_dump(mode="json")
    stamp = folder.stamp("config.yaml").mtime_ns
    return Row(
        key=str(folder),
        name=Path(folder.path).name,
        status="FINISHED" if done else "no summary yet",
        parent=None,
        started=(stamp or 0) // 1_000_000,
        folder=str(folder),
        params={name: str(value) for name, value in flattened(config)},
        metrics=flat_figures(summary),
        measured=measured_with(summary),
        failed_checks=", ".join(summary.get("evaluation", {}).get("failed_checks") or ()),
    )


def _row_of_run(run: TrackedRun) -> Row:
    status = run.status
    if status == "RUNNING":  # its process may be dead: only its news tell
        status = f"RUNNING, last news {_age(time.time() - run.last_news / 1000)} ago"
    return Row(
        key=run.run_id,
        name=run.name,
        status=status,
        parent=run.parent,
        started=run.started,
        folder=run.tags.get("run_folder"),
        params=run.params,
        metrics=run.metrics,
        measured={
            name.removeprefix(MEASURED): value
            for name, value in run.tags.items()
            if name.startswith(MEASURED) and name != FAILED
        },
        failed_checks=run.tags.get(FAILED, ""),
    )


def _sorted_by(rows: Iterable[Row], sort: str | None) -> str | None:
    known = {name for row in rows for name in row.metrics}
    if sort is None:
        return next((name for name in FIGURES if name in known), None)
    if sort in known:
        return sort
    alike = [name for name in sorted(known) if sort.rpartition("/")[2] in name and not name.startswith("member_")]
    nearest = list(dict.fromkeys([*difflib.get_close_matches(sort, known, n=4), *alike, *sorted(known)]))[:6]
    raise ConfigError(
        f"no run has the metric '{sort}'; the nearest: {', '.join(nearest)}"
        if nearest
        else f"no run has the metric '{sort}', nor any other yet"
    )


def _in_order(rows: list[Row], metric: str | None) -> list[tuple[int, Row]]:
    """Best first, runs without the metric last and the newest of them first; trials beneath their parent."""
    there = {row.key for row in rows}
    trials: dict[str, list[Row]] = {}
    for row in rows:
        if row.parent in there:
            trials.setdefault(str(row.parent), []).append(row)

    def rank(row: Row) -> tuple[bool, float, int]:
        value = row.metrics.get(metric) if metric is not None else None
        if value is None or metric is None:
            best = [rank(trial) for trial in trials.get(row.key, ())]
            return min(best, default=(True, 0.0, -row.started))
        return False, value if lower_is_better(metric) else -value, -row.started

    tops = sorted((row for row in rows if row.parent not in there), key=rank)
    return [
        (depth, row)
        for top in tops
        for depth, row in [(0, top), *((1, trial) for trial in sorted(trials.get(top.key, ()), key=rank))]
    ]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
