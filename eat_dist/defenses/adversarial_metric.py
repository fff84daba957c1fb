"""Metric attacks (Bai et al. 2020, "Adversarial Metric Attack and Defense for Person Re-identification")."""

from __future__ import annotations

from eat_dist.batch import Batch
from eat_dist.defenses.adversarial import own_loss
from eat_dist.defenses.displaced import displaced
from eat_dist.defenses.table import FORWARD, Learner, StepResult, Waits, await_merged, register, statistics_of
from eat_dist.robustness.statistics import EnsembleStatistics


@register("adversarial_metric")
def adversarial_metric(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = (1 − β)·PAL(f(x), y) + β·PAL(f(x̃), y), x̃ = argmax ‖f(x̃) − f(x)‖: as ``pgd_at``, with a metric attack.

    The attack knows neither labels nor proxies. K + ⅓ passes for it, and those of :func:`own_loss`.

    Source and ours: the attack of the paper (IEEE TPAMI, arXiv 1901.10650) pushes an image's features away from those
    of images of its identity, by the squared distance; its defense trains a "metric-preserving network" on such images.
    The text of the defense was not available to us, so its weighting of clean and adversarial images is not known: β is
    ours. There is no gallery in training, so the reference is the image's own clean embedding; the loss is the
    configured one.
    """
    adversarial = displaced(learner, batch.images)
    own = own_loss(learner, batch, adversarial, batch.labels)
    pending = learner.exchange.submit(statistics_of(learner, batch, ensemble, own.measured, []), ensemble)
    own.total.backward()  # type: ignore[no-untyped-call]
    waits = Waits()
    return StepResult(await_merged(pending, waits), FORWARD + learner.attack.num_steps + own.passes, waits)
