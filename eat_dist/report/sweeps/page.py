"""The page of a sweep, and its drawings as figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import yaml

from eat_dist.report.content import Block, Fold, Listing, Page, Plots, Section, Text, Verdict
from eat_dist.report.drawing import Drawing, as_figure, as_plot
from eat_dist.report.sweeps import tables
from eat_dist.report.sweeps.drawings import drawings
from eat_dist.report.sweeps.importance import FEWEST_TRIALS, SHUFFLES, Analysis, analyses
from eat_dist.report.sweeps.looks import keys, legend
from eat_dist.report.sweeps.ranking import best, figure, finished, front, gain, score
from eat_dist.report.sweeps.reading import Sweep, Trial, read_sweep
from eat_dist.report.sweeps.wording import (
    axis_label,
    counted,
    counts,
    difference,
    duration,
    objective_name,
    scored,
    settings_text,
)
from eat_dist.report.wording import joined, percent
from eat_dist.storage import Folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OnProgress = Callable[[str, int, int], None]
CAUTION = (
    "One seed a trial, and the best of many is partly luck: whether it is ahead by more than seeds differ cannot be "
    "told from a sweep. Retrain it over several seeds on all training classes, then test it."
)
_MOST_NAMED = 8
_HEADLINE = (("r_at_1", "R@1"), ("nmi", "NMI"))


def sweep_figures(folder: Folder) -> dict[str, Figure]:
    """The drawings of a sweep, for a tracking server or a notebook.

    Args:
        folder: A sweep folder, with ``sweep.json`` and ``trials.json``; the sweep may be under way.

    Returns:
        By name (``parallel``, ``front``, ``course-…``, ``importance-…``, ``slice-…``) a matplotlib figure of its own,
        title and legend inside. Empty where no trial has a result yet.

    Raises:
        StorageError: The folder is no sweep, or damaged.
    """
    sweep = read_sweep(folder)
    made = drawings(sweep, analyses(sweep))
    return {drawing.name: as_figure(drawing) for section in made.values() for drawing in section}


def make_sweep_page(sweep: Sweep, *, title: str | None = None, on_progress: OnProgress | None = None) -> Page:
    """Put the page together; nothing is written."""
    steps = ("importance", "drawings", "page")

    def tell(step: str) -> None:
        if on_progress is not None:
            on_progress(step, steps.index(step), len(steps))

    tell("importance")
    found = analyses(sweep)
    tell("drawings")
    made = drawings(sweep, found)
    pair = [_parallel(sweep, made["parallel"]), _front(sweep, made["front"])]
    sections = [
        _trials(sweep),
        # With two objectives the front is what the sweep was made for.
        *(pair if len(sweep.objectives) == 1 else reversed(pair)),
        _course(sweep, made["course"]),
        _importance(found, made["importance"]),
        _slices(sweep, made["slices"]),
        _origin(sweep),
    ]
    tell("page")
    return Page(
        title=title or f"Sweep {sweep.about.name}",
        subtitle=_subtitle(sweep),
        verdicts=[verdict(sweep)],
        warnings=warnings(sweep),
        sections=sections,
    )


def verdict(sweep: Sweep) -> Verdict:
    """How many trials ended how, and what came out."""
    winner, chosen, ended = best(sweep), front(sweep), finished(sweep)
    outcome: Literal["pass", "fail", "none"] = "none" if ended else "fail"
    about = f"{counted(len(sweep.trials), 'trial')}: {counts(sweep)}"
    if winner is not None:
        return Verdict(
            label=f"★ Trial {winner.number}: {objective_name(sweep.objectives[0])} "
            f"{scored(score(winner, sweep.objectives[0]), sweep)}",
            about=about,
            outcome=outcome,
            sentence=_ahead(sweep, winner),
            figures=[(name, *_clean_and_worst(winner, key)) for key, name in _HEADLINE],
            shares=[_shares(winner, key) for key, _ in _HEADLINE],
            notes=[settings_text(winner.settings), f"On validation classes. {CAUTION}"],
        )
    if chosen:
        names = joined([objective_name(objective) for objective in sweep.objectives])
        label = f"◆ {counted(len(chosen), 'trial')} on the front of {names}"
        sentence = f"Of {len(ended)} finished trials no other is as good as one of these in both and better in one."
        notes = [f"Trial {one.number}: {_scores(one, sweep)}" for one in chosen[:_MOST_NAMED]]
        notes += [f"… and {len(chosen) - _MOST_NAMED} more"] if len(chosen) > _MOST_NAMED else []
        return Verdict(label, about, outcome, sentence, [], [], [*notes, f"On validation classes. {CAUTION}"])
    sentence = "✗ No trial has run to its end with a score: there is no best."
    return Verdict(sweep.about.name, about, outcome, sentence, [], [], [])


def warnings(sweep: Sweep) -> list[str]:
    """What keeps the page from being the last word on the sweep."""
    found = []
    under_way = len(sweep.with_status("RUNNING", "INTERRUPTED"))
    wanted = sweep.about.trials_requested
    missing = max((wanted or 0) - len(sweep.trials), 0)
    if under_way or missing:
        parts = [f"{counted(under_way, 'trial')} running or interrupted"] if under_way else []
        parts += [f"{missing} of {wanted} not started"] if missing else []
        found.append(f"The sweep is not finished: {joined(parts)}. This page shows what was there when it was made.")
    winner, named = best(sweep), sweep.about.best
    if winner is not None and named is not None and named != winner.id:
        other = next((trial for trial in sweep.trials if trial.id == named), None)
        equal = other is not None and other.status == "FINISHED" and _scores(other, sweep) == _scores(winner, sweep)
        if not equal:
            who = f"trial {other.number}" if other is not None else f"'{named}', which trials.json lacks,"
            found.append(
                f"sweep.json names {who} as the best; by the last results in trials.json it is trial {winner.number}, "
                "and this page goes by those."
            )
    return found


def _trials(sweep: Sweep) -> Section:
    blocks: list[Block] = [tables.trials(sweep)] if any(trial.results for trial in sweep.trials) else []
    if (lost := tables.failed(sweep)) is not None:
        blocks.append(lost)
    lead = "A trial's score is that after its last epoch, the model it leaves; the best of its epochs would be luck."
    return Section("trials", "Trials", lead, blocks)


def _parallel(sweep: Sweep, made: list[Drawing]) -> Section:
    lead = (
        "A line is a trial, from top to bottom through its settings to its score. Where the good lines meet, a setting "
        "matters; where they spread, it does not."
    )
    return Section("parallel", "Parallel coordinates", lead, _plots(sweep, made, "parallel"))


def _front(sweep: Sweep, made: list[Drawing]) -> Section:
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


def _course(sweep: Sweep, made: list[Drawing]) -> Section:
    lead = "A dotted line that ends in a cross was stopped there."
    return Section("course", "Score against epoch", lead, _plots(sweep, made, "course"))


def _importance(found: list[Analysis], made: list[Drawing]) -> Section:
    lead = (
        "How much of the scores' variance each setting explains alone: functional analysis of variance, over a "
        f"random forest. The upright mark is the most that it explained with the scores shuffled {SHUFFLES} times; "
        "a hollow bar that stays below may be chance. At the end pruned trials do not count, since their last score is "
        "of an earlier epoch, and the finished ones tell of the settings that survived. So all trials are also "
        "compared early, after the last epoch that every one of them reached."
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


def _slices(sweep: Sweep, made: list[Drawing]) -> Section:
    blocks: list[Block] = []
    each = len(made) // len(sweep.objectives)
    for place, objective in enumerate(sweep.objectives if made else ()):
        heading = axis_label(objective, sweep) if len(sweep.objectives) > 1 else ""
        plots = [as_plot(one) for one in made[place * each : (place + 1) * each]]
        blocks.append(Plots(heading, plots, keys(legend(sweep), place=f"slices-{place}", line=False)))
    lead = "Each point is a trial; one setting at a time, the others as they happened to be."
    return Section("slices", "Score against each setting", lead, blocks or _no_results())


def _origin(sweep: Sweep) -> Section:
    about = sweep.about
    facts = {
        "search": about.search,
        "scheduler": about.scheduler,
        "objective": joined([f"{objective_name(o)} ({o.direction})" for o in about.objectives]),
        "trials at once": about.concurrent,
        "seed": about.seed,
        "share of the training classes held out": about.validation_share,
        "ε of the attacks": about.evaluation_epsilon,
        "started": about.started,
        "took": None if about.seconds is None else duration(about.seconds),
        "git": _plain(about.git),
    }
    told = "; ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    blocks: list[Block] = [Text(f"{told}."), tables.space(sweep)]
    if (winner := best(sweep)) is not None:
        heading = f"Settings of trial {winner.number}, over the base config"
        blocks.append(Listing(heading, _yaml(nested(winner.settings))))
    command = _plain(about.command)
    blocks += [Listing("Command", command)] if command else []
    blocks += [Fold("Base config", [Listing("config.yaml", _yaml(about.base_config))])] if about.base_config else []
    return Section("origin", "What made this sweep", "", blocks)


def _plots(sweep: Sweep, made: list[Drawing], place: str) -> list[Block]:
    if not made:
        return _no_results()
    return [Plots("", [as_plot(one) for one in made], keys(legend(sweep), place=place), wide=True)]


def _no_results() -> list[Block]:
    return [Text("No trial has a result yet.", tone="absent")]


def _ahead(sweep: Sweep, winner: Trial) -> str:
    ended = finished(sweep)
    ahead = gain(sweep)
    if ahead is None:
        return f"Trial {winner.number} is the only one that finished: there is nothing to compare it with."
    return (
        f"Trial {winner.number} is the best of {len(ended)} finished trials, {difference(ahead, sweep)} ahead of the "
        "median one."
    )


def _subtitle(sweep: Sweep) -> str:
    about = sweep.about
    dataset = about.base_config.get("data", {})
    parts = [str(dataset["dataset"])] if isinstance(dataset, dict) and "dataset" in dataset else []
    parts += ["validation classes, held out of the training classes"]
    parts += [f"ε = {about.evaluation_epsilon}"] if about.evaluation_epsilon is not None else []
    parts += [joined([parameter.key for parameter in sweep.parameters])]
    return " · ".join(parts)


def _scores(trial: Trial, sweep: Sweep) -> str:
    return ", ".join(f"{objective_name(o)} {scored(score(trial, o), sweep)}" for o in sweep.objectives)


def _clean_and_worst(trial: Trial, name: str) -> tuple[str, str]:
    return percent(figure(trial, f"clean/{name}")), percent(figure(trial, f"worst/{name}"))


def _shares(trial: Trial, name: str) -> tuple[float, float]:
    clean, worst = (figure(trial, f"{which}/{name}") or 0.0 for which in ("clean", "worst"))
    return min(max(clean, 0.0), 1.0), min(max(worst, 0.0), 1.0)


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


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> str:
    """A fact whatever its form: a text, a list of arguments, a mapping."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item not in (None, ""))
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
