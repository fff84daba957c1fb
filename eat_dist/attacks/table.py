"""The attacks by name, and the form they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.iterative import Objective, Steps, ascend
from eat_dist.config import AttackConfig
from eat_dist.registry import Registry


class Attack(Protocol):
    """Crafts adversarial images; ``num_steps`` is what it costs in forward-backward passes over the batch."""

    @property
    def num_steps(self) -> int: ...  # noqa: D102

    def __call__(
        self, model: nn.Module, images: torch.Tensor, *, objective: Objective, generator: torch.Generator
    ) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] → the same shape, inside the ball, detached."""
        ...


@dataclass(frozen=True)
class GradientAttack:
    """Steepest ascent with a fixed step: FGSM and PGD are settings of it.

    Attributes:
        ball: Norm and radius.
        num_steps: Gradient steps, K.
        step_size: Pixel units.
        random_start: Start at a uniform point of the ball instead of at the image.
    """

    ball: Ball
    num_steps: int
    step_size: float
    random_start: bool

    def __call__(
        self, model: nn.Module, images: torch.Tensor, *, objective: Objective, generator: torch.Generator
    ) -> torch.Tensor:
        """Craft adversarial images; see :func:`eat_dist.attacks.iterative.ascend`."""
        start = self.start(images, generator)
        return self.advance(model, images, start, objective=objective, num_steps=self.num_steps).images

    def start(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The first iterate: the images themselves or a random point of their balls."""
        return self.ball.random_point(images, generator) if self.random_start else images

    def advance(
        self,
        model: nn.Module,
        images: torch.Tensor,
        current: torch.Tensor,
        *,
        objective: Objective,
        num_steps: int,
    ) -> Steps:
        """Take some of the steps from ``current``: how a relay shares one attack between two members."""
        return ascend(
            model,
            images,
            start=current,
            objective=objective,
            ball=self.ball,
            step_size=self.step_size,
            num_steps=num_steps,
        )


ATTACKS: Registry[Callable[[AttackConfig], GradientAttack]] = Registry("attack")
