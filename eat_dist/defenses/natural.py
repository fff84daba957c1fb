"""Natural training: the loss on clean images, nothing else. What the others are compared with."""

from __future__ import annotations

from eat_dist.batch import Batch
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


@register("natural")
def natural(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = PAL(f(x), y). One pass."""
    embeddings = learner.model(batch.images)
    loss = learner.loss(embeddings, batch.labels)
    learner.loss.observe(embeddings.detach(), batch.labels)
    statistics = statistics_of(learner, batch, ensemble, Measured(clean_loss=loss), [])
    pending = learner.exchange.submit(statistics, ensemble)
    loss.backward()  # type: ignore[no-untyped-call]
    waits = Waits()
    return StepResult(await_merged(pending, waits), passes=1, waits=waits)
