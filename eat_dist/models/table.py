"""The backbones by name, and the form they share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from eat_dist.config import ModelConfig
from eat_dist.registry import Registry


class Backbone(nn.Module):
    """Feature maps from normalised images.

    Attributes:
        out_channels: Channels of the feature maps.
    """

    out_channels: int

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, out_channels, h, w]."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it maps images to features")


BACKBONES: Registry[Callable[[ModelConfig, int], Backbone]] = Registry("backbone")
"""Name → builder(config, input channels)."""
