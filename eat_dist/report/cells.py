"""Cells of tables: numbers with their spread, words, and the mark on a column's extreme."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from eat_dist.report.content import Cell, Mark
from eat_dist.report.groups import Value
from eat_dist.report.wording import SPARED, number

Extreme = Callable[[Iterable[float]], float]


def marked(
    values: Sequence[Sequence[Value]], *, eligible: Sequence[bool], mark: Mark, extremes: Sequence[Extreme]
) -> list[list[Cell]]:
    """Rows of cells with the extreme of each column marked, as rounded for print: what reads equal is marked alike.

    Args:
        values: The numbers, row by row.
        eligible: Which rows may be marked. A column with fewer than two of them, or with equal ones only, has no mark.
        mark: What the extreme is called.
        extremes: ``max`` or ``min`` for each column.
    """
    rows = [[cell(value) for value in row] for row in values]
    for column, extreme in enumerate(extremes):
        printed = [None if row[column].mean is None else round(row[column].mean or 0.0, 1) for row in values]
        able = [mean for mean, may in zip(printed, eligible, strict=True) if may and mean is not None]
        if len(set(able)) < 2:
            continue
        for row, mean, may in zip(rows, printed, eligible, strict=True):
            if may and mean == extreme(able):
                row[column] = Cell(row[column].text, row[column].spread, mark)
    return rows


def scaled(value: Value, scale: float) -> Value:
    """Both parts times ``scale``: shares to percentages."""

    def times(part: float | None) -> float | None:
        return None if part is None else scale * part

    return replace(value, mean=times(value.mean), std=times(value.std))


def percentage(value: Value) -> Cell:
    """A share in [0, 1] and its spread, in %."""
    return cell(scaled(value, 100))


def cell(value: Value, *, digits: int = 1) -> Cell:
    """A number and its spread; a spread of exactly 0 is not written, since one run of k-means reports it."""
    sign = SPARED if value.spared else ""
    return Cell(sign + number(value.mean, digits=digits), number(value.std, digits=digits) if value.std else "")


def spared_note(values: Iterable[Value], *, classes: int | None) -> str:
    """What the sign of :func:`cell` means; nothing where no value has it."""
    if not any(value.spared for value in values):
        return ""
    return (
        f" {SPARED}: with one image in {classes or 'C'} left as it is, which is lower here than with every image "
        "attacked (sent to a wrong class each, images still say which class they are not of). The lower one counts."
    )


def words(*texts: str) -> list[Cell]:
    """Cells of text."""
    return [Cell(text, number=False) for text in texts]
