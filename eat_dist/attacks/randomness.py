"""Random numbers for a batch of images: of the batch as a whole, or of each image by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from eat_dist.seeding import derive_seed


@dataclass(frozen=True)
class Interleaved:
    """The numbers of a part of a batch: those that a draw for the whole batch would give its images.

    Attributes:
        generator: Of the whole batch.
        index: The part's first image in the whole batch.
        step: The part holds every ``step``-th image from there on, and the whole batch ``step`` times as many.
    """

    generator: torch.Generator
    index: int
    step: int


Generators = torch.Generator | Interleaved | Sequence[torch.Generator]
"""One generator on the images' device, quick, as training has it; or one on the CPU for each image of the batch.

With one an image, what is drawn for an image does not depend on the images beside it or on the device: that is what
makes an evaluation independent of its batch size and of the number of workers.
"""


def uniform(like: torch.Tensor, generators: Generators | None) -> torch.Tensor:
    """Independent numbers in [0, 1) of the shape, dtype and device of ``like`` [B, …].

    None stands for torch's global generators, from which alone a model may draw at inference (:func:`seeded`).
    """
    return _draw(torch.rand, like, generators)


def normal(like: torch.Tensor, generators: Generators | None) -> torch.Tensor:
    """Independent standard normal numbers of the shape, dtype and device of ``like`` [B, …]; None as in uniform."""
    return _draw(torch.randn, like, generators)


def whole_batch(generators: Generators) -> np.random.Generator:
    """For numbers that belong to a batch as a whole, such as a permutation of it: on the CPU, whatever the device.

    Only the seed of what is given is read, so all parts of a batch get the same numbers. One generator an image is not
    for this.
    """
    generator = generators.generator if isinstance(generators, Interleaved) else generators
    assert isinstance(generator, torch.Generator), "a batch as a whole has one generator"
    return np.random.default_rng(derive_seed("of the whole batch", generator.initial_seed()))


@contextmanager
def seeded(generators: Generators, device: torch.device | str) -> Iterator[None]:
    """Seed what a model draws at inference: torch's global generators, as they were again afterwards.

    A randomised defence knows no generator but torch's own. Whoever attacks or measures one does it inside this
    context; then the numbers repeat, and nobody else's change. The model draws for a batch as a whole, so with a
    randomised model results do depend on the batch.

    The global generators belong to the process: not for several threads at once, so training does without.

    Args:
        generators: Those the attack gets. Only their seeds are read; what they draw stays the same.
        device: Where the model computes; the CPU's generator is seeded in any case.
    """
    if isinstance(generators, Interleaved):
        generators = generators.generator
    given = [generators] if isinstance(generators, torch.Generator) else generators
    seed = derive_seed("drawn by the model", *(generator.initial_seed() for generator in given))
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _draw(draw: object, like: torch.Tensor, generators: Generators | None) -> torch.Tensor:
    assert callable(draw)
    if generators is None or isinstance(generators, torch.Generator):
        drawn: torch.Tensor = draw(like.shape, generator=generators, device=like.device, dtype=like.dtype)
        return drawn
    if isinstance(generators, Interleaved):
        whole: torch.Tensor = draw(
            (len(like) * generators.step, *like.shape[1:]),
            generator=generators.generator,
            device=like.device,
            dtype=like.dtype,
        )
        return whole[generators.index :: generators.step]
    assert len(generators) == len(like), f"{len(generators)} generators for {len(like)} images"
    rows = [draw(like.shape[1:], generator=generator, dtype=like.dtype) for generator in generators]
    return torch.stack(rows).to(like.device) if rows else torch.empty_like(like)
