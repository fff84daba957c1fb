"""Training, from the statistics of every iteration: means of stretches of iterations, over members and seeds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# Stretches a curve is drawn in: enough for its course, few enough that single batches do not hide it.
_STRETCHES = 60
Numbers = npt.NDArray[np.floating[Any]]


class Course(NamedTuple):
    """How one statistic went: x (iterations, the middle of a stretch), mean, and the range over members; [T] each."""

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def course(histories: list[pa.Table], column: str) -> Course | None:
    """Average a statistic over stretches of iterations.

    Args:
        histories: One table a run, as :func:`eat_dist.history.read_history` gives them.
        column: ``clean_loss``, ``adversarial_loss``, ``fooled_rate`` or ``shared_vulnerability``.

    Returns:
        The mean of the means of members (of all runs) and their lowest and highest; None if it was never measured.
        Stretches without a measurement are left out.
    """
    iterations = max((int(np.max(_numbers(table, "iteration"), initial=-1)) + 1 for table in histories), default=0)
    if iterations == 0:
        return None
    stretches = min(_STRETCHES, iterations)
    rows = []
    for table in histories:
        stretch = (_numbers(table, "iteration") * stretches // iterations).astype(int)
        member, value = _numbers(table, "member"), _numbers(table, column)
        for rank in np.unique(member):
            mine = (member == rank) & np.isfinite(value)
            count = np.bincount(stretch[mine], minlength=stretches)
            total = np.bincount(stretch[mine], weights=value[mine], minlength=stretches)
            rows.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    means = np.stack(rows)
    known = np.isfinite(means).any(axis=0)
    if not known.any():
        return None
    means = means[:, known]
    middle = (np.arange(stretches) + 0.5) * iterations / stretches
    return Course(middle[known], np.nanmean(means, axis=0), np.nanmin(means, axis=0), np.nanmax(means, axis=0))


def _numbers(table: pa.Table, column: str) -> Numbers:
    """A column as float64, NaN where it was not measured."""
    return np.asarray(table[column].to_numpy(zero_copy_only=False), dtype=np.float64)
