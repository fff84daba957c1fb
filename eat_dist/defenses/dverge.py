"""DVERGE (Yang et al., NeurIPS 2020, section 3), adapted to metric learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from eat_dist.attacks import Ball, MomentumStep, WhiteBox, ascend, frozen, whole_batch
from eat_dist.batch import Batch
from eat_dist.defenses.adversarial import on_received
from eat_dist.defenses.table import (
    Learner,
    Measured,
    StepResult,
    Waits,
    await_batches,
    await_merged,
    register,
    statistics_of,
)
from eat_dist.models import Embedder
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.robustness.transfer import TransferPlan


@register("dverge", distil_epsilon=None, distil_steps=None)
def dverge(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L_i = Σ_{j≠i} PAL(f_i(z_j), y_s): each member learns to see through what fools the others' features.

    z_j = argmin_z ‖g_j(z) − g_j(x)‖² over the ball around the source image x_s, g_j the backbone of member j: to
    member j it looks like x, to the eye like x_s. Source x_s and target x are images of member j's own batch, paired by
    a uniform permutation. The minimiser is the official code's: it starts at x_s and goes ``distil_steps`` steps of
    ε/steps along the sign of the accumulated gradient (momentum 1, each gradient scaled to L1 length 1), the last
    iterate is kept. Norm, ε and steps are the training attack's unless ``distil_epsilon`` and ``distil_steps`` say
    otherwise. (Official: ε = 0.07 and 10 steps, beside attacks of ε = 0.03 on CIFAR-10, so about twice as far; the step
    is ε/steps there, too.)

    Deviations: PAL instead of the cross-entropy. The features are the backbone's last feature maps, after their ReLU;
    the official code draws one of the network's layers every epoch and takes it before the ReLU. There all members
    distil the same pairs and train from pretrained networks; here each member distils its own batch, from the first
    iteration on. Distillation is in evaluation mode, like every attack here.

    On record are loss and fooled rate on each received batch, so the transfer matrix is that of distilled images; and
    the clean loss, in evaluation mode, from the same forward pass as g_j(x).

    Passes: the steps, a third for g_j(x), and M − 1 of the update.
    """
    waits, members = Waits(), learner.exchange.size
    own = _distilled(learner, batch)
    message = {"images": own.images, "labels": batch.labels}
    arrived = await_batches(learner.exchange.send(TransferPlan.from_all(members), message), waits)
    learner.loss.observe(own.clean_embeddings, batch.labels)
    with torch.no_grad():
        measured = Measured(clean_loss=learner.loss(own.clean_embeddings, batch.labels))
    peers = [on_received(learner, sender, tensors) for sender, tensors in arrived]
    statistics = statistics_of(learner, batch, ensemble, measured, [peer.measured for peer in peers])
    pending = learner.exchange.submit(statistics, ensemble)
    torch.stack([peer.loss for peer in peers]).sum().backward()  # type: ignore[no-untyped-call]
    return StepResult(await_merged(pending, waits), own.steps + 1 / 3 + len(peers), waits)


@dataclass(frozen=True)
class _Distilled:
    """The own batch as sources, in its order, with other images' features; and what else is known of it.

    Attributes:
        images: z_j, [B, C, H, W].
        steps: Each of them a pass.
        clean_embeddings: [B, D] of the batch itself, in evaluation mode, detached.
    """

    images: torch.Tensor
    steps: int
    clean_embeddings: torch.Tensor


def _distilled(learner: Learner, batch: Batch) -> _Distilled:
    epsilon, steps = learner.options["distil_epsilon"], learner.options["distil_steps"]
    ball = learner.attack.ball if epsilon is None else Ball(learner.attack.ball.norm, epsilon)
    steps = learner.attack.num_steps if steps is None else steps
    embedder, replicas = learner.embedder, learner.replicas
    with frozen(embedder), torch.no_grad():
        maps = embedder.features(batch.images)
        clean_embeddings = replicas.gather(embedder.embed(maps))
    pairing = torch.from_numpy(whole_batch(learner.generator("distil")).permutation(len(batch.labels)))
    targets = replicas.gather(maps.flatten(1))[pairing[replicas.rows].to(maps.device)]
    result = ascend(
        WhiteBox(_Features(embedder), lambda features: -(features - targets).square().sum(dim=1)),
        batch.images,
        start=batch.images,
        step=MomentumStep(ball, ball.epsilon / steps),
        ball=ball,
        num_steps=steps,
    )
    return _Distilled(result.images, steps, clean_embeddings)


class _Features(nn.Module):
    """A backbone as an attack takes models: images → [B, F]."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embedder.features(images).flatten(1)
