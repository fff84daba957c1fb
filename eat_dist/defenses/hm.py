"""Hardness manipulation (Zhou & Patel, "Enhancing Adversarial Robustness for Deep Metric Learning", CVPR 2022)."""

from __future__ import annotations

import torch

from eat_dist.attacks import Objective, WhiteBox
from eat_dist.batch import Batch
from eat_dist.defenses.table import Learner, Measured, StepResult, register
from eat_dist.defenses.triplets import conclude, distance, hardness, mine_clean, triplet_loss
from eat_dist.robustness.statistics import EnsembleStatistics

_PREVIOUS_LOSS = "hm_previous_loss"


@register("hm", triplet_margin=0.2, mining="softhard", ics_weight=0.0)
def hm(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = [d(ã, p̃) − d(ã, ñ) + γ]₊ + λ·[d(a, ã) − d(a, p)]₊, all three attacked, though no harder than H_D.

    (r_a, r_p, r_n) = argmin ‖[H_D − H(A + r_a, P + r_p, N + r_n)]₊‖², H = d(A, P) − d(A, N) (equation (3)): a triplet
    climbs until its hardness has reached H_D and is left there. H_D is the linear gradual adversary (equation (7)), −γ·
    min(u, ℓ)/u with u = γ and ℓ the triplet loss of the previous iteration: weak at first, semihard later; −γ in the
    first iteration. λ (``ics_weight``) is that of the intra-class structure (equation (8)), 0.5 in the paper (0.05 on
    SOP), 0 here unless set. The paper calls the defaults HM[S, g_LGA], and with λ = 0.5 HM[S, g_LGA]&ICS.

    With B anchors it costs 3K + 3 passes, and ⅓ where mining needs the clean embeddings, which softhard does; with ICS
    one more, over the clean batch.

    The network learns from the triplets alone; what the configured loss does is in
    :mod:`eat_dist.defenses.triplets`. The adversarial share β has no part. Clean loss (the same triplets before the
    attack) and displacement are measured with ICS only, where clean images take part. ℓ leaves the term of ICS out, as
    in the public code.

    Deviations from the public code (``robrank/defenses/amd.py``, ``ghmetsm`` and ``ghmetsmi``): the attack starts where
    the configured one does, by default at random, where the code starts at the image (``attack.random_start: false``),
    so that a triplet that is hard enough stays clean; one BatchNorm pass over adversarial and clean images, where the
    code has BatchNorm frozen; a triplet for every image as anchor.
    """
    margin, weight, count = learner.options["triplet_margin"], learner.options["ics_weight"], len(batch.labels)
    triplets, passes = mine_clean(learner, batch)
    anchors = torch.arange(count, device=batch.labels.device)
    chosen = torch.cat([anchors, triplets.positives, triplets.negatives])
    destination = -min(margin, learner.memory.get(_PREVIOUS_LOSS, margin))  # −γ·min(u, ℓ)/u with u = γ
    surface = WhiteBox(learner.model, _up_to(destination))
    images = learner.attack(surface, batch.images[chosen], generators=learner.generator("attack"))
    if weight > 0:
        images = torch.cat([batch.images, images])
    embeddings = learner.model(images)
    attacked = embeddings[-3 * count :]
    loss = total = triplet_loss(*attacked.chunk(3), margin=margin)
    measured, labels = Measured(adversarial_loss=loss), batch.labels[chosen]
    if weight > 0:
        clean, labels = embeddings[:count], torch.cat([batch.labels, labels])
        structure = triplet_loss(clean, attacked[:count], clean[triplets.positives], margin=0.0)
        total = loss + weight * structure
        before = clean.detach()[chosen]
        measured = Measured(
            clean_loss=triplet_loss(*before.chunk(3), margin=margin),
            adversarial_loss=loss,
            displacement=distance(attacked.detach(), before).mean(),
        )
    result = conclude(
        learner,
        batch,
        ensemble,
        total=total,
        embeddings=embeddings,
        labels=labels,
        attacked=3 * count,
        measured=measured,
        passes=passes + 3 * learner.attack.num_steps + 3 + (weight > 0),
    )
    learner.memory[_PREVIOUS_LOSS] = loss.item()
    return result


def _up_to(destination: float) -> Objective:
    """−‖[H_D − H]₊‖² of anchors, positives and negatives, one after the other [3B, D] → scalar."""

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        return -(destination - hardness(*embeddings.chunk(3))).clamp_min(0).square().sum()

    return objective
