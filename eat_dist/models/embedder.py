"""One member's network: normalisation, backbone, pooling, linear head, length 1."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from eat_dist.config import ModelConfig
from eat_dist.models.table import BACKBONES, Backbone


class Embedder(nn.Module):
    """Maps images in [0, 1] to embeddings of length 1.

    Global average and maximum pooling are summed before the head, as in the official Proxy Anchor code.

    Args:
        config: Backbone, embedding dimension, mean and std of the input normalisation.
        in_channels: 1 or 3.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, in_channels, 1, 1), config.mean), persistent=False)
        self.register_buffer("std", torch.full((1, in_channels, 1, 1), config.std), persistent=False)
        self.backbone: Backbone = BACKBONES[config.backbone](config, in_channels)
        self.head = nn.Linear(self.backbone.out_channels, config.embedding_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] → [B, D] of length 1."""
        features = self.backbone((images - self.mean) / self.std)
        pooled = functional.adaptive_avg_pool2d(features, 1) + functional.adaptive_max_pool2d(features, 1)
        return functional.normalize(self.head(pooled.flatten(1)), dim=1)


def build_embedder(config: ModelConfig, *, in_channels: int, generator: torch.Generator) -> Embedder:
    """A freshly initialised embedder whose weights depend on ``generator`` alone.

    Convolutions and the head are Kaiming normal (fan-out), biases zero, as in the official Proxy Anchor head.
    """
    with torch.device("cpu"):
        model = Embedder(config, in_channels)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_out = module.weight.shape[0] * math.prod(module.weight.shape[2:])
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
