"""Interpolated adversarial training (Lamb et al., AISec 2019, algorithm 1), with mixup, on metric losses."""

from __future__ import annotations

import torch

from eat_dist.attacks import WhiteBox, whole_batch
from eat_dist.attacks.objectives import batch_loss
from eat_dist.batch import Batch
from eat_dist.defenses.mixing import Mix
from eat_dist.defenses.table import (
    Learner,
    Measured,
    StepResult,
    Waits,
    await_merged,
    register,
    statistics_of,
)
from eat_dist.robustness.statistics import EnsembleStatistics


@register("iat", mix_alpha=1.0)
def iat(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = ½·(two-label PAL on mixed clean images) + ½·(the same on mixed adversarial images).

    The adversarial images are those of ``pgd_at``, of unmixed images, and are mixed afterwards. λ ~ Beta(α, α) and the
    pairs (:class:`~eat_dist.defenses.mixing.Mix`) are drawn for each half by itself. α is ``mix_alpha``, 1 by default.

    Deviations: clean and adversarial images share BatchNorm's statistics; ``adversarial_share`` is not used, the halves
    are the paper's. On record are the two losses on mixed images; no image is both unmixed and attacked in the forward
    pass, so there are no fooled rate and no displacement.

    Passes: K of the attack, 2 of the update.
    """
    surface = WhiteBox(learner.model, batch_loss(learner.loss, batch.labels))
    adversarial = learner.attack(surface, batch.images, generators=learner.generator("attack"))
    numbers, alpha = whole_batch(learner.generator("mix")), learner.options["mix_alpha"]
    clean_mix, adversarial_mix = (Mix.draw(numbers, batch.labels, alpha=alpha) for _ in range(2))
    images = torch.cat(
        [clean_mix.of(batch.images, learner.replicas), adversarial_mix.of(adversarial, learner.replicas)]
    )
    clean, attacked = learner.model(images).split(len(batch.labels))
    clean_mix.observe(learner.loss, clean)
    clean_loss, adversarial_loss = clean_mix.loss(learner.loss, clean), adversarial_mix.loss(learner.loss, attacked)
    measured = Measured(clean_loss=clean_loss, adversarial_loss=adversarial_loss)
    pending = learner.exchange.submit(statistics_of(learner, batch, ensemble, measured, []), ensemble)
    ((clean_loss + adversarial_loss) / 2).backward()  # type: ignore[no-untyped-call]
    waits = Waits()
    return StepResult(await_merged(pending, waits), learner.attack.num_steps + 2, waits)
