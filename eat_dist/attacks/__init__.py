"""Attacks on embeddings: one gradient loop, one projection, one file an attack."""

from eat_dist.attacks import fgsm, pgd  # noqa: F401  (registers them)
from eat_dist.attacks.ball import Ball
from eat_dist.attacks.iterative import Objective, Steps, ascend, frozen
from eat_dist.attacks.table import ATTACKS, Attack, GradientAttack

__all__ = ["ATTACKS", "Attack", "Ball", "GradientAttack", "Objective", "Steps", "ascend", "frozen"]
