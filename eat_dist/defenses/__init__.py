"""Defenses: one training step a file."""

from eat_dist.defenses import (  # noqa: F401  (registers them)
    act,
    adp,
    adversarial_metric,
    dverge,
    eat,
    est,
    hm,
    iat,
    manifold_mixup,
    mixup,
    natural,
    pgd_at,
    robust_dml,
    trades,
)
from eat_dist.defenses.table import DEFENSES, Defense, Learner, StepResult, options_of

__all__ = ["DEFENSES", "Defense", "Learner", "StepResult", "options_of"]
