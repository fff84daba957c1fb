"""Projected gradient descent (Madry et al. 2017, section 2.1)."""

from __future__ import annotations

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.table import ATTACKS, GradientAttack, check_norm
from eat_dist.config import AttackConfig, effective_step_size


@ATTACKS.register("pgd")
def pgd(config: AttackConfig) -> GradientAttack:
    """``num_steps`` steps of 2.5·ε/K each (unless given) from a random point of the ball; the last iterate is kept."""
    check_norm(config, "linf", "l2")
    return GradientAttack(
        Ball(config.norm, config.epsilon),
        num_steps=config.num_steps,
        step_size=effective_step_size(config),
        random_start=config.random_start,
    )
