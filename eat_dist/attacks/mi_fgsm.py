"""Momentum iterative fast gradient sign method (Dong et al. 2018, "Boosting adversarial attacks with momentum")."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eat_dist.attacks.ball import Ball, finite
from eat_dist.attacks.iterative import ascend
from eat_dist.attacks.randomness import Generators
from eat_dist.attacks.surface import Reading, Surface
from eat_dist.attacks.table import ATTACKS, check_norm
from eat_dist.config import AttackConfig, effective_step_size


@dataclass(frozen=True)
class MomentumAttack:
    """Fixed steps along accumulated gradients, each scaled to L1 length 1 before it is added.

    Attributes:
        ball: Norm and radius.
        num_steps: Gradient steps, T.
        step_size: α, pixel units.
        random_start: Start at a uniform point of the ball instead of at the image.
        decay: μ of equation (6).
    """

    ball: Ball
    num_steps: int
    step_size: float
    random_start: bool
    decay: float = 1.0

    @property
    def passes(self) -> float:
        """See :class:`~eat_dist.attacks.table.Attack`."""
        return self.num_steps + 1 / 3

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`~eat_dist.attacks.table.Attack`."""
        return ascend(
            surface,
            images,
            start=self.ball.random_point(images, generators) if self.random_start else images,
            step=MomentumStep(self.ball, self.step_size, self.decay),
            ball=self.ball,
            num_steps=self.num_steps,
            keep="best",
        ).images


@ATTACKS.register("mi_fgsm")
def mi_fgsm(config: AttackConfig) -> MomentumAttack:
    """Equations (6) and (7) in L∞, (6) and (8) in L2: g ← μ·g + ∇/‖∇‖₁, x ← x + α·sign(g) or α·g/‖g‖₂.

    μ = 1, as in the paper's section 4. It differs from the paper in three ways: each image's best iterate is returned
    instead of the last; the start is random unless ``random_start`` is off; and α is 2.5·ε/T unless given, since the
    paper's ε/T, made for a start at the image itself, does not reach across the ball from a random one.
    """
    check_norm(config, "linf", "l2")
    return MomentumAttack(
        Ball(config.norm, config.epsilon),
        num_steps=config.num_steps,
        step_size=effective_step_size(config),
        random_start=config.random_start,
    )


class MomentumStep:
    """The step of one run of the attack: it remembers the gradients of that run.

    Args:
        ball: Its norm gives the direction.
        step_size: α, pixel units.
        decay: μ.
    """

    def __init__(self, ball: Ball, step_size: float, decay: float = 1.0) -> None:
        self._ball, self._step_size, self._decay = ball, step_size, decay
        self._accumulated: torch.Tensor | None = None

    def __call__(self, current: torch.Tensor, reading: Reading) -> torch.Tensor:
        """See :data:`~eat_dist.attacks.iterative.Step`."""
        gradient = finite(reading.gradient)
        accumulated = gradient / gradient.flatten(1).norm(p=1, dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        if self._accumulated is not None:
            accumulated += self._decay * self._accumulated
        self._accumulated = accumulated
        return current + self._step_size * self._ball.steepest(accumulated)
