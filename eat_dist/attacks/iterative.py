"""The one gradient loop that every gradient attack runs through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.surface import Reading, Surface

Step = Callable[[torch.Tensor, Reading], torch.Tensor]
"""One step of an attack: the current images and the surface there → where to go; the loop projects.

An object that remembers (momentum, step sizes) is made anew for every call of the loop.
"""


@dataclass(frozen=True)
class Steps:
    """What a stretch of the loop leaves behind.

    Attributes:
        images: [B, C, H, W] the last or best iterate, inside the ball and the pixel range, detached.
        first_embeddings: [B, D] embeddings of the start, detached, from the first step's own forward pass (what a
            relay measures about a batch it received, without a pass of its own); None where no step was taken.
    """

    images: torch.Tensor
    first_embeddings: torch.Tensor | None


def steepest_ascent(ball: Ball, step_size: float) -> Step:
    """x + step_size · steepest(∇ objective): the step of FGSM and PGD (Madry et al. 2017, equation (2))."""
    return lambda current, reading: current + step_size * ball.steepest(reading.gradient)


def ascend(
    surface: Surface,
    images: torch.Tensor,
    *,
    start: torch.Tensor,
    step: Step,
    ball: Ball,
    num_steps: int,
    keep: Literal["last", "best"] = "last",
) -> Steps:
    """Projected ascent: x ← project(step(x, surface at x)), ``num_steps`` times.

    The models behind the surface are frozen for the duration; neither they nor ``images`` nor ``start`` are changed.

    Args:
        surface: What is climbed.
        images: [B, C, H, W] in [0, 1], the centres of the balls.
        start: [B, C, H, W], the first iterate; projected before use.
        step: Where to go from an iterate.
        ball: Norm and radius.
        num_steps: Steps, each one forward-backward pass; 0 returns the projected start.
        keep: ``best``: of all iterates, start and end included, each image's with the largest value (the surface
            must give one an image); costs one more forward pass.
    """
    images = images.detach()
    current = ball.project(start.detach(), images)
    if num_steps == 0:
        return Steps(current, None)
    first_embeddings: torch.Tensor | None = None
    best = Best()
    with surface.held():
        for index in range(num_steps):
            reading = surface.read(current)
            if index == 0:
                first_embeddings = reading.embeddings
            if keep == "best":
                best.see(current, reading.values)
            current = ball.project(step(current, reading), images)
        if keep == "best":
            best.see(current, surface.values(current))
            current = best.images
    return Steps(current, first_embeddings)


class Best:
    """The best point seen so far, image by image; the earlier of two equal ones.

    Attributes:
        images: [B, C, H, W].
        values: [B].
    """

    images: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        self._seen = False

    def see(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Take the images that are better than all before, and those of the first call.

        Returns:
            [B] bool, which were taken.
        """
        assert values.ndim == 1, f"one value an image is needed to keep the best; got shape {tuple(values.shape)}"
        if not self._seen:
            self._seen = True
            self.images, self.values = images.clone(), values.clone()
            return torch.ones_like(values, dtype=torch.bool)
        better = values > self.values
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)
        self.values = torch.where(better, values, self.values)
        return better
