"""The backbones by name, and the form they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from eat_dist.config import ModelConfig
from eat_dist.registry import Registry


@dataclass(frozen=True)
class InputForm:
    """What a backbone's filters expect of an image; :class:`~eat_dist.models.Embedder` makes it from pixels in [0, 1].

    Attributes:
        mean: Subtracted; one value for all channels or one a channel, in the units and channel order given below.
        std: Divides then; like ``mean``.
        scale: Pixels in [0, 1] are multiplied by this first (255 for filters learnt on 0-255).
        bgr: Channel order blue, green, red instead of red, green, blue.
        channels: Of an image; None takes what the data have.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0
    bgr: bool = False
    channels: int | None = 3


class Backbone(nn.Module, ABC):
    """Feature maps from normalised images.

    Attributes:
        out_channels: Channels of the feature maps.
        input_form: The images it takes.
        imagenet_url: Where weights learnt on ImageNet are published, with the start of the file's SHA-256 in its name;
            None where there are none.
    """

    out_channels: int
    input_form: InputForm
    imagenet_url: str | None = None

    @abstractmethod
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, out_channels, h, w]."""

    @property
    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """Modules whose outputs cut the network: all that comes later depends on the images through each of them."""


BACKBONES: Registry[Callable[[ModelConfig, int], Backbone]] = Registry("backbone")
"""Name → builder(config, channels of the images)."""
