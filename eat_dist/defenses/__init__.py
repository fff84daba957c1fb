"""Defenses: one training step a file."""

from eat_dist.defenses import (  # noqa: F401  (registers them)
    act,
    adversarial_metric,
    eat,
    est,
    hm,
    natural,
    pgd_at,
    robust_dml,
)
from eat_dist.defenses.table import DEFENSES, Defense, Learner, StepResult, options_of

__all__ = ["DEFENSES", "Defense", "Learner", "StepResult", "options_of"]
