"""The coordinator's answer to a member: what an iteration changed.

Merged statistics grow with the square of the members (the transfer matrix), and as many members get them. So an
answer holds only the entries that an iteration can have changed, as flat bytes; the member, who has the rest from the
iteration before, puts them in. No number is computed a second time: the result is the coordinator's, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from eat_dist.robustness.statistics import EnsembleStatistics, MemberStatistics
from eat_dist.robustness.transfer import FloatArray, TransferPlan


@dataclass(frozen=True)
class Answer:
    """What an iteration changed.

    Attributes:
        iteration: The iteration that ``sources`` is for.
        sources: Of its plan.
        matrix: float32, by member: its own entry of the transfer matrix, then those of the peers it received from.
        counts: Weights of each member.
        weights: float32, all members' weights one after the other.
        classes: int32, the classes whose risk changed.
        risks: float32, theirs.
        members: All members' measurements for member 0, who records them, and for everybody if a loss is not finite;
            else empty.
    """

    iteration: int
    sources: tuple[tuple[int, ...], ...]
    matrix: bytes
    counts: tuple[int, ...]
    weights: bytes
    classes: bytes
    risks: bytes
    members: tuple[MemberStatistics, ...] = ()

    @classmethod
    def of(cls, previous: EnsembleStatistics, merged: EnsembleStatistics) -> Answer:
        """From what the members have to what they shall have; with all measurements."""
        rows, columns = _changeable(previous.plan)
        # Compared as bits, since NaN differs from itself.
        changed = merged.class_risk.view(np.uint32) != previous.class_risk.view(np.uint32)
        classes = np.flatnonzero(changed).astype(np.int32)
        return cls(
            iteration=merged.iteration,
            sources=merged.plan.sources,
            matrix=merged.transfer_matrix[rows, columns].tobytes(),
            counts=tuple(len(weights) for weights in merged.weights),
            weights=np.concatenate(merged.weights).tobytes(),
            classes=classes.tobytes(),
            risks=merged.class_risk[classes].tobytes(),
            members=merged.members,
        )

    def to(self, rank: int) -> Answer:
        """Without what this member has no use for."""
        losses = (loss for entry in self.members for loss in entry.losses().values())
        return self if rank == 0 or not all(map(math.isfinite, losses)) else replace(self, members=())

    def applied_to(self, previous: EnsembleStatistics) -> EnsembleStatistics:
        """The merged statistics, of what the member had before."""
        matrix, risk = previous.transfer_matrix.copy(), previous.class_risk.copy()
        matrix[_changeable(previous.plan)] = np.frombuffer(self.matrix, np.float32)
        risk[np.frombuffer(self.classes, np.int32)] = np.frombuffer(self.risks, np.float32)
        return EnsembleStatistics(
            iteration=self.iteration,
            members=self.members,
            transfer_matrix=matrix,
            class_risk=risk,
            weights=tuple(_split(np.frombuffer(self.weights, np.float32), self.counts)),
            plan=TransferPlan(self.sources),
        )


def _changeable(plan: TransferPlan) -> tuple[list[int], list[int]]:
    """Rows and columns of the transfer matrix that an iteration with this plan measures."""
    pairs = [(member, other) for member, sources in enumerate(plan.sources) for other in (member, *sources)]
    return [row for row, _ in pairs], [column for _, column in pairs]


def _split(array: FloatArray, counts: tuple[int, ...]) -> Iterator[FloatArray]:
    begin = 0
    for count in counts:
        yield array[begin : begin + count]
        begin += count
