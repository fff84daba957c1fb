"""The tables of a study on its page, in %."""

from __future__ import annotations

from eat_dist.report.cells import percentage, words
from eat_dist.report.content import Cell, Column, Row, Table
from eat_dist.report.studies.comparison import Comparison
from eat_dist.report.studies.reading import Run, Study
from eat_dist.report.studies.wording import STATUS, against, grouped, heading, names_its_own, notes, seeds, signed
from eat_dist.report.wording import HEADLINE, MISSING, duration, number


def figures(study: Study, comparison: Comparison) -> Table:
    """Every row that has a finished run: its figures and what it cost."""
    rows = []
    for row in comparison.shown:
        cells = []
        for figure, _ in HEADLINE:
            best, cell = comparison.best(figure), percentage(row.value(figure))
            is_best = best is not None and best.label == row.label
            cells.append(Cell(cell.text, cell.spread, "best") if is_best else cell)
        cost = [str(row.members), str(row.epochs), grouped(row.passes), grouped(row.seconds), seeds(row)]
        rows.append(Row(heading(row), [*cells, *(Cell(text) for text in cost)]))
    columns = [Column("row", number=False), *(Column(label) for _, label in HEADLINE)]
    columns += [Column(name) for name in ("M", "epochs", "passes", "seconds", "seeds")]
    return Table(
        caption=f"{comparison.dataset}: figures in %, and what they cost",
        columns=columns,
        rows=rows,
        note=" ".join(notes(study, comparison)),
    )


def differences(comparison: Comparison) -> Table:
    """Every row against the best other one."""
    rows = []
    for row in comparison.shown:
        cells = []
        for figure, _ in HEADLINE:
            found = comparison.difference(row, figure)
            if found is None:
                cells.append(Cell(MISSING))
                continue
            mean, std = found.value.mean, found.value.std
            text = signed(None if mean is None else 100 * mean, digits=1)
            whom = f" to {found.other}" if names_its_own(comparison, row, found, figure) else ""
            cells.append(Cell(f"{text}{whom}") if std is None else Cell(text, f"{number(100 * std)}{whom}"))
        rows.append(Row(heading(row), cells))
    columns = [Column("row", number=False)]
    for figure, label in HEADLINE:
        other = against(comparison, figure)
        columns.append(Column(f"{label}, to {other}" if other else label))
    return Table(
        caption=f"{comparison.dataset}: difference to the best other row, in points, seed by seed",
        columns=columns,
        rows=rows,
        note="The first row of a column is compared with the second, which is named beside it. ± is the standard "
        "deviation of the differences.",
    )


def runs(study: Study) -> Table:
    """Every run: how it ended, how long it took, where it is."""
    return Table(
        caption="Runs",
        columns=[Column(name, number=False) for name in ("run", "ended")]
        + [Column("took")]
        + [Column(name, number=False) for name in ("run folder", "reason")],
        rows=[
            Row(run.name, [_ended(run), Cell(duration(run.seconds)), *words(run.run_folder, run.error or MISSING)])
            for run in study.runs
        ],
        note="Took: wall clock of all parts of a run, evaluation and what was lost included.",
    )


def _ended(run: Run) -> Cell:
    word = STATUS[run.status]
    return Cell(f"✗ {word}", mark="fail", number=False) if run.status == "FAILED" else Cell(word, number=False)
