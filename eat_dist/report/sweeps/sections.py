"""The sections of a sweep's page, each made of what was drawn for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eat_dist.report.content import Block, Fold, Listing, Plots, Section, Text
from eat_dist.report.drawing import Drawing, as_plot
from eat_dist.report.sweeps import tables
from eat_dist.report.sweeps.importance import FEWEST_TRIALS, SHUFFLES, Analysis
from eat_dist.report.sweeps.looks import keys, legend
from eat_dist.report.sweeps.ranking import best
from eat_dist.report.sweeps.reading import Sweep
from eat_dist.report.sweeps.wording import axis_label, objective_name, told_epsilon
from eat_dist.report.wording import as_yaml, duration, joined, plain


def trials(sweep: Sweep) -> Section:
    """Every trial; the failed ones with their reasons."""
    blocks: list[Block] = [tables.trials(sweep)] if any(trial.results for trial in sweep.trials) else []
    if (lost := tables.failed(sweep)) is not None:
        blocks.append(lost)
    lead = "A trial's score is that after its last epoch, the model it leaves; the best of its epochs would be luck."
    return Section("trials", "Trials", lead, blocks)


def parallel(sweep: Sweep, made: list[Drawing]) -> Section:
    """Parallel coordinates."""
    lead = (
        "A line is a trial, from top to bottom through its settings to its score. Where the good lines meet, a setting "
        "matters; where they spread, it does not."
    )
    return Section("parallel", "Parallel coordinates", lead, _plots(sweep, made, "parallel"))


def front(sweep: Sweep, made: list[Drawing]) -> Section:
    """Clean R@1 against attacked NMI, or the two objectives."""
    lead = (
        "What robustness costs on clean images. A trial on the front is beaten by no other in both; below and left of "
        "the line lies what is beaten. The numbers beside the points are the trials'."
    )
    lead = lead.replace("below and left of", "behind") if {o.direction for o in sweep.objectives} != {"max"} else lead
    blocks: list[Block] = []
    if made:
        drawn = made[0]
        blocks = [Plots("", [as_plot(drawn)], keys(drawn.legend, place="front", line=False), wide=True)]
    absent = "No finished trial has both figures."
    return Section("front", "Clean against attacked", lead, blocks or [Text(absent, tone="absent")])


def course(sweep: Sweep, made: list[Drawing]) -> Section:
    """The score of every trial after each epoch."""
    lead = "A dotted line that ends in a cross was stopped there."
    return Section("course", "Score against epoch", lead, _plots(sweep, made, "course"))


def importance(found: list[Analysis], made: list[Drawing]) -> Section:
    """Which settings mattered, against chance."""
    lead = (
        "How much of the scores' variance each setting explains alone: functional analysis of variance, over a "
        f"random forest. The upright mark is the most that it explained with the scores shuffled {SHUFFLES} times: a "
        f"hollow bar stays below and may be chance, and one setting in {SHUFFLES + 1} passes its mark by chance. At "
        "the end pruned trials do not count, since their last score is of an earlier epoch, and the finished ones tell "
        "of the settings that survived. So all trials are also compared early, after the last epoch that every one of "
        "them reached."
    )
    blocks: list[Block] = []
    if made:
        entries = keys(made[0].legend, place="importance", line=False)
        blocks.append(Plots("", [as_plot(one) for one in made], entries, wide=True))
        blocks.append(Fold("The numbers", [tables.importances(found)]))
    for analysis in found:
        when = "at the end" if analysis.epoch is None else f"after epoch {analysis.epoch}"
        name = f"{objective_name(analysis.objective)} {when}"
        blocks += [Text(f"{name}: {sentence}.", tone="absent") for sentence in analysis.left_out]
    if not made:
        blocks.append(Text(f"Importances need {FEWEST_TRIALS} trials measured after the same epoch.", tone="absent"))
    return Section("importance", "Importance of the settings", lead, blocks)


def slices(sweep: Sweep, made: list[Drawing]) -> Section:
    """The score against one setting at a time."""
    blocks: list[Block] = []
    each = len(made) // len(sweep.objectives)
    for place, objective in enumerate(sweep.objectives if made else ()):
        heading = axis_label(objective, sweep) if len(sweep.objectives) > 1 else ""
        plots = [as_plot(one) for one in made[place * each : (place + 1) * each]]
        blocks.append(Plots(heading, plots, keys(legend(sweep), place=f"slices-{place}", line=False)))
    lead = "Each point is a trial; one setting at a time, the others as they happened to be."
    return Section("slices", "Score against each setting", lead, blocks or _no_results())


def origin(sweep: Sweep) -> Section:
    """The space, the base config and the command."""
    about = sweep.about
    facts = {
        "search": about.search,
        "scheduler": about.scheduler,
        "objective": joined([f"{objective_name(o)} ({o.direction})" for o in about.objectives]),
        "trials at once": about.concurrent,
        "seed": about.seed,
        "share of the training classes held out": about.validation_share,
        "ε of the attacks": None if about.evaluation_epsilon is None else told_epsilon(sweep),
        "started": about.started,
        "took": None if about.seconds is None else duration(about.seconds),
        "git": plain(about.git),
    }
    told = "; ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    blocks: list[Block] = [Text(f"{told}."), tables.space(sweep)]
    if (winner := best(sweep)) is not None:
        heading = f"Settings of trial {winner.number}, over the base config"
        blocks.append(Listing(heading, as_yaml(nested(winner.settings))))
    command = plain(about.command)
    blocks += [Listing("Command", command)] if command else []
    blocks += [Fold("Base config", [Listing("config.yaml", as_yaml(about.base_config))])] if about.base_config else []
    return Section("origin", "What made this sweep", "", blocks)


def _plots(sweep: Sweep, made: list[Drawing], place: str) -> list[Block]:
    if not made:
        return _no_results()
    return [Plots("", [as_plot(one) for one in made], keys(legend(sweep), place=place), wide=True)]


def _no_results() -> list[Block]:
    return [Text("No trial has a result yet.", tone="absent")]


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` → ``{"a": {"b": 1}}``."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        at = made
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return made
