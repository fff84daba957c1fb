"""Attacked images to look at: clean, perturbation, attacked, and the nearest neighbours before and after."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from eat_dist.report.content import Picture, Strip
from eat_dist.report.reading import Showcase

AMPLIFIED = 10
# Pixels of a side at which a picture is kept; it is shown at under 100.
_NEIGHBOUR_SIDE = 160
_OWN_SIDE = 256
# Smaller ones are shown as the squares they are made of, larger ones smoothly.
_COARSE_SIDE = 64
Pixels = npt.NDArray[np.floating[Any]]


def strips(showcase: Showcase) -> list[Strip]:
    """One strip for every image of the showcase."""
    return [_strip(showcase, index) for index in range(len(showcase.names))]


def amplified(clean: Pixels, attacked: Pixels) -> Pixels:
    """The perturbation ×10 around grey: 0.5 + 10·(x̃ − x), cut to [0, 1]. Grey is an unchanged pixel."""
    return np.clip(0.5 + AMPLIFIED * (attacked - clean), 0, 1)


def data_uri(image: Pixels, *, most: int) -> str:
    """An image [C, H, W] in [0, 1] as a PNG in a data URI, one or three channels, rounded to 8 bits.

    Args:
        image: C is 1 (grey) or 3 (RGB); of another number the first channel is shown.
        most: A longer side is scaled down to this, in pixels.
    """
    pixels = np.rint(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    shown = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    picture = Image.fromarray(np.ascontiguousarray(shown))
    if max(picture.size) > most:
        picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _strip(showcase: Showcase, index: int) -> Strip:
    name = showcase.names[index]
    clean, attacked = (showcase.images[which][index] for which in ("clean", "attacked"))
    coarse = max(clean.shape[1:]) <= _COARSE_SIDE
    largest = float(np.abs(attacked - clean).max())
    itself = [
        Picture(data_uri(clean, most=_OWN_SIDE), "clean", f"{name}, clean", coarse=coarse),
        Picture(
            data_uri(amplified(clean, attacked), most=_OWN_SIDE),
            f"change ×{AMPLIFIED}",
            f"what was added, times {AMPLIFIED} around grey; at most {largest:.3g} a pixel",
            coarse=coarse,
        ),
        Picture(data_uri(attacked, most=_OWN_SIDE), "attacked", f"{name}, attacked", coarse=coarse),
    ]
    before, after = (_neighbours(showcase, index, which) for which in ("before", "after"))
    return Strip(name, itself, before, after)


def _neighbours(showcase: Showcase, index: int, which: str) -> list[Picture]:
    return [
        Picture(
            data_uri(image, most=_NEIGHBOUR_SIDE),
            f"{'✓' if right else '✗'} {rank}",
            f"neighbour {rank} {which} the attack: {'right' if right else 'wrong'} class",
            bool(right),
            coarse=max(image.shape[1:]) <= _COARSE_SIDE,
        )
        for rank, (image, right) in enumerate(
            zip(showcase.images[which][index], showcase.right[which][index], strict=True), start=1
        )
    ]
