"""A small convolutional network for images of a few dozen pixels (digits, Omniglot)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from eat_dist.config import ModelConfig
from eat_dist.models.table import BACKBONES, Backbone, InputForm


@BACKBONES.register("convnet")
class ConvNet(Backbone):
    """Blocks of 3×3 convolution, BatchNorm and ReLU; all but the last halve the resolution by a stride of 2.

    A stride instead of pooling halves the time of a pass on a CPU: pooling would run at the finer resolution.

    Args:
        config: ``widths`` gives each block's channels.
        in_channels: 1 or 3.
    """

    input_form = InputForm(mean=(0.5,), std=(0.5,), channels=None)

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for position, width in enumerate(config.widths, start=1):
            stride = 2 if position < len(config.widths) else 1
            convolution = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            in_channels = width
        self.blocks = nn.Sequential(*layers)
        self.out_channels = in_channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, widths[−1], h, w]."""
        features: torch.Tensor = self.blocks(images)
        return features

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The blocks' last layers."""
        return [layer for layer in self.blocks if isinstance(layer, nn.ReLU)]
