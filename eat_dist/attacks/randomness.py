"""Random numbers for a batch of images: of the batch as a whole, or of each image by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator on the images' device, quick, as training has it; or one on the CPU for each image of the batch.

With one an image, what is drawn for an image does not depend on the images beside it or on the device: that is what
makes an evaluation independent of its batch size and of the number of workers.
"""


def uniform(like: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Independent numbers in [0, 1) of the shape, dtype and device of ``like`` [B, …]."""
    return _draw(torch.rand, like, generators)


def normal(like: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Independent standard normal numbers of the shape, dtype and device of ``like`` [B, …]."""
    return _draw(torch.randn, like, generators)


def of_rows(generators: Generators, rows: Sequence[int]) -> Generators:
    """The generators of some images of the batch; the batch's own, if there is only one."""
    return generators if isinstance(generators, torch.Generator) else [generators[row] for row in rows]


def _draw(draw: object, like: torch.Tensor, generators: Generators) -> torch.Tensor:
    assert callable(draw)
    if isinstance(generators, torch.Generator):
        drawn: torch.Tensor = draw(like.shape, generator=generators, device=like.device, dtype=like.dtype)
        return drawn
    assert len(generators) == len(like), f"{len(generators)} generators for {len(like)} images"
    rows = [draw(like.shape[1:], generator=generator, dtype=like.dtype) for generator in generators]
    return torch.stack(rows).to(like.device) if rows else torch.empty_like(like)
