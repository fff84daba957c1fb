"""The set an attack may move in: an ε-ball around the image, cut with the pixel range [0, 1].

Every iterate of every attack goes through :meth:`Ball.project`; an attack is not trusted to stay inside by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Norm = Literal["linf", "l2"]

# Below this length a direction is noise: dividing by it would turn rounding errors into a full step.
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Ball:
    """An L∞ or L2 ball of radius ``epsilon`` (pixel units, images in [0, 1]), one around each image of a batch."""

    norm: Norm
    epsilon: float

    def project(self, perturbed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The nearest point of the ball (then of the pixel range) to each perturbed image.

        Clipping to [0, 1] cannot leave the ball again: ``images`` lie in the box, and projecting onto a convex set
        that contains the centre brings no point farther from it.

        Args:
            perturbed: [B, C, H, W], any values.
            images: [B, C, H, W] in [0, 1], the centres.

        Returns:
            [B, C, H, W] in [0, 1], within ``epsilon`` of ``images``.
        """
        if self.norm == "linf":
            inside = torch.minimum(torch.maximum(perturbed, images - self.epsilon), images + self.epsilon)
        else:
            offset = perturbed - images
            inside = images + offset * (self.epsilon / _lengths(offset)).clamp(max=1.0)
        return inside.clamp(0.0, 1.0)

    def random_point(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A point drawn uniformly from each image's ball, then clipped to [0, 1].

        L∞: independent uniform pixels (Madry et al. 2017). L2: a uniform direction with radius ε·u^(1/n), which is
        uniform in volume in n dimensions.
        """
        if self.norm == "linf":
            offset = _uniform(images, generator) * (2 * self.epsilon) - self.epsilon
        else:
            direction = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
            radius = _uniform(images[:, :1, :1, :1], generator) ** (1 / images[0].numel())
            offset = direction / _lengths(direction) * (self.epsilon * radius)
        return self.project(images + offset, images)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """The direction of length 1 in this norm along which a linear function rises fastest.

        The sign in L∞, the normalised gradient in L2; a zero gradient stays zero.
        """
        return gradient.sign() if self.norm == "linf" else gradient / _lengths(gradient)


def _lengths(vectors: torch.Tensor) -> torch.Tensor:
    """[B, 1, 1, 1] Euclidean lengths, kept away from zero."""
    lengths: torch.Tensor = vectors.flatten(1).norm(dim=1)
    return lengths.clamp_min(_SMALLEST_NORM).view(-1, 1, 1, 1)


def _uniform(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
