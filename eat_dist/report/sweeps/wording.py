"""Names and numbers of a sweep in words."""

from __future__ import annotations

from eat_dist.report.sweeps.reading import Objective, Sweep, Trial
from eat_dist.report.sweeps.space import written
from eat_dist.report.wording import MISSING, number, radius

HARMONIC = "The harmonic mean is that of clean R@1 and attacked NMI. "
STATUS = {
    "FINISHED": "finished",
    "PRUNED": "pruned",
    "FAILED": "failed",
    "RUNNING": "running",
    "INTERRUPTED": "interrupted",
}
_LONGEST_REASON = 300


def objective_name(objective: Objective) -> str:
    """``attacked_nmi`` → ``attacked NMI``, ``clean_r_at_1`` → ``clean R@1``."""
    if objective.name == "harmonic":
        return "harmonic mean"
    words = objective.name.replace("/", " ").replace("r_at_1", "R@1").replace("_", " ").split()
    return " ".join("NMI" if word == "nmi" else word for word in words)


def scored(value: float | None, sweep: Sweep) -> str:
    """A score: in % where all scores are shares, else with four digits."""
    if value is None:
        return MISSING
    return f"{number(100 * value)} %" if in_percent(sweep) else written(value)


def difference(value: float, sweep: Sweep) -> str:
    """How far two scores are apart: ``1.4 points``, of a percentage, or the number."""
    return f"{number(100 * value)} points" if in_percent(sweep) else written(value)


def in_percent(sweep: Sweep) -> bool:
    """Whether every value of every objective is a share in [0, 1]."""
    values = [v for trial in sweep.trials for result in trial.results for v in result.objectives.values()]
    return all(0 <= value <= 1 for value in values if value is not None)


def axis_label(objective: Objective, sweep: Sweep) -> str:
    """The objective with its unit and where up is."""
    return f"{objective_name(objective)}{', %' if in_percent(sweep) else ''}"


def counts(sweep: Sweep) -> str:
    """``18 finished, 9 pruned, 3 failed``; what did not happen is left out."""
    parts = [(len(sweep.with_status(status)), word) for status, word in STATUS.items()]  # type: ignore[arg-type]
    return ", ".join(f"{count} {word}" for count, word in parts if count)


def settings_text(trial: Trial, sweep: Sweep) -> str:
    """``defense.transfer_strength = 0.41, attack.epsilon = 8/255``, as the space writes them."""
    settings = {p.key: p.label(trial.settings[p.key]) for p in sweep.parameters if p.key in trial.settings}
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "no setting varied"


def reason(trial: Trial) -> str:
    """Why a trial failed, on one line."""
    lines = (trial.error or "").split("\n")
    text = " ".join(line.strip() for line in lines if line.strip()) or "no reason on record"
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"


def told_epsilon(sweep: Sweep) -> str:
    """The radius of the attacks that measure every trial, ``8/255`` where it is one in L∞."""
    attack = sweep.about.base_config.get("attack")
    norm = str(attack.get("norm", "linf")) if isinstance(attack, dict) else "linf"
    epsilon = sweep.about.evaluation_epsilon
    return MISSING if epsilon is None else radius(epsilon, norm)
