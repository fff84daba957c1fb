"""Resampling images by two matrices, one for the rows and one for the columns, of each image its own.

A matrix [K, N] makes K pixels of N. Resizing, cropping, padding and blurring along an axis are such matrices; the
gradient is exact, and equal on every run.
"""

from __future__ import annotations

import torch


def resample(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] images, [B, H', H] and [B, W', W] → [B, C, H', W'] = rows · image · columnsᵀ."""
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def nearest(length: int, *, canvas: int, resized: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Resize to the nearest pixel and pad with zeros.

    Args:
        length: N, pixels there are.
        canvas: K, pixels in the end.
        resized: [B] int64, pixels after resizing, at most K.
        offset: [B] int64, zeros before them.

    Returns:
        [B, K, N] float32: a 1 in a row where there is a pixel, none in the padding. Pixel i of the resized image is
        pixel ⌊i·N/resized⌋.
    """
    place = torch.arange(canvas, device=resized.device) - offset[:, None]
    inside = (place >= 0) & (place < resized[:, None])
    source = (place * length).div(resized[:, None], rounding_mode="floor").clamp(0, length - 1)
    return torch.nn.functional.one_hot(source, length).float() * inside[:, :, None]


def linear(length: int, *, count: int, start: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
    """Linear interpolation of a stretch of the axis, cut out first: at its ends its outermost pixels go on.

    Args:
        length: N, pixels there are.
        count: K, pixels that the stretch becomes.
        start: [B] float32, where it begins, at least 0; pixel i lies from i to i + 1.
        extent: [B] float32, how long it is, at least 1; it ends within the image.

    Returns:
        [B, K, N] float32; each row sums to 1.
    """
    start, extent = start[:, None], extent[:, None]
    centres = start + (torch.arange(count, device=start.device) + 0.5) * extent / count - 0.5
    centres = torch.minimum(torch.maximum(centres, start), start + extent - 1)
    distances = (centres[:, :, None] - torch.arange(length, device=start.device)).abs()
    return (1 - distances).clamp_min(0)


def gaussian(length: int, *, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of [B] widths in pixels, over what the image holds: [B, N, N] float32, each row sums to 1."""
    places = torch.arange(length, device=sigma.device)
    weights = (-0.5 * ((places[:, None] - places) / sigma[:, None, None]) ** 2).exp()
    return weights / weights.sum(dim=2, keepdim=True)


def whole(drawn: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Whole numbers 0 … count − 1, int64, from ``drawn`` in [0, 1): equally likely."""
    numbers = (drawn * count).long()
    return torch.minimum(numbers, torch.as_tensor(count, device=drawn.device) - 1)
