"""Mixup (Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, section 2), on metric losses."""

from __future__ import annotations

from eat_dist.attacks import whole_batch
from eat_dist.batch import Batch
from eat_dist.defenses.mixing import Mix, mixed_step
from eat_dist.defenses.table import Learner, StepResult, register
from eat_dist.robustness.statistics import EnsembleStatistics


@register("mixup", mix_alpha=1.0)
def mixup(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = λ·PAL(f(x̂), y_i) + (1 − λ)·PAL(f(x̂), y_j), x̂ = λ·x_i + (1 − λ)·x_j, λ ~ Beta(α, α). One pass.

    The two-label form equals the paper's mixed label where a loss is linear in the label, as the cross-entropy is; PAL
    is not, and the two-label form is what defines mixup for it here. α is ``mix_alpha``, 1 by default, the official
    code's. There is no attack: no adversarial image is seen.
    """
    mix = Mix.draw(whole_batch(learner.generator("mix")), batch.labels, alpha=learner.options["mix_alpha"])
    embeddings = learner.model(mix.of(batch.images, learner.replicas))
    return mixed_step(learner, batch, ensemble, embeddings, mix)
