"""Embedding a whole set of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from eat_dist.attacks import frozen
from eat_dist.data.images import ImageSet


def embed_images(
    models: Sequence[nn.Module], images: ImageSet, *, batch_size: int, device: torch.device | str
) -> list[torch.Tensor]:
    """Embed every image with each model, in evaluation mode, without gradients; the models' modes are restored.

    Every image is decoded once, however many models there are.

    Args:
        models: On ``device``; each maps images in [0, 1] to [B, D].
        images: N images.
        batch_size: Images of one forward pass.
        device: Where the models are.

    Returns:
        For each model [N, D] float32 on the CPU, in the order of the images.
    """
    batches = (images.batch(indices, device).images for indices in batch_indices(len(images), batch_size))
    embedded = [[embed_batch(model, batch) for model in models] for batch in batches]
    return [torch.cat(of_model) for of_model in zip(*embedded, strict=True)]


def embed_batch(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Embed [B, C, H, W] images in [0, 1], on the model's device: [B, D] float32 on the CPU."""
    with frozen(model), torch.no_grad():
        embeddings: torch.Tensor = model(images)
    return embeddings.float().cpu()


def batch_indices(count: int, batch_size: int) -> Iterator[torch.Tensor]:
    """0 … count − 1 in consecutive runs of ``batch_size``; the last may be shorter."""
    for first in range(0, count, batch_size):
        yield torch.arange(first, min(first + batch_size, count))
