"""Random points of the ball: what an attacker achieves who knows nothing but ε. The lowest rung of any comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.iterative import Best
from eat_dist.attacks.randomness import Generators
from eat_dist.attacks.surface import Surface
from eat_dist.attacks.table import ATTACKS, check_norm
from eat_dist.config import AttackConfig


@dataclass(frozen=True)
class RandomNoise:
    """The best of some independent points, by the surface's value.

    Attributes:
        ball: Norm and radius.
        num_draws: Points; one needs no pass at all.
    """

    ball: Ball
    num_draws: int

    @property
    def passes(self) -> float:
        """See :class:`~eat_dist.attacks.table.Attack`."""
        return self.num_draws / 3 if self.num_draws > 1 else 0.0

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`~eat_dist.attacks.table.Attack`."""
        images = images.detach()
        if self.num_draws == 1:
            return self.ball.random_point(images, generators)
        best = Best.on(surface)
        with surface.held():
            for _ in range(self.num_draws):
                points = self.ball.random_point(images, generators)
                best.see(points, surface.values(points))
            return best.settled(surface)


@ATTACKS.register("random_noise")
def random_noise(config: AttackConfig) -> RandomNoise:
    """``num_steps`` points drawn uniformly from the ball (:meth:`Ball.random_point`), the best of them kept.

    The image itself is not among them, so the value may fall. ``step_size`` and ``random_start`` have no meaning here.
    """
    check_norm(config, "linf", "l2", "l0")
    return RandomNoise(Ball(config.norm, config.epsilon), num_draws=config.num_steps)
