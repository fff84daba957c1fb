"""Attacked tuples (Panum et al. 2021, "Exploring Adversarial Robustness of Deep Metric Learning", arXiv 2102.07265)."""

from __future__ import annotations

import torch

from eat_dist.attacks import Objective, WhiteBox
from eat_dist.batch import Batch
from eat_dist.defenses.adversarial import own_loss
from eat_dist.defenses.displaced import reference_embeddings
from eat_dist.defenses.table import FORWARD, Learner, StepResult, Waits, await_merged, register, statistics_of
from eat_dist.defenses.triplets import distance, mine
from eat_dist.robustness.statistics import EnsembleStatistics


@register("robust_dml", perturbed_role="positive")
def robust_dml(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = (1 − β)·PAL(f(x), y) + β·PAL(f(x̃), y), x̃ attacked in one role of a tuple against the others' f(x), fixed.

    With e = f(x) of the clean batch, detached, a the image's anchor, p its positive, n its negative:

    - ``perturbed_role: positive``: x̃ = argmax d(f(x̃), e_a), a another image of x's class;
    - ``negative``: x̃ = argmin d(f(x̃), e_a), a an image of another class;
    - ``anchor``: x̃ = argmax d(f(x̃), e_p) − d(f(x̃), e_n).

    So an attack looks at its tuple alone, not at the batch: the paper's answer to a loss that couples images. Every
    image is attacked (attack rate 1). K + ⅓ passes for the attack, and those of :func:`own_loss`.

    Ours: the paper trains the tuples' contrastive or triplet loss, with the attacked image in its role; the configured
    loss on clean and attacked images takes its place, since Proxy Anchor has no tuples. Deviations from the public
    code besides: each image is attacked once, in the role, and its references are drawn uniformly, where the code draws
    a tuple for each anchor with the negative weighted by distance; references and attack in evaluation mode.
    """
    references = reference_embeddings(learner, batch.images)
    tuples = mine(batch.labels, learner.generator("triplets"), images=batch.indices)
    objective = _against(
        references[tuples.positives], references[tuples.negatives], role=learner.options["perturbed_role"]
    )
    surface = WhiteBox(learner.model, objective)
    adversarial = learner.attack(surface, batch.images, generators=learner.generator("attack"))
    own = own_loss(learner, batch, adversarial, batch.labels)
    pending = learner.exchange.submit(statistics_of(learner, batch, ensemble, own.measured, []), ensemble)
    own.total.backward()  # type: ignore[no-untyped-call]
    waits = Waits()
    return StepResult(await_merged(pending, waits), FORWARD + learner.attack.num_steps + own.passes, waits)


def _against(same: torch.Tensor, other: torch.Tensor, *, role: str) -> Objective:
    """What images in a role maximise, given a reference of their own class and one of another, [B, D] each."""
    if role == "positive":
        return lambda embeddings: distance(embeddings, same)
    if role == "negative":
        return lambda embeddings: -distance(embeddings, other)
    return lambda embeddings: distance(embeddings, same) - distance(embeddings, other)
