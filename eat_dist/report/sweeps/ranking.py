"""Which trial is best, in which order they come, and which of them are on the front."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from eat_dist.metrics.pareto import not_dominated
from eat_dist.report.sweeps.reading import Objective, Result, Sweep, Trial

_ORDER = ("FINISHED", "PRUNED", "INTERRUPTED", "RUNNING", "FAILED")


def final(trial: Trial) -> Result | None:
    """The last result: of the model that the trial leaves. (The best of its epochs would be chosen by luck.)"""
    return max(trial.results, key=lambda result: result.epoch, default=None)


def score(trial: Trial, objective: Objective, *, epoch: int | None = None) -> float | None:
    """A trial's last value of an objective, or that after an epoch; None where it was not measured."""
    result = final(trial) if epoch is None else next((one for one in trial.results if one.epoch == epoch), None)
    return None if result is None else result.objectives.get(objective.name)


def figure(trial: Trial, name: str) -> float | None:
    """A trial's last value of a figure, ``clean/r_at_1`` or the like."""
    result = final(trial)
    return None if result is None else result.figures.get(name)


def finished(sweep: Sweep) -> list[Trial]:
    """The trials that ran all their epochs and have a value of every objective: only they are compared."""
    return [trial for trial in sweep.with_status("FINISHED") if _scored(trial, sweep.objectives)]


def best(sweep: Sweep) -> Trial | None:
    """The finished trial with the best last value (of equals the first); None without one, or with two objectives."""
    if len(sweep.objectives) > 1:
        return None
    return next(iter(_best_first(finished(sweep), sweep.objectives[0])), None)


def gain(sweep: Sweep) -> float | None:
    """By how much the best trial is ahead of the median finished one, ≥ 0; None with fewer than two."""
    winner, others = best(sweep), finished(sweep)
    if winner is None or len(others) < 2:
        return None
    objective = sweep.objectives[0]
    return abs((score(winner, objective) or 0.0) - statistics.median(_values(others, objective)))


def front(sweep: Sweep) -> list[Trial]:
    """The finished trials of which no other is as good in both objectives and better in one, by the first."""
    if len(sweep.objectives) < 2:
        return []
    trials = finished(sweep)
    points = [[score(trial, objective) or 0.0 for objective in sweep.objectives] for trial in trials]
    best_of_both = not_dominated(points, [objective.direction for objective in sweep.objectives])
    return _best_first([trials[index] for index in best_of_both], sweep.objectives[0])


def ordered(sweep: Sweep) -> list[Trial]:
    """All trials: finished before pruned before those that are under way before failed; each best first.

    With two objectives those on the front come first.
    """
    chosen = {trial.id for trial in front(sweep)}
    by_score = _best_first([trial for trial in sweep.trials if _has(trial, sweep.objectives[0])], sweep.objectives[0])
    everyone = [*by_score, *(trial for trial in sweep.trials if not _has(trial, sweep.objectives[0]))]
    return sorted(everyone, key=lambda trial: (trial.id not in chosen, _ORDER.index(trial.status)))


def _best_first(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    sign = -1 if objective.direction == "max" else 1
    return sorted(trials, key=lambda trial: (sign * (score(trial, objective) or 0.0), trial.number))


def _has(trial: Trial, objective: Objective) -> bool:
    return score(trial, objective) is not None


def _scored(trial: Trial, objectives: Sequence[Objective]) -> bool:
    return all(_has(trial, objective) for objective in objectives)


def _values(trials: Sequence[Trial], objective: Objective) -> list[float]:
    return [value for trial in trials if (value := score(trial, objective)) is not None]
