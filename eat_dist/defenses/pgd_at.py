"""Adversarial training (Madry et al. 2017, equation 2.1), adapted to metric learning: each member by itself."""

from __future__ import annotations

from eat_dist.attacks import WhiteBox
from eat_dist.attacks.objectives import batch_loss
from eat_dist.batch import Batch
from eat_dist.defenses.adversarial import own_loss
from eat_dist.defenses.table import Learner, StepResult, Waits, await_merged, register, statistics_of
from eat_dist.robustness.statistics import EnsembleStatistics


@register("pgd_at")
def pgd_at(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = (1 − β)·PAL(f(x), y) + β·PAL(f(x̃), y), x̃ maximising PAL over the image with the proxies fixed.

    Deviation from Madry et al.: β = 1 there; the default here trains on both halves.
    """
    surface = WhiteBox(learner.model, batch_loss(learner.loss, batch.labels))
    adversarial = learner.attack(surface, batch.images, generators=learner.generator("attack"))
    own = own_loss(learner, batch, adversarial, batch.labels)
    pending = learner.exchange.submit(statistics_of(learner, batch, ensemble, own.measured, []), ensemble)
    own.total.backward()  # type: ignore[no-untyped-call]
    waits = Waits()
    return StepResult(await_merged(pending, waits), learner.attack.num_steps + own.passes, waits)
