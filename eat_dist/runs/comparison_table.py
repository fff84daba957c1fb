"""The comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eat_dist.console import print_table, width_of
from eat_dist.runs.comparison import FIXED, Comparison, Row, lower_is_better

_HEADINGS = ("dataset", "defense", "rule", "M", "seed")
_SHARES = ("map_at_r", "nmi", "ami", "f1", "_rate")  # and r_at_K: shown in %
_NOTHING = "–"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """One table; where that is wider than the terminal, settings that differ are in a second one. Then what it means.

    Where the output is no terminal (a file, a job's log) there is one table, as wide as it needs to be.
    """
    narrow = console.is_terminal
    whole = _table(comparison, figures=True, settings=True, narrow=narrow)
    if not console.is_terminal or width_of(whole, console) <= console.width or not comparison.differing:
        print_table(whole, console)
    else:
        print_table(_table(comparison, figures=True, settings=False, narrow=narrow), console)
        print_table(_table(comparison, figures=False, settings=True, narrow=narrow), console)
    for line in _legend(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(comparison: Comparison, *, figures: bool, settings: bool, narrow: bool) -> Table:
    table = Table(show_edge=False)
    table.add_column("run", overflow="fold")
    shown = comparison.figures if figures else []
    if figures:
        table.add_column("status")
        for heading in _HEADINGS:
            table.add_column(heading, justify="right" if heading in ("M", "seed") else "left")
        for metric in shown:
            heading = _heading(metric)
            table.add_column(heading.replace("/", "/\n") if narrow else heading, justify="right")
    names = comparison.differing if settings else []
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for depth, row in comparison.rows:
        cells: list[str | Text] = ["└ " * depth + row.name + (" ✗" if row.failed_checks else "")]
        if figures:
            cells += [row.status, *_fixed(row), *(_figure(comparison, metric, row) for metric in shown)]
        table.add_row(*cells, *(_setting(row.params.get(name)) for name in names))
    return table


def _legend(comparison: Comparison) -> list[str]:
    runs = len(comparison.rows)
    lines = [f"{runs} run{'s' * (runs != 1)}" + (f", sorted by {comparison.sort}" if comparison.sort else "")]
    if comparison.measured_unlike:
        differ = ", ".join(comparison.measured_unlike)
        lines.append(f"Not measured alike, so not to be compared: the runs differ in {differ}. No best is marked.")
    elif any(comparison.best(metric) is not None for metric in comparison.figures):
        lines[0] += "; * marks the best of a column"
    for _, row in comparison.rows:
        if row.failed_checks:
            lines.append(f"✗ {row.name} failed sanity checks ({row.failed_checks}): do not quote it. It is never best.")
    return lines


def _fixed(row: Row) -> Sequence[str]:
    dataset, defense, rule, members, seed = (row.params.get(name) for name in FIXED)
    rule = rule if defense == "eat" else None
    return [value or _NOTHING for value in (dataset, defense, rule, members, seed)]


def _figure(comparison: Comparison, metric: str, row: Row) -> Text:
    value = row.metrics.get(metric)
    if value is None:
        return Text(_NOTHING)
    best = value == comparison.best(metric) and not row.failed_checks
    text = f"{100 * value:.1f}" if _is_share(metric) else f"{value:.4g}"
    return Text(f"{text} *" if best else f"{text}  ", style="bold" if best else "")


def _heading(metric: str) -> str:
    unit = " %" if _is_share(metric) else ""
    return f"{metric}{unit}" + (" ↓" if lower_is_better(metric) else "")


def _is_share(metric: str) -> bool:
    return metric.endswith(_SHARES) or "r_at_" in metric.rpartition("/")[2]


def _setting(value: str | None) -> str:
    return _NOTHING if value in (None, "None") else str(value)
