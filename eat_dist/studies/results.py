"""What a study leaves: tables that grow with its runs; at the end the page, a view in MLflow and on the terminal."""

from __future__ import annotations

from rich.table import Table

from eat_dist.console import Console, print_table
from eat_dist.report import write_report
from eat_dist.report.studies.comparison import Comparison, compare
from eat_dist.report.studies.reading import Study, read_study
from eat_dist.report.studies.text import as_csv, markdown
from eat_dist.report.studies.wording import grouped, heading, measured_with, seeds, told
from eat_dist.report.wording import HEADLINE, slug
from eat_dist.storage import Folder
from eat_dist.studies.record import STATE
from eat_dist.tracking import Tracker

MARKDOWN, CSV, PAGE = "table.md", "table.csv", "report.html"


def write_tables(folder: Folder) -> Study:
    """Write ``table.md`` and ``table.csv`` of what ``study.json`` says so far."""
    study = read_study(folder)
    folder.write(MARKDOWN, markdown(study).encode())
    folder.write(CSV, as_csv(study).encode())
    return study


def write_results(folder: Folder, console: Console, tracker: Tracker) -> None:
    """Write the tables and ``report.html`` of what ``study.json`` says, and show the figures."""
    study = write_tables(folder)
    write_report([folder], str(folder.child(PAGE)))
    for name in (MARKDOWN, CSV, STATE, PAGE):
        tracker.log_text(folder.read(name).decode(), name)
    for comparison in compare(study):
        for row in comparison.shown:
            means = {figure: row.value(figure).mean for figure, _ in HEADLINE}
            # In one chart of MLflow a figure of all rows, whose names may hold what MLflow's may not.
            name = f"{slug(comparison.dataset)}/{slug(row.label)}"
            tracker.log_metrics({f"{name}/{key}": value for key, value in means.items() if value is not None}, step=0)
        if comparison.shown:
            print_table(_table(comparison), console.out)


def _table(comparison: Comparison) -> Table:
    caption = "✗: a run failed sanity checks; do not quote that row" if comparison.unquotable else None
    table = Table(title=f"{comparison.dataset}: {measured_with(comparison)}, in %", caption=caption)
    table.add_column("row", overflow="fold")
    for _, label in HEADLINE:
        table.add_column(label, justify="right")
    for name in ("passes", "seeds"):
        table.add_column(name, justify="right")
    for row in comparison.shown:
        cells = []
        for figure, _ in HEADLINE:
            best = comparison.best(figure)
            is_best = best is not None and best.label == row.label
            cells.append(f"[bold]{told(row.value(figure))} *[/]" if is_best else f"{told(row.value(figure))}  ")
        table.add_row(heading(row), *cells, grouped(row.passes), seeds(row))
    return table
