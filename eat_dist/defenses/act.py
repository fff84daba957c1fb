"""Anti-collapse triplets (Zhou et al., "Adversarial Attack and Defense in Deep Ranking", arXiv 2106.03614)."""

from __future__ import annotations

import torch

from eat_dist.attacks import WhiteBox
from eat_dist.batch import Batch
from eat_dist.defenses.table import Learner, Measured, StepResult, register
from eat_dist.defenses.triplets import conclude, distance, mine_clean, triplet_loss
from eat_dist.robustness.statistics import EnsembleStatistics


@register("act", triplet_margin=0.2, mining="random")
def act(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = [d(a, p̃) − d(a, ñ) + γ]₊ with p̃ = P + r_p, ñ = N + r_n, (r_p, r_n) = argmin d(f(P + r_p), f(N + r_n)).

    Positive and negative are drawn together, and the network learns to tell them apart again; the anchor stays clean.
    With B anchors it costs 2K + 3 passes: the attack on positives and negatives, then one pass over anchors, p̃ and ñ;
    ⅓ more where mining needs the clean embeddings.

    The network learns from the triplets alone; what the configured loss does is in
    :mod:`eat_dist.defenses.triplets`. The adversarial share β has no part. The clean loss is the triplets' before the
    attack, and the displacement that of positives and negatives; both come from the anchors' pass, since every image is
    an anchor.

    Deviations from the public code (``robrank/defenses/pnp.py``): the attack starts where the configured one does, by
    default at random, where the code starts at the image (``attack.random_start: false``); one BatchNorm pass over
    anchors and adversarial images, where the code has BatchNorm frozen; a triplet for every image as anchor.
    """
    margin, count = learner.options["triplet_margin"], len(batch.labels)
    triplets, passes = mine_clean(learner, batch)
    chosen = torch.cat([triplets.positives, triplets.negatives])

    def nearness(embeddings: torch.Tensor) -> torch.Tensor:
        return -distance(*embeddings.chunk(2)).sum()

    surface = WhiteBox(learner.model, nearness)
    adversarial = learner.attack(surface, batch.images[chosen], generators=learner.generator("attack"))
    embeddings = learner.model(torch.cat([batch.images, adversarial]))
    anchors, attacked = embeddings[:count], embeddings[count:]
    loss = triplet_loss(anchors, *attacked.chunk(2), margin=margin)
    clean = anchors.detach()
    measured = Measured(
        clean_loss=triplet_loss(clean, *clean[chosen].chunk(2), margin=margin),
        adversarial_loss=loss,
        displacement=distance(attacked.detach(), clean[chosen]).mean(),
    )
    return conclude(
        learner,
        batch,
        ensemble,
        total=loss,
        embeddings=embeddings,
        labels=torch.cat([batch.labels, batch.labels[chosen]]),
        attacked=2 * count,
        measured=measured,
        passes=passes + 2 * learner.attack.num_steps + 3,
    )
