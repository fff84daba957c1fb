"""Runs that differ only in their seed are one entry, with mean and standard deviation over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eat_dist.evaluation.measured import unlike
from eat_dist.metrics.spared import counted_figure
from eat_dist.report.reading import Run, settings
from eat_dist.report.schema import Evaluation, Figures


@dataclass(frozen=True)
class Value:
    """A figure and its spread: over training seeds for several runs, over k-means seeds for one. None: not measured.

    ``spared``: of one attack, the lower figure is that with one image in C left as it is.
    """

    mean: float | None
    std: float | None = None
    spared: bool = False


@dataclass(frozen=True)
class Group:
    """What is compared: one run, or several that differ only in their seed.

    Attributes:
        label: The run's, or ``NAME (3 seeds)``.
        runs: In the order given; at least one.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run that stands for the group where only one can be shown."""
        return self.runs[0]

    @property
    def quotable(self) -> bool:
        """Whether no run of the group failed a sanity check."""
        return not any(run.evaluation.failed for run in self.runs)

    def value(self, pick: Callable[[Evaluation], Value]) -> Value:
        """A figure of the group: a single run's own, else mean and standard deviation (n − 1) over its runs.

        Runs that lack the figure are left out; where only one has it, there is no spread.
        """
        values = [pick(run.evaluation) for run in self.runs]
        if len(values) == 1:
            return values[0]
        means = [value.mean for value in values if value.mean is not None]
        if not means:
            return Value(None)
        return Value(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None)


def group_by_seed(runs: Sequence[Run]) -> list[Group]:
    """Put runs together whose configs are equal but for name and seed, in the order of each group's first run.

    Only trained runs are put together: the config of a foreign model does not say which weights it has. Two runs of
    one seed are no sample of two seeds, so they stay apart.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = _all_but_seed(run)
        while any(other.evaluation.seed == run.evaluation.seed for other in groups.get(key, [])):
            key += "+"
        groups.setdefault(key, []).append(run)
    return [Group(_label(members), tuple(members)) for members in groups.values()]


def runs_of(groups: Sequence[Group]) -> list[Run]:
    """The runs of all groups, in order."""
    return [run for group in groups for run in group.runs]


def disagreements(runs: Sequence[Run]) -> list[str]:
    """In which of the settings of measurement the runs differ, so that their figures may not be compared."""
    return unlike([run.measured for run in runs])


def clean(name: str) -> Callable[[Evaluation], Value]:
    """The unattacked figure, with its spread over k-means seeds where it has one."""
    return lambda evaluation: of(evaluation.ensemble.clean, name)


def worst(name: str) -> Callable[[Evaluation], Value]:
    """The figure under the worst attack; the spread is that of the attack whose mean it is."""

    def pick(evaluation: Evaluation) -> Value:
        lowest = evaluation.ensemble.worst.get(name)
        attacked = [of(figures, name) for figures in evaluation.ensemble.attacked.values()]
        spreads = [value.std for value in attacked if value.mean is not None and value.mean == lowest]
        return Value(lowest, spreads[0] if spreads else None)

    return pick


def of(figures: Figures, name: str) -> Value:
    """One figure of a model, clean or under one attack: of clustering the one that counts."""
    return Value(*counted_figure(figures, name))


def _all_but_seed(run: Run) -> str:
    evaluation = run.evaluation
    if evaluation.target.kind != "run":
        return json.dumps(["single", run.label])
    config = {key: value for key, value in settings(run).items() if key not in ("name", "seed")}
    return json.dumps(["run", config, evaluation.defense, run.measured], sort_keys=True, default=str)


def _label(runs: list[Run]) -> str:
    if len(runs) == 1:
        return runs[0].label
    shared = _common_start([run.label for run in runs]).rstrip("-_/. ") or runs[0].label
    return f"{shared} ({len(runs)} seeds)"


def _common_start(labels: list[str]) -> str:
    shortest = min(labels, key=len)
    for end in range(len(shortest), 0, -1):
        if all(label.startswith(shortest[:end]) for label in labels):
            return shortest[:end]
    return ""
