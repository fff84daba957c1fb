"""The L2 attack of Carlini & Wagner (2017): the smallest perturbation that succeeds, section VI-A."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eat_dist.attacks.ball import Ball, finite
from eat_dist.attacks.iterative import Best, ascend
from eat_dist.attacks.randomness import Generators, normal
from eat_dist.attacks.surface import Reading, Surface
from eat_dist.attacks.table import ATTACKS, check_norm
from eat_dist.config import AttackConfig

# tanh never gets to the ends of the pixel range: the public code (1.999999 of a half) begins so far inside.
_INSIDE = 0.999999


@ATTACKS.register("cw")
def cw(config: AttackConfig) -> CarliniWagner:
    """``num_steps`` steps of Adam for each of nine weights c; ``random_start`` has no meaning here.

    ``step_size`` is Adam's learning rate, in tanh space instead of pixels. By default it is the public code's 0.01, but
    with fewer than 1,000 steps 10 / num_steps: a step of Adam is about as long as its learning rate, and a black or
    white pixel begins 7.25 from the middle grey, so a few dozen steps of 0.01 would break next to nothing.
    """
    check_norm(config, "l2")
    learning_rate = max(0.01, 10 / config.num_steps) if config.step_size is None else config.step_size
    return CarliniWagner(Ball("l2", config.epsilon), num_steps=config.num_steps, learning_rate=learning_rate)


@dataclass(frozen=True)
class CarliniWagner:
    """Minimises ‖δ‖² + c · max(κ − objective, 0) over w, with x + δ = (tanh(w) + 1) / 2, by Adam; c by binary search.

    The result is the smallest perturbation whose value passes κ, of all iterates of all c; where none does, the
    iterate with the largest value. Only the margin objectives (``nearest_wrong_centroid``, ``nearest_negative``) have
    their zero where the image is lost. Of any other one the smallest perturbation that passes κ = 0 says nothing
    (``displacement`` passes it anywhere off the image): give a κ that means something, or do not use this attack.

    Deviations from the public code:

    - Every iterate that is read lies in the ball of radius ε. w itself is free: the gradient at the nearest point of
      the ball stands for the one outside. With an ε that is never reached, it is the minimum-norm attack.
    - Where the objective's gradient is zero altogether (``displacement`` at the image), a random direction stands in.
    - No early abort, no last search step at the upper bound (which the public code has from ten steps on), one start.

    Success is judged on single readings: of a randomised model, the result may owe it to a lucky draw.

    Attributes:
        ball: L2.
        num_steps: Of Adam, for each c; each one forward-backward pass. The public code takes 10,000 at most.
        search_steps: Values of c tried: × 10 until one succeeds, then the middle of the bracket, image by image.
        initial_weight: The first c.
        learning_rate: Adam's.
        threshold: κ, the confidence: the value to pass. 0 for the margin objectives.
    """

    ball: Ball
    num_steps: int
    search_steps: int = 9
    initial_weight: float = 1e-3
    learning_rate: float = 0.01
    threshold: float = 0.0

    @property
    def passes(self) -> float:
        """See :class:`Attack`: num_steps and a forward pass for each c."""
        return self.search_steps * (self.num_steps + 1 / 3)

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`Attack`; needs one value an image."""
        images = images.detach()
        stand_in = normal(images, generators)
        weight = images.new_full((len(images),), self.initial_weight)
        lower, upper = torch.zeros_like(weight), torch.full_like(weight, float("inf"))
        best = Best()
        for _ in range(self.search_steps):
            descent = _Descent(self, images, weight=weight, stand_in=stand_in, best=best)
            end = ascend(surface, images, start=images, step=descent, ball=self.ball, num_steps=self.num_steps).images
            with surface.held():
                descent.judge(end, surface.values(end))
            lower = torch.where(descent.succeeded, lower, torch.maximum(lower, weight))
            upper = torch.where(descent.succeeded, torch.minimum(upper, weight), upper)
            weight = torch.where(upper.isinf(), weight * 10, (lower + upper) / 2)
        return best.images


class _Descent:
    """Adam in tanh space for one c, from the image itself.

    Attributes:
        succeeded: [B] bool, whether any iterate so far has passed the threshold.
    """

    def __init__(
        self, attack: CarliniWagner, images: torch.Tensor, *, weight: torch.Tensor, stand_in: torch.Tensor, best: Best
    ) -> None:
        self._attack, self._images, self._weight, self._stand_in, self._best = attack, images, weight, stand_in, best
        self._w = ((2 * images - 1) * _INSIDE).atanh()
        self._adam = torch.optim.Adam([self._w], lr=attack.learning_rate)
        self.succeeded = torch.zeros_like(weight, dtype=torch.bool)

    def __call__(self, current: torch.Tensor, reading: Reading) -> torch.Tensor:
        """Judge the iterate, then take Adam's step; see :data:`eat_dist.attacks.iterative.Step`."""
        success = self.judge(current, reading.values)
        gradient = finite(reading.gradient)
        flat = ~gradient.flatten(1).any(dim=1)
        gradient = torch.where(flat.view(-1, 1, 1, 1), self._stand_in, gradient)
        pull = torch.where(success, 0.0, self._weight).view(-1, 1, 1, 1)
        slope = 0.5 / self._w.cosh().square()  # dx/dw, which 1 − tanh² would lose to rounding near the ends
        self._w.grad = (2 * (self._perturbed() - self._images) - pull * gradient) * slope
        self._adam.step()
        return self._perturbed()

    def judge(self, perturbed: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Let an iterate [B, C, H, W] of known values [B] compete for the result; [B] bool, which succeed."""
        success = values > self._attack.threshold
        self.succeeded |= success
        # One number to rank by: those that succeed are above zero, the nearest highest; the others below, by value.
        near = 1 / (1 + self._attack.ball.distances(perturbed, self._images))
        self._best.see(perturbed, torch.where(success, near, values - self._attack.threshold))
        return success

    def _perturbed(self) -> torch.Tensor:
        return (self._w.tanh() + 1) / 2
