"""Fast gradient sign method (Goodfellow, Shlens & Szegedy 2014, section 4)."""

from __future__ import annotations

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.table import ATTACKS, GradientAttack, check_norm
from eat_dist.config import AttackConfig


@ATTACKS.register("fgsm")
def fgsm(config: AttackConfig) -> GradientAttack:
    """One full-length step from the image itself: x + ε·sign(∇), or ε along the gradient in L2.

    ``num_steps`` and ``step_size`` of the config have no meaning here; ``random_start`` is ignored too, since a full
    step from a random point (Wong et al. 2020, "fast AT") is PGD with ``num_steps: 1``.
    """
    check_norm(config, "linf", "l2")
    return GradientAttack(Ball(config.norm, config.epsilon), num_steps=1, step_size=config.epsilon, random_start=False)
