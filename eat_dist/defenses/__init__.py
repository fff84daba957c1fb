"""Defenses: one training step a file."""

from eat_dist.defenses import eat, natural, pgd_at  # noqa: F401  (registers them)
from eat_dist.defenses.table import DEFENSES, Defense, Learner, StepResult, options_of

__all__ = ["DEFENSES", "Defense", "Learner", "StepResult", "options_of"]
