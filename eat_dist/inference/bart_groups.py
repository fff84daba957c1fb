"""The transform groups of BaRT (Raff et al. 2019, appendix), each a function of a batch.

``group(images [B, C, H, W] in [0, 1], drawn [B, 8] in [0, 1), noise [B, C + 1, H, W] standard normal)`` → images of the
same shape, which the caller clips. An image's result depends on its own row alone. Ranges are those of the published
code, which is for photographs of 256 pixels; lengths are scaled to the image's size. Differentiable, or with the
identity as backward pass (BPDA) where that is said.

Left out, for want of a differentiable or quick form in the libraries we have: seam carving, XYZ and LAB, adaptive
histogram equalisation, and of the denoisers the bilateral, total-variation, wavelet and non-local-means ones. The
random mask of the FFT group is left out since it has no effect in the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from eat_dist.attacks import straight_through
from eat_dist.inference.compression import jpeg, rounded
from eat_dist.inference.resampling import gaussian, linear, resample, whole

Group = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Pixels of a side of the photographs that the published ranges are for.
_SIDE = 256


def colour_precision(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Values rounded to multiples of 1/s, s in 8 … 200, for all channels alike or for each (BPDA identity)."""
    channels = images.shape[1]
    steps = 8 + whole(drawn[:, 1 : 1 + channels], 193)
    steps = torch.where(drawn[:, :1] < 0.5, steps[:, :1], steps)
    return rounded(images, steps[:, :, None, None])


