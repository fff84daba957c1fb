"""The command line's ``compare`` and ``register``: what becomes of finished runs."""

from __future__ import annotations

from typing import Annotated

import typer

# Modules that take seconds to import are imported by the command that needs them, so that --help is quick.
# ruff: noqa: PLC0415

TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow's store; default: MLFLOW_TRACKING_URI, else mlflow.db in this folder.")
]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="EXPERIMENT|RUN...", help="MLflow experiments (name or id), MLflow runs, run folders."),
    ],
    sort: Annotated[str | None, typer.Option(help="Metric, e.g. attacked/pgd20/r_at_1; default worst/r_at_1.")] = None,
    last: Annotated[int | None, typer.Option(help="Of an experiment the newest N runs, with their trials.")] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="HTML file of the side-by-side report.")
    ] = "comparison.html",
    tracking_uri: TrackingUri = None,
) -> None:
    """Show runs in one table, the best first, and write their side-by-side report."""
    from collections import defaultdict

    from eat_dist.console import Console
    from eat_dist.errors import ConfigError
    from eat_dist.report import write_report
    from eat_dist.runs.comparison import compare as compare_runs
    from eat_dist.runs.comparison import reportable
    from eat_dist.runs.comparison_table import print_comparison

    if not output.endswith(".html"):
        raise ConfigError(f"expected the report's file name to end in .html; got '{output}'")
    console = Console()
    comparison = compare_runs(runs, sort=sort, last=last, tracking_uri=tracking_uri)
    print_comparison(comparison, console.out)
    folders, left_out = reportable(comparison)
    reasons = defaultdict(list)
    for name, reason in left_out:
        reasons[reason].append(name)
    for reason, names in reasons.items():
        console.say(f"not in the report: {', '.join(names)} ({reason})")
    if not folders:
        console.warn("there is no report, because it is made of run folders and none can be read here")
        return
    with console.working("drawing") as progress:
        written = write_report(folders, output, on_progress=progress)
    console.say(f"report       {written.page}")


def register(
    run: Annotated[str, typer.Argument(help="A finished run's folder, or the id of its MLflow run.")],
    name: Annotated[str, typer.Argument(help="Registered model; made where it is not there yet.")],
    tracking_uri: TrackingUri = None,
) -> None:
    """Add a finished run's ensemble to a registered model, as its next version."""
    from eat_dist.console import Console
    from eat_dist.runs.register import register_run

    console = Console()
    registered = register_run(run, name, tracking_uri=tracking_uri)
    console.say(f"registered   {registered}")
    console.say(f'load it      mlflow.pyfunc.load_model("{registered}")')
