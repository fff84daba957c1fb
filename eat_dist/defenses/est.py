"""Embedding-shifted triplets (Zhou et al., "Adversarial Ranking Attack and Defense", ECCV 2020)."""

from __future__ import annotations

from eat_dist.batch import Batch
from eat_dist.defenses.displaced import displaced
from eat_dist.defenses.table import FORWARD, Learner, Measured, StepResult, register
from eat_dist.defenses.triplets import conclude, mine, triplet_loss
from eat_dist.robustness.statistics import EnsembleStatistics


@register("est", triplet_margin=0.2, mining="random")
def est(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = [d(ã, p̃) − d(ã, ñ) + γ]₊ where each image is x̃ = x + r*, r* = argmax ‖f(x + r) − f(x)‖.

    Every image of the batch is displaced; the triplets are then mined on the adversarial embeddings, as in the public
    code (``robrank/defenses/est.py``). K + 1⅓ passes: f(x), the attack, the update.

    The network learns from the triplets alone; what the configured loss does is in
    :mod:`eat_dist.defenses.triplets`. The adversarial share β has no part: there are no clean images in the update. So
    clean loss and displacement are not measured either, since f(x) is known in evaluation mode only.

    Deviations: the attack starts where the configured one does, at random, where the code starts at the image with 10⁻⁷
    added to the reference; a triplet for every image as anchor (:func:`~eat_dist.defenses.triplets.mine`).
    """
    margin = learner.options["triplet_margin"]
    embeddings = learner.model(displaced(learner, batch.images))
    triplets = mine(
        batch.labels,
        learner.generator("triplets"),
        method=learner.options["mining"],
        images=batch.indices,
        embeddings=embeddings.detach(),
        margin=margin,
    )
    loss = triplet_loss(embeddings, embeddings[triplets.positives], embeddings[triplets.negatives], margin=margin)
    return conclude(
        learner,
        batch,
        ensemble,
        total=loss,
        embeddings=embeddings,
        labels=batch.labels,
        attacked=len(batch.labels),
        measured=Measured(adversarial_loss=loss),
        passes=FORWARD + learner.attack.num_steps + 1,
    )
