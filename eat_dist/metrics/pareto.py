"""The Pareto front: what nothing else beats in everything."""

from __future__ import annotations

from collections.abc import Sequence


def not_dominated(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Which points are on the Pareto front.

    Args:
        points: [N][K].
        directions: ``max`` or ``min`` for each of the K.

    Returns:
        Ascending indices. Equal points are all on it, or none is.
    """
    signs = [1 if direction == "max" else -1 for direction in directions]
    up = [[sign * value for sign, value in zip(signs, point, strict=True)] for point in points]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))

    return [index for index, point in enumerate(up) if not any(beats(other, point) for other in up)]
