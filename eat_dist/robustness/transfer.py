"""Who sends adversarial batches to whom, and how much each received one counts (docs/method.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eat_dist.registry import Registry

FloatArray = npt.NDArray[np.float32]

# A class that is never fooled keeps this share of the mean weight, so that no class drops out of the loss.
_SMALLEST_RISK = 0.05


@dataclass(frozen=True)
class TransferPlan:
    """One iteration's traffic.

    Attributes:
        sources: For each member the peers whose batches it receives, in order.
    """

    sources: tuple[tuple[int, ...], ...]

    @classmethod
    def from_all(cls, members: int) -> TransferPlan:
        """Everybody receives from everybody else, by rank."""
        return cls(tuple(tuple(peer for peer in range(members) if peer != i) for i in range(members)))

    @classmethod
    def from_one(cls, sender: int, members: int) -> TransferPlan:
        """Everybody else receives from one."""
        return cls(tuple(() if i == sender else (sender,) for i in range(members)))

    def targets(self, member: int) -> tuple[int, ...]:
        """The peers that receive this member's batch, ascending."""
        return tuple(peer for peer, sources in enumerate(self.sources) if member in sources)


def rotating_plan(iteration: int, *, members: int, peers: int) -> TransferPlan:
    """Member i receives from (i + 1 + (t + n) mod (M − 1)) mod M for n = 0 … k − 1.

    Every member sends as many batches as it receives, and over M − 1 iterations every pair meets.

    Args:
        iteration: t.
        members: M; with one member nobody receives anything.
        peers: k, at most M − 1.
    """
    if members == 1 or peers == 0:
        return TransferPlan(((),) * members)
    assert peers < members, f"a member has {members - 1} peers; got peers = {peers}"
    shifts = [1 + (iteration + n) % (members - 1) for n in range(peers)]
    return TransferPlan(tuple(tuple((i + shift) % members for shift in shifts) for i in range(members)))


@dataclass(frozen=True)
class TransferRule:
    """What a member does with its peers' attacks.

    Attributes:
        transfers: Peers' finished adversarial batches enter the member's loss, weighted by ``weights``.
        hands_over: A batch is attacked first by its owner, then by the peer that trains on it (relay).
        joint: Every member's batch is attacked through the whole ensemble.
        by_class: Besides, each image counts by how often the ensemble is fooled on its class.
        weights: Losses [k] of the received batches and τ → weights [k] that sum to one.
    """

    transfers: bool = False
    hands_over: bool = False
    joint: bool = False
    by_class: bool = False
    weights: Callable[[FloatArray, float], FloatArray] = lambda losses, temperature: _uniform(losses)

    @property
    def exchanges(self) -> bool:
        """Whether batches travel between members."""
        return self.transfers or self.hands_over


def _uniform(losses: FloatArray) -> FloatArray:
    return np.full(len(losses), 1 / max(len(losses), 1), np.float32)


def _softmax(losses: FloatArray, temperature: float) -> FloatArray:
    if len(losses) == 0:
        return _uniform(losses)
    powers = np.exp((losses - losses.max()) / np.float32(temperature))
    shares: FloatArray = (powers / powers.sum()).astype(np.float32)
    return shares


TRANSFER_RULES: Registry[TransferRule] = Registry("transfer rule")
TRANSFER_RULES.register("none")(TransferRule())
TRANSFER_RULES.register("uniform")(TransferRule(transfers=True))
TRANSFER_RULES.register("hardest")(TransferRule(transfers=True, weights=_softmax))
TRANSFER_RULES.register("class_risk")(TransferRule(transfers=True, by_class=True))
TRANSFER_RULES.register("relay")(TransferRule(hands_over=True))
TRANSFER_RULES.register("joint")(TransferRule(joint=True))


def class_weights(class_risk: FloatArray, labels: npt.NDArray[np.int64]) -> FloatArray:
    """One weight an image, in proportion to its class's risk, with mean one over the batch.

    Args:
        class_risk: [C] moving average of the ensemble's fooled rate, NaN where a class was never measured (it then
            counts as the mean of the measured ones).
        labels: [B].
    """
    measured = class_risk[~np.isnan(class_risk)]
    if len(measured) == 0:
        return np.ones(len(labels), np.float32)
    risk = np.nan_to_num(class_risk, nan=float(measured.mean()))[labels]
    mean = float(risk.mean())
    if mean == 0:
        return np.ones(len(labels), np.float32)
    raised = np.maximum(risk, _SMALLEST_RISK * mean)
    normalised: FloatArray = (raised / raised.mean()).astype(np.float32)
    return normalised
