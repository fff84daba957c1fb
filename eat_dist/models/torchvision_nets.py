"""torchvision's MobileNetV2 and ResNets without their classifiers.

Parameters keep torchvision's names, so that a state dict published for a whole network fits as it is. The ImageNet
weights are torchvision's first ones (IMAGENET1K_V1), which the official Proxy Anchor code trains from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models import (
    MobileNet_V2_Weights,
    ResNet18_Weights,
    ResNet50_Weights,
    mobilenet_v2,
    resnet18,
    resnet50,
)

from eat_dist.config import ModelConfig
from eat_dist.models.table import BACKBONES, Backbone, InputForm

_IMAGENET = InputForm(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@BACKBONES.register("mobilenet_v2")
class MobileNetV2(Backbone):
    """MobileNetV2 (Sandler et al., CVPR 2018, table 2) up to its last 1×1 convolution; 1/32 of the resolution.

    Args:
        config: Not read.
        in_channels: Not read; it takes 3 channels.
    """

    input_form = _IMAGENET
    out_channels = 1280
    imagenet_url = MobileNet_V2_Weights.IMAGENET1K_V1.url

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        self.features = mobilenet_v2().features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] → [B, 1280, ⌈H/32⌉, ⌈W/32⌉]."""
        features: torch.Tensor = self.features(images)
        return features

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The first convolution, the inverted residual blocks, the last convolution."""
        return list(self.features)


class _ResNet(Backbone):
    """A residual network (He et al., CVPR 2016, table 1) up to its last block; 1/32 of the resolution.

    As torchvision's: in the bottlenecks of ResNet-50 the 3×3 convolution has the stride, not the first 1×1.
    """

    input_form = _IMAGENET

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, stage in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, stage)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] → [B, out_channels, ⌈H/32⌉, ⌈W/32⌉]."""
        for stage in self.children():
            images = stage(images)
        return images

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The four groups of residual blocks."""
        return [child for name, child in self.named_children() if name.startswith("layer")]


@BACKBONES.register("resnet18")
class ResNet18(_ResNet):
    """ResNet-18.

    Args:
        config: Not read.
        in_channels: Not read; it takes 3 channels.
    """

    out_channels = 512
    imagenet_url = ResNet18_Weights.IMAGENET1K_V1.url

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__(resnet18())


@BACKBONES.register("resnet50")
class ResNet50(_ResNet):
    """ResNet-50.

    Args:
        config: Not read.
        in_channels: Not read; it takes 3 channels.
    """

    out_channels = 2048
    imagenet_url = ResNet50_Weights.IMAGENET1K_V1.url

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__(resnet50())
