"""The part that adversarial defenses share: one forward pass over clean and adversarial images, and its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eat_dist.batch import Batch
from eat_dist.defenses.table import Learner, Measured


@dataclass(frozen=True)
class OwnLoss:
    """(1 − β)·PAL(clean) + β·PAL(adversarial), with what was measured on the way.

    Attributes:
        total: Scalar, with gradient.
        measured: For the statistics.
        passes: Forward-backward passes it costs: one a batch that takes part.
    """

    total: torch.Tensor
    measured: Measured
    passes: int


def own_loss(
    learner: Learner, batch: Batch, adversarial: torch.Tensor, labels: torch.Tensor, *, paired: bool = True
) -> OwnLoss:
    """The loss on a member's own clean and adversarial images, in one forward pass.

    Clean and adversarial images share the pass, hence BatchNorm's statistics, as they share them at inference. With
    β = 1 the clean images take no part, and clean loss and displacement are not measured.

    Args:
        learner: The member.
        batch: B clean images.
        adversarial: [B, C, H, W].
        labels: [B], of the adversarial images.
        paired: Whether ``adversarial`` are the batch's own images (not a batch handed over by a peer), so that
            displacement means something.
    """
    beta = learner.config.adversarial_share
    with_clean = beta < 1
    images = torch.cat([batch.images, adversarial]) if with_clean else adversarial
    embeddings = learner.model(images)
    attacked = embeddings[-len(labels) :]
    own, own_labels = (embeddings[: len(batch.labels)], batch.labels) if with_clean else (attacked, labels)
    learner.loss.observe(own.detach(), own_labels)  # before similarities are asked for, so that they know these classes
    adversarial_loss = learner.loss(attacked, labels)
    similarities = learner.loss.similarities(attacked)
    if not with_clean:
        measured = Measured(adversarial_loss=adversarial_loss, similarities=similarities, labels=labels)
        return OwnLoss(adversarial_loss, measured, passes=1)
    clean = embeddings[: len(batch.labels)]
    clean_loss = learner.loss(clean, batch.labels)
    displacement = (attacked - clean).detach().norm(dim=1).mean() if paired else None
    measured = Measured(clean_loss, adversarial_loss, similarities, labels, displacement)
    return OwnLoss((1 - beta) * clean_loss + beta * adversarial_loss, measured, passes=2)
