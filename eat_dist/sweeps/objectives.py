"""What trials are compared by: numbers out of an evaluation, higher is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from eat_dist.metrics.pareto import not_dominated

Objective = Literal["attacked_nmi", "harmonic", "pareto"]


def names_of(objective: Objective) -> tuple[str, ...]:
    """The objectives' names, one or two."""
    return ("clean_r_at_1", "attacked_nmi") if objective == "pareto" else (objective,)


def values_of(objective: Objective, figures: Mapping[str, float]) -> dict[str, float]:
    """Name → value.

    - ``attacked_nmi``: NMI of the clustering under the attack that is worst for it;
    - ``harmonic``: 2ab/(a + b) of clean R@1 and attacked NMI: no trial is good that is bad at one of them;
    - ``pareto``: both, clean R@1 and attacked NMI, by themselves.
    """
    clean, attacked = figures["clean/r_at_1"], figures["worst/nmi"]
    if objective == "harmonic":
        return {"harmonic": 2 * clean * attacked / (clean + attacked) if clean + attacked > 0 else 0.0}
    return {name: {"clean_r_at_1": clean, "attacked_nmi": attacked}[name] for name in names_of(objective)}


def front(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Who is not dominated: nobody else is at least as good in everything and better in something.

    Args:
        values: Id → values, higher is better.

    Returns:
        Ids by falling first value.
    """
    names, points = list(values), list(values.values())
    directions = ["max"] * len(points[0]) if points else []
    kept = [names[index] for index in not_dominated(points, directions)]
    return sorted(kept, key=lambda name: tuple(-value for value in values[name]))
