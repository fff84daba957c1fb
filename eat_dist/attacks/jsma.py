"""The saliency map attack of Papernot et al. (2016): few pixels, changed all the way. L0."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from eat_dist.attacks.ball import Ball, finite
from eat_dist.attacks.iterative import Step, ascend
from eat_dist.attacks.randomness import Generators, normal
from eat_dist.attacks.surface import Reading, Surface
from eat_dist.attacks.table import ATTACKS, check_norm
from eat_dist.config import AttackConfig


@ATTACKS.register("jsma")
def jsma(config: AttackConfig) -> SaliencyMap:
    """ε is the share of pixels, the paper's maximum distortion; ``step_size`` and ``random_start`` are ignored."""
    check_norm(config, "l0")
    return SaliencyMap(Ball("l0", config.epsilon), num_steps=config.num_steps)


@dataclass(frozen=True)
class SaliencyMap:
    """Algorithm 2: again and again, change the most salient pixel that is still as it was, to black or to white.

    The saliency of a pixel is the rise of the objective that its gradient g promises for the better of the two moves,
    max(g · (1 − x), −g · x), summed over its channels, each of which takes its own better end. Of all iterates the one
    with the largest value is kept.

    Deviations:

    - One gradient, of a margin, instead of the Jacobian of all classes: the margin already is "target minus own",
      which the paper's map puts together from the Jacobian.
    - Single pixels, not the pairs of Algorithm 3; with more pixels to change than steps, several pixels a step.
    - Both directions at once (the paper has a map for each), and weighted with the distance to go; θ, the change of a
      pixel, is the way to that end.
    - It does not stop where the image is lost: the budget is spent, and the best iterate kept.
    - Where the gradient is zero altogether (``displacement`` at the image), a random one stands in.

    Attributes:
        ball: L0.
        num_steps: At most so many, each one forward-backward pass.
    """

    ball: Ball
    num_steps: int

    @property
    def passes(self) -> float:
        """See :class:`Attack`; fewer where there are fewer pixels to change."""
        return self.num_steps + 1 / 3

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`Attack`; needs one value an image."""
        images = images.detach()
        budget = int(self.ball.epsilon * math.prod(images.shape[2:]) + 1e-9)  # as the ball counts
        pixels = math.ceil(budget / self.num_steps)
        return ascend(
            surface,
            images,
            start=images,
            step=_to_the_ends(images, normal(images, generators), budget=budget, pixels=pixels),
            ball=self.ball,
            num_steps=math.ceil(budget / pixels) if budget else 0,
            keep="best",
        ).images


def _to_the_ends(images: torch.Tensor, stand_in: torch.Tensor, *, budget: int, pixels: int) -> Step:
    """The step that changes the ``pixels`` most salient unchanged pixels of each image, ``budget`` of them in all."""

    def step(current: torch.Tensor, reading: Reading) -> torch.Tensor:
        gradient = finite(reading.gradient)
        flat = ~gradient.flatten(1).any(dim=1)
        gradient = torch.where(flat.view(-1, 1, 1, 1), stand_in, gradient)
        end = torch.where(gradient > 0, 1.0, torch.where(gradient < 0, 0.0, current))
        changed = (current != images).any(dim=1).flatten(1)
        saliency = (gradient * (end - current)).sum(dim=1).flatten(1).masked_fill(changed, 0.0)
        gains, places = saliency.topk(pixels, dim=1)
        left = budget - changed.sum(dim=1, keepdim=True)
        chosen = (gains > 0) & (torch.arange(pixels, device=images.device) < left)
        mask = torch.zeros_like(changed).scatter_(1, places, chosen)
        return torch.where(mask.view(-1, 1, *images.shape[2:]), end, current)

    return step
