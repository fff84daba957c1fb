"""The tables of a study as Markdown, for documents, and as CSV, for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from eat_dist.report.groups import Value
from eat_dist.report.studies.comparison import FIGURES, Comparison, Row, compare
from eat_dist.report.studies.reading import Study
from eat_dist.report.studies.wording import (
    against,
    grouped,
    heading,
    measured_with,
    names_its_own,
    notes,
    outcome,
    seeds,
    signed,
    unquotable,
)
from eat_dist.report.wording import HEADLINE, MISSING, number, plain

_ABOUT = ("dataset", "row", "members", "epochs", "seeds", "planned_seeds", "passes", "seconds", "seconds_std")
_OF_A_FIGURE = ("mean", "std", "difference", "difference_std", "difference_to", "difference_seeds", "best")


def markdown(study: Study) -> str:
    """All tables, with how to read them and what failed; shares with three decimals."""
    lines = [f"# Study {study.name}", "", f"{outcome(study)}.", ""]
    if command := plain(study.command):
        lines += ["```", command, "```", ""]
    for comparison in compare(study):
        how = measured_with(comparison)
        lines += [f"## {comparison.dataset}" + (f": {how}" if how else ""), ""]
        if comparison.shown:
            lines += [*_figures(comparison), "", "Difference to the best other row, seed by seed:", ""]
            lines += [*_differences(comparison), ""]
        lines += [f"- {note}" for note in notes(study, comparison)] + [""]
    if failed := study.with_status("FAILED"):
        lines += ["## Failed runs", "", *(f"- {run.name}: {run.error}" for run in failed), ""]
    if doubtful := unquotable(study):
        lines += ["## Not to be quoted: failed sanity checks", "", *(f"- {text}" for text in doubtful), ""]
    return "\n".join(lines)


def as_csv(study: Study) -> str:
    """A line a row and dataset, numbers as they are (shares in [0, 1]); empty where there is none."""
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    figures = [f"{figure.replace('/', '_')}_{part}" for figure in FIGURES for part in _OF_A_FIGURE]
    table.writerow([*_ABOUT, *figures, "failed_checks"])
    for comparison in compare(study):
        for row in comparison.rows:
            about = [comparison.dataset, row.label, row.members, row.epochs, len(row.runs), row.planned]
            about += [row.passes.mean, row.seconds.mean, row.seconds.std]
            cells = [cell for figure in FIGURES for cell in _cells(comparison, row, figure)]
            table.writerow([*about, *cells, " ".join(row.failed_checks)])
    return written.getvalue()


def _cells(comparison: Comparison, row: Row, figure: str) -> list[object]:
    value, found, best = row.value(figure), comparison.difference(row, figure), comparison.best(figure)
    against_other = [None] * 4 if found is None else [found.value.mean, found.value.std, found.other, found.seeds]
    return [value.mean, value.std, *against_other, int(best is not None and best.label == row.label)]


def _figures(comparison: Comparison) -> list[str]:
    headings = ["row", "M", "epochs", "passes", "seconds", "seeds", *(label for _, label in HEADLINE)]
    lines = []
    for row in comparison.shown:
        cells = [heading(row), str(row.members), str(row.epochs), grouped(row.passes), grouped(row.seconds), seeds(row)]
        for figure, _ in HEADLINE:
            best = comparison.best(figure)
            text = _spread(row.value(figure))
            cells.append(f"**{text}**" if best is not None and best.label == row.label else text)
        lines.append(cells)
    return _table(headings, lines)


def _differences(comparison: Comparison) -> list[str]:
    headings = ["row"]
    for figure, label in HEADLINE:
        other = against(comparison, figure)
        headings.append(f"{label}, to {other}" if other else label)
    lines = []
    for row in comparison.shown:
        cells = [heading(row)]
        for figure, _ in HEADLINE:
            found = comparison.difference(row, figure)
            if found is None:
                cells.append(MISSING)
                continue
            std = found.value.std
            text = signed(found.value.mean, digits=3) + ("" if std is None else f" ± {number(std, digits=3)}")
            cells.append(f"{text} (to {found.other})" if names_its_own(comparison, row, found, figure) else text)
        lines.append(cells)
    return _table(headings, lines)


def _spread(value: Value) -> str:
    return number(value.mean, digits=3) + ("" if value.std is None else f" ± {number(value.std, digits=3)}")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
