"""Attacks on embeddings: one gradient loop, one projection, one file an attack."""

from eat_dist.attacks import fgsm, pgd  # noqa: F401  (registers them)
from eat_dist.attacks.ball import Ball
from eat_dist.attacks.iterative import Best, Step, Steps, ascend, steepest_ascent
from eat_dist.attacks.randomness import Generators
from eat_dist.attacks.surface import MemberSum, Objective, Reading, Surface, WhiteBox, frozen
from eat_dist.attacks.table import ATTACKS, Attack, GradientAttack, check_norm, training_attack

__all__ = [
    "ATTACKS",
    "Attack",
    "Ball",
    "Best",
    "Generators",
    "GradientAttack",
    "MemberSum",
    "Objective",
    "Reading",
    "Step",
    "Steps",
    "Surface",
    "WhiteBox",
    "ascend",
    "check_norm",
    "frozen",
    "steepest_ascent",
    "training_attack",
]
