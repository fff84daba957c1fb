"""What the mixup defenses share: pairs of images of a batch, their share, and the loss with two labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from eat_dist.batch import Batch
from eat_dist.defenses.table import Learner, Measured, StepResult, Waits, await_merged, statistics_of
from eat_dist.losses import MetricLoss
from eat_dist.replicas import ALONE, Replicas
from eat_dist.robustness.statistics import EnsembleStatistics


@dataclass(frozen=True)
class Mix:
    """λ·(image i) + (1 − λ)·(image j of i), for every image i of a batch.

    One λ and one permutation of the batch, as in the official codes of mixup and manifold mixup.

    Attributes:
        share: λ in [0, 1].
        labels: [B] of the images i.
        partners: [B] int64, the permutation i → j.
    """

    share: float
    labels: torch.Tensor
    partners: torch.Tensor

    @classmethod
    def draw(cls, numbers: np.random.Generator, labels: torch.Tensor, *, alpha: float) -> Mix:
        """λ ~ Beta(α, α), a uniform permutation of the batch with ``labels`` [B]."""
        share = float(numbers.beta(alpha, alpha))
        return cls(share, labels, torch.from_numpy(numbers.permutation(len(labels))).to(labels.device))

    def of(self, values: torch.Tensor, replicas: Replicas = ALONE) -> torch.Tensor:
        """Mix the batch's images or features [B, …]; of several replicas each mixes its own rows [B/R, …].

        A partner's values come without gradient where they are another replica's.
        """
        partners = replicas.gather(values)[self.partners[replicas.rows]]
        return self.share * values + (1 - self.share) * partners

    def loss(self, loss: MetricLoss, embeddings: torch.Tensor) -> torch.Tensor:
        """λ·L(f(mixed), y_i) + (1 − λ)·L(f(mixed), y_j), of the embeddings [B, D] of mixed images → scalar."""
        own, partners = loss(embeddings, self.labels), loss(embeddings, self.labels[self.partners])
        return self.share * own + (1 - self.share) * partners

    def observe(self, loss: MetricLoss, embeddings: torch.Tensor) -> None:
        """Show the loss where mixed images lie, each as one of the class that it has more of."""
        loss.observe(embeddings.detach(), self.labels if self.share >= 0.5 else self.labels[self.partners])


def mixed_step(
    learner: Learner, batch: Batch, ensemble: EnsembleStatistics, embeddings: torch.Tensor, mix: Mix
) -> StepResult:
    """The rest of a step that trains on mixed images alone: loss, statistics, backward pass. One pass in all.

    The clean loss on record is that with two labels: nothing else is measured.
    """
    mix.observe(learner.loss, embeddings)
    loss = mix.loss(learner.loss, embeddings)
    statistics = statistics_of(learner, batch, ensemble, Measured(clean_loss=loss), [])
    pending = learner.exchange.submit(statistics, ensemble)
    loss.backward()  # type: ignore[no-untyped-call]
    waits = Waits()
    return StepResult(await_merged(pending, waits), passes=1, waits=waits)
