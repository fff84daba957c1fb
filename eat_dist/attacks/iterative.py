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
            must give one an image); costs one more forward pass. On a randomised surface see :class:`Best`.
    """
    images = images.detach()
    current = ball.project(start.detach(), images)
    if num_steps == 0:
        return Steps(current, None)
    first_embeddings: torch.Tensor | None = None
    best = Best.on(surface)
    with surface.held():
        for index in range(num_steps):
            reading = surface.read(current)
            if index == 0:
                first_embeddings = reading.embeddings
            if keep == "best":
                best.see(current, reading.values)
            current = ball.project(step(current, reading), images)
            del reading  # its gradient need not be held through the next pass
        if keep == "best":
            best.see(current, surface.values(current))
            current = best.settled(surface)
    return Steps(current, first_embeddings)


class Best:
    """The best point seen so far, image by image; the earlier of two equal ones.

    On a randomised surface the largest of many noisy values belongs to a lucky draw rather than to a good point. There
    the finalists are kept instead, the few points with the largest values, and :meth:`settled` reads them once more,
    with draws that played no part in their selection.
    """

    def __init__(self, finalists: int = 1) -> None:
        self._finalists = finalists
        self._ranked: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def on(cls, surface: Surface) -> Best:
        """With several finalists (5) where readings are random, one elsewhere."""
        return cls(1 if surface.draws == 1 else 5)

    @property
    def images(self) -> torch.Tensor:
        """[B, C, H, W] the points of the largest values seen."""
        return self._ranked[0][0]

    @property
    def values(self) -> torch.Tensor:
        """[B] the largest values seen."""
        return self._ranked[0][1]

    def see(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Take the images that are better than all before, and those of the first call; NaN is the worst value.

        Returns:
            [B] bool, which were taken.
        """
        assert values.ndim == 1, f"one value an image is needed to keep the best; got shape {tuple(values.shape)}"
        values = values.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        best = values > self.values if self._ranked else torch.ones_like(values, dtype=torch.bool)
        for place, (kept_images, kept_values) in enumerate(self._ranked):
            better = values > kept_values
            wide = better.view(-1, 1, 1, 1)
            self._ranked[place] = torch.where(wide, images, kept_images), torch.where(better, values, kept_values)
            if place + 1 < self._finalists:  # what was displaced competes for the next place
                images, values = torch.where(wide, kept_images, images), torch.where(better, kept_values, values)
        if len(self._ranked) < self._finalists:
            self._ranked.append((images.clone(), values.clone()))
        return best

    def settled(self, surface: Surface) -> torch.Tensor:
        """[B, C, H, W] the choice: the best seen, or among several finalists the best of a fresh reading of each.

        Call inside ``surface.held()``; several finalists cost one forward pass each.
        """
        if self._finalists == 1:
            return self.images
        fresh = Best()
        for images, _ in self._ranked:
            fresh.see(images, surface.values(images))
        return fresh.images
