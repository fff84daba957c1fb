"""How a trial is drawn, the same in every drawing: by how it ended, and by its score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eat_dist.report.content import Key
from eat_dist.report.drawing import MUTED, PALETTE, SCALE, Look, key
from eat_dist.report.sweeps.ranking import best, finished, front, score
from eat_dist.report.sweeps.reading import Sweep, Trial
from eat_dist.report.sweeps.wording import objective_name, scored

_BEST_SCALE = len(SCALE) - 1


class Stroke(NamedTuple):
    """A line and its end: ``rank`` puts what matters above the rest."""

    look: Look
    width: float
    alpha: float
    rank: int


BEST, FRONT = Look(SCALE[_BEST_SCALE], "-", "*"), Look(PALETTE[1], "-", "D")
STOPPED = Look(MUTED, ":", "x")
OTHER = Look(PALETTE[0], "-", "o")


def strokes(sweep: Sweep) -> dict[str, Stroke]:
    """How each trial with a result is drawn, by its id.

    A trial's colour is its score among the finished ones, in as many steps as the scale has; one that was stopped is
    thin and dotted. With two objectives the colour says whether it is on the front.
    """
    winner, chosen = best(sweep), {trial.id for trial in front(sweep)}
    made = {}
    for trial in sweep.trials:
        if not trial.results:
            continue
        if trial.status != "FINISHED":
            made[trial.id] = Stroke(STOPPED, 0.8, 0.75, 0)
        elif winner is not None and trial.id == winner.id:
            made[trial.id] = Stroke(BEST, 2.6, 1.0, 20)
        elif len(sweep.objectives) > 1:
            on_front = trial.id in chosen
            made[trial.id] = Stroke(FRONT, 2.0, 1.0, 20) if on_front else Stroke(OTHER, 1.1, 0.65, 1)
        else:
            step = _step(sweep, trial)
            made[trial.id] = Stroke(Look(SCALE[step], "-", "o"), 1.3, 0.85, 1 + step)
    return made


def legend(sweep: Sweep) -> list[tuple[str, Look]]:
    """What the strokes mean; only what is there."""
    entries: list[tuple[str, Look]] = []
    ended = finished(sweep)
    objective = sweep.objectives[0]
    if len(sweep.objectives) > 1:
        entries += [("on the front", FRONT)] if ended else []
        entries += [("finished", OTHER)] if len(front(sweep)) < len(ended) else []
    elif (winner := best(sweep)) is not None:
        values = sorted(((score(trial, objective) or 0.0) for trial in ended), reverse=objective.direction == "max")
        entries += [(f"best: trial {winner.number}, {objective_name(objective)} {scored(values[0], sweep)}", BEST)]
        if len(values) > 1:
            entries += [(f"finished, about {scored(_middle(values), sweep)}", Look(SCALE[_BEST_SCALE // 2], "-", "o"))]
            entries += [(f"finished, {scored(values[-1], sweep)}", Look(SCALE[0], "-", "o"))]
    if any(trial.results and trial.status != "FINISHED" for trial in sweep.trials):
        entries += [("pruned or not finished", STOPPED)]
    return entries


def keys(entries: Sequence[tuple[str, Look]], *, place: str, line: bool = True) -> list[Key]:
    """The legend as the page has it."""
    return [key(label, look, place=f"{place}-{index}", line=line) for index, (label, look) in enumerate(entries)]


def _step(sweep: Sweep, trial: Trial) -> int:
    """The step of the scale, the better the higher."""
    objective = sweep.objectives[0]
    values = [score(other, objective) or 0.0 for other in finished(sweep)]
    value = score(trial, objective)
    if value is None or not values or max(values) == min(values):
        return _BEST_SCALE // 2
    share = (value - min(values)) / (max(values) - min(values))
    share = share if objective.direction == "max" else 1 - share
    return round(min(max(share, 0.0), 1.0) * _BEST_SCALE)


def _middle(values: Sequence[float]) -> float:
    return (values[0] + values[-1]) / 2