def jpeg_noise(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """JPEG at a quality in 55 … 95 (BPDA identity)."""
    return jpeg(images, (55 + whole(drawn[:, 0], 41)).tolist())


def swirl(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A turn by s·e^(−5ρ / (R·ln 2)) at distance ρ from a centre: s in [0.01, 2], R in [10, 200]/256 of the side."""
    height, width = images.shape[2:]
    strength, radius = _between(drawn[:, 0], 0.01, 2.0), _between(drawn[:, 1], 10, 200) / _SIDE * max(height, width)
    across = torch.arange(width, dtype=images.dtype, device=images.device) - (drawn[:, 2] * (width - 1))[:, None]
    down = torch.arange(height, dtype=images.dtype, device=images.device) - (drawn[:, 3] * (height - 1))[:, None]
    x, y = across[:, None, :], down[:, :, None]
    distance = (x**2 + y**2).sqrt()
    angle = strength[:, None, None] * (-distance * 5 / (radius[:, None, None] * math.log(2))).exp()
    moved_x = x * angle.cos() - y * angle.sin() + (drawn[:, 2] * (width - 1))[:, None, None]
    moved_y = x * angle.sin() + y * angle.cos() + (drawn[:, 3] * (height - 1))[:, None, None]
    grid = torch.stack([(2 * moved_x + 1) / width - 1, (2 * moved_y + 1) / height - 1], dim=3)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def noise_injection(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gaussian (σ = 0.1), shot, salt, pepper, salt and pepper (5 % of the values), or speckle noise (σ = 0.1).

    Shot noise is the normal approximation of a Poisson count of 256 a unit, of a spread that the backward pass takes
    for a constant: its slope is infinite at 0.
    """
    one, noise = torch.ones_like(images), noise[:, :-1]
    low, high = noise < -1.96, noise > 1.96  # 2.5 % each
    return _choose(
        drawn[:, 0],
        images + 0.1 * noise,
        images + (images.detach() / 256).sqrt() * noise,
        torch.where(low | high, one, images),
        torch.where(low | high, 0 * one, images),
        torch.where(high, one, torch.where(low, 0 * one, images)),
        images + 0.1 * images * noise,
    )


def fft_perturbation(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Frequencies above k cycles a pixel removed, k in [0, 0.95] a channel; the others times a factor in [0.98, 1.02].

    From k = ½ on all of them stay. The mean always does: in the published code it may be lost to rounding.
    """
    channels, height, width = images.shape[1:]
    keep = 0.95 * drawn[:, :channels, None, None]
    rows, columns = (torch.fft.fftfreq(length, device=images.device).abs() for length in (height, width))
    kept = (rows[:, None] <= keep) & (columns <= keep)
    factor = _between(torch.special.ndtr(noise[:, -1:]), 0.98, 1.02)
    perturbed: torch.Tensor = torch.fft.ifft2(torch.fft.fft2(images) * kept * factor).real
    return perturbed


def zoom(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Between 10/256 and 50/256 cut off at each side, the rest scaled up linearly."""
    cut = _between(drawn[:, :4], 10, 50) / _SIDE
    matrices = [
        linear(length, count=length, start=length * before, extent=length * (1 - before - after))
        for length, before, after in zip(images.shape[2:], cut[:, :2].unbind(1), cut[:, 2:].unbind(1), strict=True)
    ]
    return resample(images, *matrices)


def colour_space(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Hue, saturation and value moved by ± 0.05, 0.25, 0.25 (BPDA identity), or Y, U and V by ± 0.05, 0.02, 0.02.

    Hue has no derivative at grey, and an enormous one near it.
    """
    shift = 2 * drawn[:, 1:4] - 1
    with torch.no_grad():
        hsv = _to_hsv(images) + (shift * shift.new_tensor([0.05, 0.25, 0.25]))[:, :, None, None]
        moved = _from_hsv(torch.cat([hsv[:, :1], hsv[:, 1:].clamp(0, 1)], dim=1))
    y, u, v = (shift * shift.new_tensor([0.05, 0.02, 0.02])).unbind(1)
    # ITU-R BT.601; moving Y, U and V adds the same to every pixel.
    added = torch.stack([y + 1.13988 * v, y - 0.39465 * u - 0.58060 * v, y + 2.03211 * u], dim=1)
    return _choose(drawn[:, 0], straight_through(images, moved), images + added[:, :, None, None])


def contrast(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Histogram equalisation of each channel in 40 … 256 bins (BPDA identity), or contrast stretching.

    Stretching maps the values between two ranks of the image, its 1 … 4 % and its 96 … 99 %, to [0, 1]; an image where
    those are equal stays as it is.
    """
    flat = images.flatten(2)
    bins = 40 + whole(drawn[:, 1], 217)[:, None, None]
    with torch.no_grad():
        place = whole(flat.clamp(0, 1 - 1e-6), bins)
        counts = torch.zeros(*flat.shape[:2], 256, dtype=images.dtype, device=images.device)
        share = counts.scatter_add_(2, place, torch.ones_like(flat)).cumsum(2) / flat.shape[2]
        equalised = share.gather(2, place).view_as(images)
    ranked = images.flatten(1).sort(dim=1).values
    last = ranked.shape[1] - 1
    low, high = (
        ranked.gather(1, (share_below * last).long()[:, None])[:, :, None, None]
        for share_below in (_between(drawn[:, 2], 0.01, 0.04), _between(drawn[:, 3], 0.96, 0.99))
    )
    span = high - low
    stretched = torch.where(span > 1e-3, (images - low) / span.clamp_min(1e-3), images)
    return _choose(drawn[:, 0], straight_through(images, equalised), stretched)


def grey_scale(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Channels mixed to grey with random weights: wholly, in part, all but one channel, or one channel in part."""
    weights, share = drawn[:, 1:4] + 1e-6, drawn[:, 4:7]
    one = functional.one_hot(whole(drawn[:, 7], 3), 3).to(images.dtype)
    others = 1 - one
    grey = [(images * (w / w.sum(1, keepdim=True))[:, :, None, None]).sum(1, keepdim=True) for w in _pair(weights, one)]
    kept = (
        (torch.zeros_like(share), grey[0]),
        (share.clamp_min(0.2), grey[0]),
        (one, grey[1]),
        (others + one * (1 - _between(share, 0.1, 0.9)), grey[1]),
    )
    mixed = [images * own[:, :, None, None] + of * (1 - own[:, :, None, None]) for own, of in kept]
    return _choose(drawn[:, 0], *mixed)


def denoising(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of σ in [0.1, 2]·side/256 (at least up to 0.5), or a median or mean of a square.

    The square has the radius 2.5·side/256, rounded, at least 1 pixel.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    sigma = _between(drawn[:, 1], 0.1, max(0.5, 2 * side / _SIDE))
    blurred = resample(images, gaussian(height, sigma=sigma), gaussian(width, sigma=sigma))
    radius = max(1, round(2.5 * side / _SIDE))
    size = 2 * radius + 1
    padded = functional.pad(images, (radius, radius, radius, radius), mode="reflect")
    around = padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4)
    return _choose(drawn[:, 0], blurred, around.median(dim=4).values, around.mean(dim=4))


COLOUR_GROUPS: tuple[Group, ...] = (colour_space, grey_scale)
"""Those that need three channels."""

GROUPS: tuple[Group, ...] = (
    colour_precision,
    jpeg_noise,
    swirl,
    noise_injection,
    fft_perturbation,
    zoom,
    colour_space,
    contrast,
    grey_scale,
    denoising,
)


def _between(drawn: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * drawn


def _choose(drawn: torch.Tensor, *variants: torch.Tensor) -> torch.Tensor:
    """For each image one of the variants, equally likely."""
    rows = torch.arange(len(drawn), device=drawn.device)
    return torch.stack(variants)[whole(drawn, len(variants)), rows]


def _pair(weights: torch.Tensor, one: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of all channels, and without the one chosen."""
    return weights, weights * (1 - one)


def _to_hsv(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] RGB → hue, saturation, value; hue in [0, 1), 0 for grey."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    divisor = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(
        value == red,
        (green - blue) / divisor % 6,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    saturation = chroma / torch.where(value > 0, value, torch.ones_like(value))
    return torch.stack([hue / 6, saturation, value], dim=1)


def _from_hsv(images: torch.Tensor) -> torch.Tensor:
    """The inverse; hue is taken modulo 1."""
    hue, saturation, value = images.unbind(1)
    channels = []
    for offset in (5, 3, 1):
        k = (offset + 6 * hue) % 6
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)
