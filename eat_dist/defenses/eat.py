"""Ensemble adversarial training: the step of docs/method.md (ours, after the abstract of arXiv 2501.01025).

L_i = (1 − β)·PAL(f_i(x), y) + β·PAL(f_i(x̃_i), y) + γ·Σ_j w_ij·PAL(f_i(x̃_j), y_j) + λ·D_i
"""

from __future__ import annotations

import torch
from torch import nn

from eat_dist.attacks import WhiteBox
from eat_dist.attacks.objectives import batch_loss
from eat_dist.batch import Batch
from eat_dist.defenses.adversarial import OwnLoss, PeerBatch, on_received, own_loss
from eat_dist.defenses.table import (
    Learner,
    MeasuredPeer,
    StepResult,
    Waits,
    await_batches,
    await_merged,
    register,
    statistics_of,
)
from eat_dist.robustness.diversity import wrong_class_alignment
from eat_dist.robustness.statistics import EnsembleStatistics, fooled
from eat_dist.robustness.transfer import TRANSFER_RULES, class_weights


@register("eat")
def eat(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """One iteration of one member; the transfer rule decides which of the three forms it takes.

    The coordinator's answer is awaited only after the own-loss backward pass, so its latency is hidden; the
    transferred loss, which needs the weights in that answer, comes last.
    """
    rule = TRANSFER_RULES[learner.config.transfer_rule]
    has_peers = bool(ensemble.plan.sources[learner.rank])
    if rule.hands_over and has_peers:
        return _relayed_step(learner, batch, ensemble)
    if rule.joint and learner.exchange.size > 1:
        adversarial, attack_passes = (
            _joint_attack(learner, batch),
            learner.attack.num_steps * learner.exchange.size,
        )
    else:
        adversarial, attack_passes = _own_attack(learner, batch), learner.attack.num_steps
    return _transferred_step(learner, batch, ensemble, adversarial, attack_passes)


def _transferred_step(
    learner: Learner,
    batch: Batch,
    ensemble: EnsembleStatistics,
    adversarial: torch.Tensor,
    attack_passes: int,
) -> StepResult:
    """Own loss plus the losses on the peers' finished adversarial batches."""
    waits = Waits()
    with_diversity = learner.config.diversity_weight > 0
    has_peers = bool(ensemble.plan.sources[learner.rank])
    if has_peers:  # on its way while the own forward pass runs
        images_under_way = learner.exchange.send(ensemble.plan, {"images": adversarial, "labels": batch.labels})
    own = own_loss(learner, batch, adversarial, batch.labels)
    peers: list[PeerBatch] = []
    if has_peers:
        similarities = own.measured.similarities
        assert similarities is not None
        seen_by_sender = (
            learner.exchange.send(ensemble.plan, {"similarities": similarities}) if with_diversity else None
        )
        arrived = await_batches(images_under_way, waits)
        senders = await_batches(seen_by_sender, waits) if seen_by_sender else []
        peers = [on_received(learner, sender, tensors) for sender, tensors in arrived]
    statistics = statistics_of(learner, batch, ensemble, own.measured, [peer.measured for peer in peers])
    pending = learner.exchange.submit(statistics, ensemble)
    own.total.backward()  # type: ignore[no-untyped-call]
    merged = await_merged(pending, waits)
    if peers:
        total = learner.config.transfer_strength * _transferred_loss(learner, merged, peers)
        if with_diversity:
            alignments = [
                wrong_class_alignment(peer.similarities, tensors["similarities"], peer.labels)
                for peer, (_, tensors) in zip(peers, senders, strict=True)
            ]
            total = total + learner.config.diversity_weight * torch.stack(alignments).mean()
        total.backward()  # type: ignore[no-untyped-call]
    return StepResult(merged, attack_passes + own.passes + len(peers), waits)


def _relayed_step(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """The first K₁ attack steps on the own batch, the remaining K − K₁ on the batch a peer hands over.

    The received images, attacked to the end with the own gradient, are this member's adversarial batch. The fooled
    rate at the hand-over fills the transfer matrix: it comes from the first own step's forward pass, so it is measured
    in evaluation mode and costs nothing. The clean loss is on the own batch; there is no pair, hence no displacement.
    """
    waits = Waits()
    attack, num_steps = learner.attack, learner.attack.num_steps
    first_steps = learner.config.relay_steps or num_steps // 2
    start = attack.start(batch.images, learner.generator("attack"))
    surface = WhiteBox(learner.model, batch_loss(learner.loss, batch.labels))
    begun = attack.advance(surface, batch.images, start, num_steps=first_steps).images
    message = {"clean": batch.images, "begun": begun, "labels": batch.labels}
    ((sender, received),) = await_batches(learner.exchange.send(ensemble.plan, message), waits)
    labels = received["labels"]
    surface = WhiteBox(learner.model, batch_loss(learner.loss, labels))
    finished = attack.advance(surface, received["clean"], received["begun"], num_steps=num_steps - first_steps)
    own: OwnLoss = own_loss(learner, batch, finished.images, labels, paired=False)
    assert finished.first_embeddings is not None
    with torch.no_grad():
        handed_over = MeasuredPeer(
            sender,
            learner.loss(finished.first_embeddings, labels),
            fooled(learner.loss.similarities(finished.first_embeddings), labels).float().mean(),
        )
    pending = learner.exchange.submit(statistics_of(learner, batch, ensemble, own.measured, [handed_over]), ensemble)
    own.total.backward()  # type: ignore[no-untyped-call]
    return StepResult(await_merged(pending, waits), num_steps + own.passes, waits)


def _own_attack(learner: Learner, batch: Batch) -> torch.Tensor:
    surface = WhiteBox(learner.model, batch_loss(learner.loss, batch.labels))
    return learner.attack(surface, batch.images, generators=learner.generator("attack"))


def _joint_attack(learner: Learner, batch: Batch) -> torch.Tensor:
    """Attack through every member at once: the objective is the mean of the members' losses."""
    with learner.exchange.every_model(learner.model, _module(learner.loss)) as pairs:
        models, losses = zip(*pairs, strict=True)

        def objective(embeddings: torch.Tensor) -> torch.Tensor:
            parts = embeddings.chunk(len(losses), dim=1)
            return torch.stack([loss(part, batch.labels) for loss, part in zip(losses, parts, strict=True)]).mean()

        surface = WhiteBox(_SideBySide(models), objective)
        return learner.attack(surface, batch.images, generators=learner.generator("attack"))


class _SideBySide(nn.Module):
    def __init__(self, models: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(images) for model in self.models], dim=1)


def _transferred_loss(learner: Learner, merged: EnsembleStatistics, peers: list[PeerBatch]) -> torch.Tensor:
    by_class = TRANSFER_RULES[learner.config.transfer_rule].by_class
    terms = []
    for weight, peer in zip(merged.weights[learner.rank].tolist(), peers, strict=True):
        loss = peer.loss
        if by_class:
            per_image = torch.from_numpy(class_weights(merged.class_risk, peer.labels.cpu().numpy()))
            loss = learner.loss(peer.embeddings, peer.labels, weights=per_image.to(peer.labels.device))
        terms.append(weight * loss)
    return torch.stack(terms).sum()


def _module(loss: object) -> nn.Module:
    assert isinstance(loss, nn.Module)
    return loss
