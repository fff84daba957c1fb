"""The page of a sweep, and its drawings as figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from eat_dist.report.content import Page, Verdict
from eat_dist.report.drawing import as_figure
from eat_dist.report.sweeps import sections
from eat_dist.report.sweeps.drawings import drawings
from eat_dist.report.sweeps.importance import analyses
from eat_dist.report.sweeps.ranking import best, figure, finished, front, gain, score
from eat_dist.report.sweeps.reading import Sweep, Trial, read_sweep
from eat_dist.report.sweeps.wording import (
    counts,
    difference,
    objective_name,
    scored,
    settings_text,
    told_epsilon,
)
from eat_dist.report.wording import counted, joined, percent
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
    steps = ("importances", "figures", "page")

    def tell(step: str) -> None:
        if on_progress is not None:
            on_progress(step, steps.index(step), len(steps))

    tell("importances")
    found = analyses(sweep)
    tell("figures")
    made = drawings(sweep, found)
    pair = [sections.parallel(sweep, made["parallel"]), sections.front(sweep, made["front"])]
    parts = [
        sections.trials(sweep),
        # With two objectives the front is what the sweep was made for.
        *(pair if len(sweep.objectives) == 1 else reversed(pair)),
        sections.course(sweep, made["course"]),
        sections.importance(found, made["importance"]),
        sections.slices(sweep, made["slices"]),
        sections.origin(sweep),
    ]
    tell("page")
    return Page(
        title=title or f"Sweep {sweep.about.name}",
        subtitle=_subtitle(sweep),
        verdicts=[verdict(sweep)],
        warnings=warnings(sweep),
        sections=parts,
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
            notes=[settings_text(winner, sweep), f"On validation classes. {CAUTION}", *_ready(sweep)],
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


def _ready(sweep: Sweep) -> list[str]:
    return [f"Its config for that: {sweep.ready} in the sweep's folder."] if sweep.ready else []


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
    parts += [f"attacked at ε = {told_epsilon(sweep)}"] if about.evaluation_epsilon is not None else []
    parts += [joined([parameter.key for parameter in sweep.parameters])]
    return " · ".join(parts)


def _scores(trial: Trial, sweep: Sweep) -> str:
    return ", ".join(f"{objective_name(o)} {scored(score(trial, o), sweep)}" for o in sweep.objectives)


def _clean_and_worst(trial: Trial, name: str) -> tuple[str, str]:
    return percent(figure(trial, f"clean/{name}")), percent(figure(trial, f"worst/{name}"))


def _shares(trial: Trial, name: str) -> tuple[float, float]:
    clean, worst = (figure(trial, f"{which}/{name}") or 0.0 for which in ("clean", "worst"))
    return min(max(clean, 0.0), 1.0), min(max(worst, 0.0), 1.0)
