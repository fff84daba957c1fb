"""The statistics of a study: means over seeds, differences of the same seed, and which row is ahead."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from eat_dist.evaluation.measured import unlike
from eat_dist.report.groups import Value
from eat_dist.report.studies.reading import Run, Study
from eat_dist.report.wording import HEADLINE

FIGURES = tuple(name for name, _ in HEADLINE)


@dataclass(frozen=True)
class Row:
    """A row on one dataset.

    Attributes:
        label: Its name.
        runs: The finished ones, by seed.
        planned: How many there are to be.
        members: M.
        epochs: Of each.
    """

    label: str
    runs: tuple[Run, ...]
    planned: int
    members: int
    epochs: int

    def by_seed(self, figure: str) -> dict[int, float]:
        """Seed → the figure, where it was measured."""
        found = {run.seed: (run.figures or {}).get(figure) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def value(self, figure: str) -> Value:
        """Mean and standard deviation (n − 1) over the seeds; of one seed there is no deviation."""
        return _value(list(self.by_seed(figure).values()))

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """Names of the sanity checks that any of the runs failed."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.failed_checks or ()))

    @property
    def quotable(self) -> bool:
        """Whether no run failed a sanity check. A row that is not quotable is shown, and never first."""
        return not self.failed_checks

    @property
    def passes(self) -> Value:
        """Forward-backward passes over a batch, of all members: as counted."""
        return _value([run.passes for run in self.runs if run.passes is not None])

    @property
    def seconds(self) -> Value:
        """Wall clock of the training iterations."""
        return _value([run.training_seconds for run in self.runs if run.training_seconds is not None])


@dataclass(frozen=True)
class Difference:
    """A row minus the best of the others, seed by seed.

    Attributes:
        other: That row's label.
        value: Mean and standard deviation (n − 1) of the differences over the seeds that both have.
        seeds: How many these are.
    """

    other: str
    value: Value
    seeds: int

    @property
    def ahead(self) -> bool:
        """Whether the row is ahead by more than the standard deviation of the differences; of one seed never."""
        mean, std = self.value.mean, self.value.std
        return mean is not None and std is not None and mean > std


@dataclass(frozen=True)
class Comparison:
    """All rows on one dataset.

    Attributes:
        dataset: Its label.
        rows: In the order of the study, those without a finished run included.
        unlike: In what the runs were not measured alike; then nothing is compared.
    """

    dataset: str
    rows: tuple[Row, ...]
    unlike: tuple[str, ...]

    @property
    def shown(self) -> list[Row]:
        """The rows that have a finished run."""
        return [row for row in self.rows if row.runs]

    @property
    def unquotable(self) -> list[Row]:
        """The rows of which a run failed a sanity check."""
        return [row for row in self.rows if not row.quotable]

    @property
    def compared(self) -> list[Row]:
        """The rows that others are compared with: the quotable ones, with every seed that any of those has."""
        quotable = [row for row in self.shown if row.quotable]
        seeds = {run.seed for row in quotable for run in row.runs}
        return [row for row in quotable if {run.seed for run in row.runs} == seeds] if not self.unlike else []

    def first(self, figure: str) -> Row | None:
        """Of the compared rows that with the highest mean; None where nothing is compared."""
        return _highest(self.compared, figure)

    def difference(self, row: Row, figure: str) -> Difference | None:
        """The row against the best other one; None where there is none."""
        other = _highest([one for one in self.compared if one.label != row.label], figure)
        if other is None:
            return None
        mine, theirs = row.by_seed(figure), other.by_seed(figure)
        differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        return Difference(other.label, _value(differences), len(differences)) if differences else None

    def best(self, figure: str) -> Row | None:
        """The first row, if it is ahead of the second by more than seeds differ."""
        first = self.first(figure)
        lead = None if first is None else self.difference(first, figure)
        return first if lead is not None and lead.ahead else None


def compare(study: Study) -> list[Comparison]:
    """A comparison a dataset, in the order of the study."""
    return [_comparison(study, dataset) for dataset in study.datasets]


def _comparison(study: Study, dataset: str) -> Comparison:
    rows = []
    for label in study.rows:
        runs = [run for run in study.runs if (run.dataset, run.row) == (dataset, label)]
        done = sorted((run for run in runs if run.status == "FINISHED" and run.figures), key=lambda run: run.seed)
        if runs:
            rows.append(Row(label, tuple(done), len(runs), runs[0].members, runs[0].epochs))
    measured = [run.measured for row in rows for run in row.runs if run.measured is not None]
    return Comparison(dataset, tuple(rows), tuple(unlike(measured)))


def _highest(rows: Sequence[Row], figure: str) -> Row | None:
    found = [(mean, row) for row in rows if (mean := row.value(figure).mean) is not None]
    return max(found, key=lambda entry: entry[0])[1] if found else None


def _value(values: Sequence[float]) -> Value:
    if not values:
        return Value(None)
    return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
