"""The closing table of a sweep."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table

from eat_dist.sweeps.book import shown
from eat_dist.sweeps.plan import SweepPlan
from eat_dist.sweeps.record import Trial


def trials_table(plan: SweepPlan, trials: Sequence[Trial], chosen: Collection[str]) -> Table:
    """A row a trial, in the order given; the chosen ones bold, with a star."""
    table = Table(title=f"{plan.name}: {len(trials)} trials, on validation classes, ε = {plan.evaluation_epsilon:.4g}")
    table.add_column("trial")
    table.add_column("")
    table.add_column("epoch", justify="right")
    for name in plan.objectives:
        table.add_column(name, justify="right")
    keys = [parameter.key for parameter in plan.space.parameters]
    for key in keys:
        table.add_column(key.rpartition(".")[2], justify="right")
    for trial in trials:
        best = trial.id in chosen
        values = [f"{trial.objectives[name]:.4f}" if trial.objectives else "–" for name in plan.objectives]
        settings = [shown(trial.settings[key]) if key in trial.settings else "" for key in keys]
        about = [trial.id + ("★" if best else ""), trial.status.lower(), str(trial.epoch)]
        table.add_row(*about, *values, *settings, style="bold" if best else "")
    return table
