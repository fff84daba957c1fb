"""Robustness statistics: what one member measures each iteration, and what the coordinator makes of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eat_dist.config import RunConfig
from eat_dist.robustness.transfer import TRANSFER_RULES, FloatArray, TransferPlan, rotating_plan


@dataclass(frozen=True)
class Received:
    """What a member measured on one peer's batch.

    Attributes:
        sender: The peer, j.
        loss: a_ij, the member's loss on it.
        fooled_rate: r_ij, share of the images whose nearest proxy is not their class's.
    """

    sender: int
    loss: float
    fooled_rate: float


@dataclass(frozen=True)
class ClassCounts:
    """Images of a batch by class; sparse, so its size does not grow with C.

    Attributes:
        classes: [U] int64, the classes that occur, ascending.
        fooled: [U] int64, images of each whose nearest proxy is another class's.
        seen: [U] int64, images of each.
    """

    classes: npt.NDArray[np.int64]
    fooled: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int64]

    @classmethod
    def of(cls, is_fooled: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]) -> ClassCounts:
        """Count a batch: is_fooled [B], labels [B]."""
        classes, position = np.unique(labels, return_inverse=True)
        wrong = np.bincount(position[is_fooled], minlength=len(classes))
        return cls(classes, wrong.astype(np.int64), np.bincount(position).astype(np.int64))


@dataclass(frozen=True)
class MemberStatistics:
    """One member's measurements of one iteration; below 10 kB, whatever the number of classes.

    None means: not measured by this defense (a natural member has no adversarial images). Rates lie in [0, 1].

    Attributes:
        member: Rank i.
        iteration: t.
        batch_size: B.
        clean_loss: Loss on the clean batch.
        adversarial_loss: Loss on the own adversarial batch.
        fooled_rate: On the own adversarial batch.
        displacement: Mean distance ‖f(x̃) − f(x)‖ in [0, 2].
        gradient_norm: L2 norm of all gradients at the previous update (this one's is not known before the backward
            pass that hides the hand-over).
        received: One entry a received batch.
        by_class: Counts of the own adversarial batch, for its classes alone.
        coordinator_wait: Seconds the previous iteration stood still for the merged statistics.
        exchange_wait: Seconds it stood still for peers' batches.
        data_wait: Seconds it stood still for its own batch.
        iteration_time: Seconds it took in all.
    """

    member: int
    iteration: int
    batch_size: int
    clean_loss: float | None = None
    adversarial_loss: float | None = None
    fooled_rate: float | None = None
    displacement: float | None = None
    gradient_norm: float | None = None
    received: tuple[Received, ...] = ()
    by_class: ClassCounts | None = None
    coordinator_wait: float = 0.0
    exchange_wait: float = 0.0
    data_wait: float = 0.0
    iteration_time: float = 0.0

    def losses(self) -> dict[str, float]:
        """Every loss that was measured, by name."""
        own = {"clean": self.clean_loss, "adversarial": self.adversarial_loss}
        peers = {f"transferred from member {entry.sender}": entry.loss for entry in self.received}
        return {name: value for name, value in (own | peers).items() if value is not None}


@dataclass(frozen=True)
class Policy:
    """What the coordinator decides by."""

    members: int
    num_classes: int
    rule: str
    peers: int
    temperature: float
    momentum: float

    @classmethod
    def of(cls, config: RunConfig, num_classes: int) -> Policy:
        """The policy of a run; defenses without transfer have the rule ``none``."""
        defense = config.defense
        return cls(
            members=config.ensemble.members,
            num_classes=num_classes,
            rule=defense.transfer_rule if defense.name == "eat" else "none",
            peers=defense.peers,
            temperature=defense.temperature,
            momentum=defense.momentum,
        )

    def plan(self, iteration: int) -> TransferPlan:
        """The traffic of an iteration."""
        peers = self.peers if TRANSFER_RULES[self.rule].exchanges else 0
        return rotating_plan(iteration, members=self.members, peers=peers)


@dataclass(frozen=True)
class EnsembleStatistics:
    """What every member gets back: the merged view after an iteration, and orders for the next.

    Attributes:
        iteration: The iteration that ``plan`` is for; the statistics are of the one before it.
        members: All members' measurements, by rank; empty before the first iteration.
        transfer_matrix: [M, M] moving average of r_ij (row i: how vulnerable member i is, column j: how transferable
            j's attacks are; the diagonal holds the own fooled rates), NaN where nothing was measured yet.
        class_risk: [C] moving average of the ensemble's fooled rate by class, NaN where not measured.
        weights: For each member the weights w_ij of the batches it has just received, summing to one.
        plan: Who receives from whom next.
    """

    iteration: int
    members: tuple[MemberStatistics, ...]
    transfer_matrix: FloatArray
    class_risk: FloatArray
    weights: tuple[FloatArray, ...]
    plan: TransferPlan

    @classmethod
    def initial(cls, policy: Policy, iteration: int = 0) -> EnsembleStatistics:
        """Before anything was measured."""
        return cls(
            iteration=iteration,
            members=(),
            transfer_matrix=np.full((policy.members, policy.members), np.nan, np.float32),
            class_risk=np.full(policy.num_classes, np.nan, np.float32),
            weights=tuple(np.zeros(0, np.float32) for _ in range(policy.members)),
            plan=policy.plan(iteration),
        )

    @property
    def shared_vulnerability(self) -> float | None:
        """Mean of the transfer matrix off the diagonal, in [0, 1]: what diversity must lower. None if unmeasured."""
        off_diagonal = self.transfer_matrix[~np.eye(len(self.transfer_matrix), dtype=bool)]
        measured = off_diagonal[~np.isnan(off_diagonal)]
        return float(measured.mean()) if len(measured) else None

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps: the moving averages, not the single measurements."""
        content = asdict(replace(self, members=()))
        content["transfer_matrix"] = _without_nan(self.transfer_matrix)
        content["class_risk"] = _without_nan(self.class_risk)
        content["weights"] = [weights.tolist() for weights in self.weights]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> EnsembleStatistics:
        """The inverse of :meth:`to_json`."""
        return cls(
            iteration=content["iteration"],
            members=(),
            transfer_matrix=np.array(content["transfer_matrix"], np.float32),
            class_risk=np.array(content["class_risk"], np.float32),
            weights=tuple(np.array(weights, np.float32) for weights in content["weights"]),
            plan=TransferPlan(tuple(tuple(sources) for sources in content["plan"]["sources"])),
        )


def merge(previous: EnsembleStatistics, gathered: Sequence[MemberStatistics], *, policy: Policy) -> EnsembleStatistics:
    """The coordinator's work of one iteration: a pure function, so any process may do it with the same result.

    Args:
        previous: What the last merge returned.
        gathered: One entry a member, in any order, all of the iteration ``previous.iteration``.
        policy: Rule and momentum.
    """
    members = tuple(sorted(gathered, key=lambda entry: entry.member))
    assert [entry.member for entry in members] == list(range(policy.members)), "one entry a member"
    iterations = {entry.iteration for entry in members}
    assert iterations == {previous.iteration}, f"expected iteration {previous.iteration}, got {iterations}"

    matrix = previous.transfer_matrix.copy()
    for entry in members:
        if entry.fooled_rate is not None:
            _average(matrix, (entry.member, entry.member), entry.fooled_rate, policy.momentum)
        for peer in entry.received:
            _average(matrix, (entry.member, peer.sender), peer.fooled_rate, policy.momentum)

    rule = TRANSFER_RULES[policy.rule]
    losses = [np.array([peer.loss for peer in entry.received], np.float32) for entry in members]
    return EnsembleStatistics(
        iteration=previous.iteration + 1,
        members=tuple(replace(entry, by_class=None) for entry in members),  # merged into class_risk
        transfer_matrix=matrix,
        class_risk=_merged_risk(previous.class_risk, members, policy.momentum),
        weights=tuple(rule.weights(entry, policy.temperature) for entry in losses),
        plan=policy.plan(previous.iteration + 1),
    )


def fooled(similarities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B] bool: the nearest proxy is not the label's. Similarities [B, C], labels [B]."""
    return similarities.argmax(dim=1) != labels


def _merged_risk(risk: FloatArray, members: Sequence[MemberStatistics], momentum: float) -> FloatArray:
    wrong = np.zeros(len(risk), np.int64)
    seen = np.zeros(len(risk), np.int64)
    for entry in members:
        if entry.by_class is not None:
            wrong[entry.by_class.classes] += entry.by_class.fooled
            seen[entry.by_class.classes] += entry.by_class.seen
    merged = risk.copy()
    for label in np.flatnonzero(seen):
        _average(merged, label, wrong[label] / seen[label], momentum)
    return merged


def _average(array: FloatArray, position: Any, value: float, momentum: float) -> None:
    """Exponential moving average in place; the first measurement is taken as it is."""
    old = array[position]
    array[position] = value if np.isnan(old) else momentum * old + (1 - momentum) * value


def _without_nan(array: FloatArray) -> Any:
    """Nested lists with None for NaN, which JSON does not have."""
    if array.ndim > 1:
        return [_without_nan(row) for row in array]
    return [None if np.isnan(value) else float(value) for value in array]
