"""Randomisation (Xie et al. 2017, "Mitigating adversarial effects through randomization", section 3.3)."""

from __future__ import annotations

import torch

from eat_dist.attacks import Generators
from eat_dist.attacks.randomness import uniform
from eat_dist.inference.resampling import nearest, resample, whole
from eat_dist.inference.table import ImageTransform, register


@register("randomisation", training=False, draws=1, growth=31 / 28)
class Randomisation(ImageTransform):
    """A random size, then zeros around the image, more on one side than on the other at random.

    The image grows to a size drawn uniformly from its own to ⌊growth·size + ½⌋ (224 … 248; 299 … 331 in the paper) and
    is put at a uniformly drawn place of a black canvas of the largest size. Sizes, places and the nearest-pixel
    resizing are those of the authors' code; of two unequal sides the same share is added. Deviations: every image of a
    batch has its own draw, and the largest size itself may be drawn (the authors stop one below).

    Args:
        growth: Largest size over the image's own.
    """

    def __init__(self, growth: float) -> None:
        super().__init__()
        self.growth = growth

    def forward(self, images: torch.Tensor, generators: Generators | None = None) -> torch.Tensor:
        """See :class:`ImageTransform`; [B, C, H, W] → [B, C, H', W'], H' = ⌊growth·H + ½⌋."""
        size, *places = uniform(images.new_empty(len(images), 3), generators).unbind(1)
        matrices = []
        for length, place in zip(images.shape[2:], places, strict=True):
            canvas = int(self.growth * length + 0.5)
            resized = length + whole(size, canvas - length + 1)
            offset = whole(place, canvas - resized + 1)
            matrices.append(nearest(length, canvas=canvas, resized=resized, offset=offset).to(images.dtype))
        return resample(images, *matrices)
