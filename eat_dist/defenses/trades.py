"""TRADES (Zhang et al., ICML 2019, algorithm 1), adapted to metric learning."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from eat_dist.attacks import WhiteBox, frozen, normal
from eat_dist.batch import Batch
from eat_dist.defenses.table import (
    FORWARD,
    Learner,
    Measured,
    StepResult,
    Waits,
    await_merged,
    register,
    statistics_of,
)
from eat_dist.robustness.statistics import EnsembleStatistics

START_DEVIATION = 0.001  # in pixel units, of algorithm 1


@register("trades", kl_weight=6.0, softmax_scale=32.0)
def trades(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = PAL(f(x), y) + β·mean KL(p(x) ‖ p(x̃)), x̃ maximising that KL within the ball.

    p = softmax(σ·similarities − prior). β is ``kl_weight``, the official 6, σ ``softmax_scale``: 32, Proxy Anchor's
    default α, at which cosines become logits there. The prior of a proxy is the mean of its logits over the clean
    batch, without gradient. The attack has the configured norm, ε, steps and step size, but starts at
    x + 0.001·N(0, 1), as in the official code, whatever ``attack.random_start`` says; p(x) is computed once for it, in
    evaluation mode. The update differentiates both p(x) and p(x̃), as there.

    Deviations: PAL instead of the cross-entropy, proxies instead of a classifier; clean and adversarial images share
    BatchNorm's statistics, as under the other defenses here. ``adversarial_share`` is not used: β takes its place. And
    two things keep the KL from its trivial minimum, one proxy nearest to every image, which the cross-entropy would not
    allow and which costs PAL, a mean over the proxies, little: it trains the network alone, with the proxies fixed, and
    what a proxy is near to on the whole, its prior, does not count (as in logit adjustment, Menon et al., ICLR 2021).
    Without either, training ended there (docs/experiments.md).

    Passes: K of the attack, a third for p(x), 2 of the update.
    """
    adversarial = _attacked(learner, batch)
    embeddings = learner.model(torch.cat([batch.images, adversarial]))
    clean, attacked = embeddings.split(len(batch.labels))
    learner.loss.observe(clean.detach(), batch.labels)
    clean_loss = learner.loss(clean, batch.labels)
    logits = _logits(learner, attacked)
    divergence = _divergence(_logits(learner, clean), logits).mean()
    with torch.no_grad():
        adversarial_loss = learner.loss(attacked, batch.labels)
        displacement = (attacked - clean).norm(dim=1).mean()
    measured = Measured(clean_loss, adversarial_loss, logits, batch.labels, displacement)
    pending = learner.exchange.submit(statistics_of(learner, batch, ensemble, measured, []), ensemble)
    total = clean_loss + learner.options["kl_weight"] * divergence
    total.backward()
    waits = Waits()
    return StepResult(await_merged(pending, waits), learner.attack.num_steps + FORWARD + 2, waits)


def _attacked(learner: Learner, batch: Batch) -> torch.Tensor:
    with frozen(learner.model), torch.no_grad():
        clean = _logits(learner, learner.model(batch.images))
    start = batch.images + START_DEVIATION * normal(batch.images, learner.generator("attack"))
    surface = WhiteBox(learner.model, lambda embeddings: _divergence(clean, _logits(learner, embeddings)))
    return learner.attack.advance(surface, batch.images, start, num_steps=learner.attack.num_steps).images


def _logits(learner: Learner, embeddings: torch.Tensor) -> torch.Tensor:
    """σ·similarities to the fixed proxies, [B, D] → [B, C]."""
    assert isinstance(learner.loss, nn.Module)
    with frozen(learner.loss):
        logits: torch.Tensor = learner.options["softmax_scale"] * learner.loss.similarities(embeddings)
    return logits


def _divergence(clean: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """KL(softmax(clean − prior) ‖ softmax(adversarial − prior)) of logits [B, C], B the whole batch → [B]."""
    prior = clean.detach().mean(dim=0)
    logs = functional.log_softmax(adversarial - prior, dim=1), functional.log_softmax(clean - prior, dim=1)
    return functional.kl_div(*logs, reduction="none", log_target=True).sum(dim=1)
