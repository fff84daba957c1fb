"""The tables of a sweep: its trials best first, the failed ones with their reasons, the space, the importances."""

from __future__ import annotations

from collections.abc import Sequence

from eat_dist.report.cells import words
from eat_dist.report.content import Cell, Column, Row, Table
from eat_dist.report.sweeps.importance import Analysis
from eat_dist.report.sweeps.ranking import best, figure, final, front, ordered, score
from eat_dist.report.sweeps.reading import Sweep, Trial
from eat_dist.report.sweeps.space import Parameter, written
from eat_dist.report.sweeps.wording import (
    HARMONIC,
    STATUS,
    axis_label,
    in_percent,
    objective_name,
    reason,
    settings_text,
)
from eat_dist.report.wording import HEADLINE, MISSING, duration, number, percent


def trials(sweep: Sweep) -> Table:
    """Every trial that was measured, best first: scores, figures, settings, epochs, time."""
    shown = [trial for trial in ordered(sweep) if trial.results]
    chosen = {trial.id for trial in front(sweep)}
    winner = best(sweep)
    # An objective that is one of the figures is not written twice.
    named = {objective_name(objective) for objective in sweep.objectives}
    figures = [(name, label) for name, label in HEADLINE if label not in named]
    rows = []
    for place, trial in enumerate(shown):
        is_best = winner is not None and trial.id == winner.id
        heading = f"★ {trial.number}" if is_best else f"◆ {trial.number}" if trial.id in chosen else str(trial.number)
        last = final(trial)
        rows.append(
            Row(
                heading,
                [
                    *words(STATUS[trial.status]),
                    *(_score(trial, index, sweep, is_best=is_best) for index in range(len(sweep.objectives))),
                    *(Cell(percent(figure(trial, name))) for name, _ in figures),
                    *(_setting(trial, parameter) for parameter in sweep.parameters),
                    Cell(MISSING if last is None else str(last.epoch)),
                    Cell(duration(trial.seconds)),
                    *words(trial.run_folder or MISSING),
                ],
                starts=place > 0 and trial.status != shown[place - 1].status,
            )
        )
    columns = [Column("trial", number=False), Column("ended", number=False)]
    columns += [Column(axis_label(objective, sweep)) for objective in sweep.objectives]
    columns += [Column(f"{label}, %") for _, label in figures]
    columns += [Column(parameter.key) for parameter in sweep.parameters]
    columns += [Column("epochs"), Column("time"), Column("run folder", number=False)]
    harmonic = HARMONIC if any(objective.name == "harmonic" for objective in sweep.objectives) else ""
    marks = "◆: on the front. " if chosen else "★: the best. " if winner is not None else ""
    return Table(
        caption="Trials, best first, after their last epoch, on validation classes",
        columns=columns,
        rows=rows,
        compact=True,
        note=f"{marks}{harmonic}Attacked figures are each the smallest under any attack. A pruned trial's figures are "
        f"of an earlier epoch: it does not compete with the finished ones. {MISSING}: not measured, or does not apply.",
    )


def failed(sweep: Sweep) -> Table | None:
    """The trials without a result, and those that failed later, with the reason; None where there are none."""
    lost = [trial for trial in sweep.trials if trial.status == "FAILED" or not trial.results]
    if not lost:
        return None
    rows = [Row(str(t.number), [_outcome(t), *words(settings_text(t, sweep), _told(t))]) for t in lost]
    headings = ["trial", "ended", "settings", "reason"]
    columns = [Column(heading, number=False) for heading in headings]
    return Table(caption="Trials that failed or have no result", columns=columns, rows=rows)


def space(sweep: Sweep) -> Table:
    """What was searched, and what the best trial has."""
    winner = best(sweep)
    rows = [
        Row(
            parameter.key,
            [
                *words(parameter.spec, parameter.condition or "always"),
                *([_setting(winner, parameter)] if winner is not None else []),
            ],
        )
        for parameter in sweep.parameters
    ]
    columns = [Column("setting", number=False), Column("space", number=False), Column("applies where", number=False)]
    columns += [Column(f"best (trial {winner.number})")] if winner is not None else []
    return Table(caption="Settings that were varied", columns=columns, rows=rows)


def importances(analyses: Sequence[Analysis]) -> Table:
    """The numbers behind the bars."""
    rows = []
    for place, analysis in enumerate(analyses):
        for index, entry in enumerate(analysis.found):
            rows.append(
                Row(
                    entry.parameter.key,
                    [
                        *words(
                            objective_name(analysis.objective),
                            "at the end" if analysis.epoch is None else f"after epoch {analysis.epoch}",
                        ),
                        Cell(str(entry.trials)),
                        Cell(percent(entry.share)),
                        Cell(percent(entry.chance)),
                        *words("yes" if entry.matters else "no"),
                    ],
                    starts=place > 0 and index == 0,
                )
            )
    return Table(
        caption="Share of the variance that each setting explains alone, in %",
        columns=[
            Column("setting", number=False),
            Column("of", number=False),
            Column("when", number=False),
            Column("trials"),
            Column("share"),
            Column("by chance up to"),
            Column("beyond chance", number=False),
        ],
        rows=rows,
    )


def _score(trial: Trial, index: int, sweep: Sweep, *, is_best: bool) -> Cell:
    value = score(trial, sweep.objectives[index])
    text = MISSING if value is None else number(100 * value) if in_percent(sweep) else written(value)
    return Cell(text, mark="best" if is_best else None)


def _setting(trial: Trial, parameter: Parameter) -> Cell:
    if parameter.key not in trial.settings:
        return Cell(MISSING)
    return Cell(parameter.label(trial.settings[parameter.key]))


def _outcome(trial: Trial) -> Cell:
    word = STATUS[trial.status]
    return Cell(f"✗ {word}", mark="fail", number=False) if trial.status == "FAILED" else Cell(word, number=False)


def _told(trial: Trial) -> str:
    return reason(trial) if trial.status == "FAILED" or trial.error else MISSING
