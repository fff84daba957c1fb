"""Attacks on embeddings: one gradient loop, one projection, one file an attack."""

from eat_dist.attacks import apgd, cw, fgsm, jsma, mi_fgsm, pgd, random_noise, square  # noqa: F401  (registers them)
from eat_dist.attacks.ball import Ball
from eat_dist.attacks.bpda import Bpda, straight_through
from eat_dist.attacks.iterative import Best, Step, Steps, ascend, steepest_ascent
from eat_dist.attacks.mi_fgsm import MomentumStep
from eat_dist.attacks.randomness import Generators, Interleaved, normal, seeded, whole_batch
from eat_dist.attacks.surface import MemberSum, Objective, Reading, Surface, WhiteBox, frozen
from eat_dist.attacks.table import ATTACKS, Attack, GradientAttack, check_norm, training_attack
from eat_dist.attacks.transfer import Transfer

__all__ = [
    "ATTACKS",
    "Attack",
    "Ball",
    "Best",
    "Bpda",
    "Generators",
    "GradientAttack",
    "Interleaved",
    "MemberSum",
    "MomentumStep",
    "Objective",
    "Reading",
    "Step",
    "Steps",
    "Surface",
    "Transfer",
    "WhiteBox",
    "ascend",
    "check_norm",
    "frozen",
    "normal",
    "seeded",
    "steepest_ascent",
    "straight_through",
    "training_attack",
    "whole_batch",
]
