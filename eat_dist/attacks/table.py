"""The attacks by name, and the forms they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.iterative import Steps, ascend, steepest_ascent
from eat_dist.attacks.randomness import Generators
from eat_dist.attacks.surface import Surface
from eat_dist.config import AttackConfig
from eat_dist.errors import ConfigError
from eat_dist.registry import Registry


class Attack(Protocol):
    """Crafts adversarial images.

    An attack looks at each image by itself: nothing it does to one may depend on the others of the batch.

    ``passes`` is its cost: forward-backward passes over the batch (a forward pass alone counts as a third of one).
    """

    @property
    def ball(self) -> Ball: ...  # noqa: D102
    @property
    def passes(self) -> float: ...  # noqa: D102

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """Attack [B, C, H, W] images in [0, 1].

        Args:
            surface: What is maximised; the models behind it are restored.
            images: Not changed.
            generators: The only source of random numbers.

        Returns:
            [B, C, H, W] in [0, 1], inside the ball, detached.
        """
        ...


@dataclass(frozen=True)
class GradientAttack:
    """Steepest ascent with a fixed step: FGSM and PGD are settings of it. Training uses these alone.

    Attributes:
        ball: Norm and radius.
        num_steps: Gradient steps, K.
        step_size: Pixel units.
        random_start: Start at a uniform point of the ball instead of at the image.
        keep: The last iterate, as in training, or each image's best.
    """

    ball: Ball
    num_steps: int
    step_size: float
    random_start: bool
    keep: Literal["last", "best"] = "last"

    @property
    def passes(self) -> float:
        """See :class:`Attack`."""
        return self.num_steps + (self.keep == "best") / 3

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`Attack`."""
        return self.advance(surface, images, self.start(images, generators), num_steps=self.num_steps).images

    def start(self, images: torch.Tensor, generators: Generators) -> torch.Tensor:
        """The first iterate: the images themselves or a random point of their balls."""
        return self.ball.random_point(images, generators) if self.random_start else images

    def advance(self, surface: Surface, images: torch.Tensor, current: torch.Tensor, *, num_steps: int) -> Steps:
        """Take some of the steps from ``current``: how a relay shares one attack between two members."""
        return ascend(
            surface,
            images,
            start=current,
            step=steepest_ascent(self.ball, self.step_size),
            ball=self.ball,
            num_steps=num_steps,
            keep=self.keep,
        )


ATTACKS: Registry[Callable[[AttackConfig], Attack]] = Registry("attack")
"""By name: settings → attack. Each raises ConfigError for a norm it is not defined for (:func:`check_norm`)."""


def training_attack(config: AttackConfig) -> GradientAttack:
    """The attack that a training step uses: one of fixed steps, which also works on a loss that couples a batch.

    Raises:
        ConfigError: The attack compares single images' values, or is no gradient attack at all.
    """
    attack = ATTACKS[config.name](config)
    if not isinstance(attack, GradientAttack):
        raise ConfigError(f"attack.name: '{config.name}' is for evaluation only; train with fgsm or pgd")
    return attack


def check_norm(config: AttackConfig, *norms: str) -> None:
    """Refuse a norm that the attack is not defined for.

    Raises:
        ConfigError: ``config.norm`` is not among ``norms``.
    """
    if config.norm not in norms:
        raise ConfigError(
            f"the attack '{config.name}' is defined for the norm {' and '.join(norms)}; got {config.norm}"
        )
