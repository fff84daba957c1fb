"""Embedding a batch of images."""

from __future__ import annotations

import torch
from torch import nn

from eat_dist.attacks import frozen


def embed_batch(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Embed [B, C, H, W] images in [0, 1], on the model's device: [B, D] float32 on the CPU."""
    with frozen(model), torch.no_grad():
        embeddings: torch.Tensor = model(images)
    return embeddings.float().cpu()
