"""Rounding and JPEG: transforms without a useful gradient, so their backward pass is the identity (BPDA)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from eat_dist.attacks import straight_through


def rounded(images: torch.Tensor, steps: torch.Tensor | int) -> torch.Tensor:
    """Values of [B, C, H, W] images rounded to multiples of 1/steps; ``steps`` is broadcast against them."""
    with torch.no_grad():
        exact = (images * steps).round() / steps
    return straight_through(images, exact)


def jpeg(images: torch.Tensor, qualities: Sequence[int]) -> torch.Tensor:
    """[B, C, H, W] images, C = 1 or 3, through JPEG (libjpeg, 4:2:0), each at its quality in 1 … 100.

    It is done on the CPU, one image after another; values are rounded to 8 bits first.
    """
    with torch.no_grad():
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        done = [_through_jpeg(image, quality) for image, quality in zip(pixels, qualities, strict=True)]
        exact = torch.from_numpy(np.stack(done) if done else pixels).permute(0, 3, 1, 2)
        exact = exact.to(images.device, images.dtype) / 255
    return straight_through(images, exact)


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """[H, W, C] uint8, C = 1 or 3; the same after it."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
    with Image.open(file) as opened:
        return np.asarray(opened).reshape(image.shape)
