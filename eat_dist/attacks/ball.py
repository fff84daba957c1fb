"""The set an attack may move in: an ε-ball around the image, cut with the pixel range [0, 1].

Every iterate of every attack goes through :meth:`Ball.project`; an attack is not trusted to stay inside by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from eat_dist.attacks.randomness import Generators, normal, uniform

Norm = Literal["linf", "l2", "l0"]

# Below this length a direction is noise: dividing by it would turn rounding errors into a full step.
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Ball:
    """An L∞, L2 or L0 ball of radius ``epsilon``, one around each image of a batch.

    L∞ and L2 are in pixel units (images in [0, 1]). In L0 ``epsilon`` is the share of the H·W pixels that may change
    at all, in all their channels (Papernot et al. 2016 call it γ): ⌊ε·H·W⌋ pixels.
    """

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
            [B, C, H, W] in [0, 1], within ``epsilon`` of ``images``, detached; new memory.
        """
        perturbed, images = perturbed.detach(), images.detach()
        if self.norm == "linf":
            inside = images - self.epsilon
            torch.maximum(inside, perturbed, out=inside)
            torch.minimum(inside, images + self.epsilon, out=inside)
        elif self.norm == "l2":
            inside = perturbed - images
            inside *= (self.epsilon / _lengths(inside)).clamp(max=1.0)
            inside += images
        else:
            inside = torch.where(self._most_changed(perturbed - images), perturbed, images)
        return inside.clamp_(0.0, 1.0)

    def random_point(self, images: torch.Tensor, generators: Generators) -> torch.Tensor:
        """A point drawn uniformly from each image's ball, then clipped to [0, 1].

        L∞: independent uniform pixels (Madry et al. 2017). L2: a uniform direction with radius ε·u^(1/n), which is
        uniform in volume in n dimensions. L0: uniform values at a uniform choice of pixels.
        """
        if self.norm == "l0":  # the pixels with the largest of independent numbers: a uniform choice
            chosen = self._most_changed(uniform(images[:, :1], generators).expand_as(images))
            return torch.where(chosen, uniform(images, generators), images)
        if self.norm == "linf":
            offset = uniform(images, generators) * (2 * self.epsilon) - self.epsilon
        else:
            direction = normal(images, generators)
            radius = uniform(images[:, :1, :1, :1], generators) ** (1 / images[0].numel())
            offset = direction / _lengths(direction) * (self.epsilon * radius)
        return self.project(images + offset, images)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """The direction of length 1 in this norm along which a linear function rises fastest.

        The sign in L∞, the normalised gradient in L2; a zero gradient stays zero, and what is not finite is taken for
        zero (:func:`finite`). Not defined in L0.
        """
        assert self.norm != "l0", "an L0 attack chooses its pixels itself"
        gradient = finite(gradient)
        return gradient.sign() if self.norm == "linf" else gradient / _lengths(gradient)

    def distances(self, perturbed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """[B] how far each perturbed image is from its centre, in the units of ``epsilon``."""
        offset = perturbed - images
        if self.norm == "l0":
            return (offset != 0).any(dim=1).flatten(1).float().mean(dim=1)
        distances: torch.Tensor = offset.flatten(1).norm(p=float("inf") if self.norm == "linf" else 2, dim=1)
        return distances

    def _most_changed(self, offset: torch.Tensor) -> torch.Tensor:
        """[B, 1, H, W] bool: the ⌊ε·H·W⌋ pixels of each image with the largest change in any channel."""
        change = offset.abs().amax(dim=1)
        height, width = change.shape[1:]
        count = int(self.epsilon * height * width + 1e-9)
        places = change.flatten(1).topk(count, dim=1).indices
        chosen = torch.zeros_like(change.flatten(1), dtype=torch.bool).scatter_(1, places, True)
        return chosen.view(-1, 1, height, width)


def _lengths(vectors: torch.Tensor) -> torch.Tensor:
    """[B, 1, 1, 1] Euclidean lengths, kept away from zero."""
    lengths: torch.Tensor = vectors.flatten(1).norm(dim=1)
    return lengths.clamp_min(_SMALLEST_NORM).view(-1, 1, 1, 1)


def finite(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient with zeros where it is not finite.

    One NaN would make the next iterate NaN, which is never the best, and so end the attack unseen.
    """
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
