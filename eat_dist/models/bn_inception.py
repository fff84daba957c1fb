"""BN-Inception, from the table of the Batch Normalization paper, with the names of the published Caffe weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from eat_dist.config import ModelConfig
from eat_dist.errors import ConfigError
from eat_dist.models.table import BACKBONES, Backbone, InputForm


class _Block(NamedTuple):
    """One inception block: output channels of its convolutions. 0 in ``one`` and ``proj`` makes it halve the grid."""

    name: str
    one: int
    reduce: int
    three: int
    double_reduce: int
    double: int
    pool: str
    proj: int

    @property
    def stride(self) -> int:
        return 1 if self.one else 2

    def out_channels(self, in_channels: int) -> int:
        """Channels of the concatenation: a pooling without projection passes the block's input on."""
        return self.one + self.three + self.double + (self.proj or in_channels)


BLOCKS = (
    #      name  1×1  3×3 reduce  3×3  double reduce  double  pool  projection
    _Block("3a", 64, 64, 64, 64, 96, "avg", 32),
    _Block("3b", 64, 64, 96, 64, 96, "avg", 64),
    _Block("3c", 0, 128, 160, 64, 96, "max", 0),
    _Block("4a", 224, 64, 96, 96, 128, "avg", 128),
    _Block("4b", 192, 96, 128, 96, 128, "avg", 128),
    _Block("4c", 160, 128, 160, 128, 160, "avg", 128),
    _Block("4d", 96, 128, 192, 160, 192, "avg", 128),
    _Block("4e", 0, 128, 192, 192, 256, "max", 0),
    _Block("5a", 352, 192, 320, 160, 224, "avg", 128),
    _Block("5b", 352, 192, 320, 192, 224, "max", 128),
)


@BACKBONES.register("bn_inception")
class BNInception(Backbone):
    """BN-Inception (Ioffe & Szegedy 2015, appendix, figure 5) up to block 5b; 1/32 of the resolution.

    Deviations from the paper, all as in the published weights (converted from Caffe; Cadene's pretrained-models): the
    poolings of 4c and 4d project to 128 channels, so that 4c, 4d and 4e have 608, 608 and 1056 channels (figure 5:
    576, 576 and 1024); the first convolution is a full 7×7, not a separable one; convolutions have a bias, which
    BatchNorm makes redundant; poolings that halve the grid round up. BatchNorm's momentum is torch's default 0.1, as
    in those weights' later code; the official Proxy Anchor code has 0.9, which matters only where it is not frozen.

    Args:
        config: Not read.
        in_channels: Not read; it takes 3 channels.
    """

    # Caffe's own: pixels of 0-255, blue first.
    input_form = InputForm(mean=(104.0, 117.0, 128.0), std=(1.0,), scale=255.0, bgr=True)
    imagenet_url = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, kernel=7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64)
        self._add("conv2_3x3", 64, 192, kernel=3)
        channels = 192
        for block in BLOCKS:
            prefix = f"inception_{block.name}"
            if block.one:
                self._add(f"{prefix}_1x1", channels, block.one)
            self._add(f"{prefix}_3x3_reduce", channels, block.reduce)
            self._add(f"{prefix}_3x3", block.reduce, block.three, kernel=3, stride=block.stride)
            self._add(f"{prefix}_double_3x3_reduce", channels, block.double_reduce)
            self._add(f"{prefix}_double_3x3_1", block.double_reduce, block.double, kernel=3)
            self._add(f"{prefix}_double_3x3_2", block.double, block.double, kernel=3, stride=block.stride)
            if block.proj:
                self._add(f"{prefix}_pool_proj", channels, block.proj)
            channels = block.out_channels(channels)
        self.outputs = nn.ModuleList(nn.Identity() for _ in BLOCKS)  # a block's output is no other module's
        self.out_channels = channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] → [B, 1024, H/32, W/32].

        Raises:
            ConfigError: 3c or 4e would have to halve an odd grid, where convolution and pooling round differently.
        """
        height, width = images.shape[-2:]
        # Multiples of 32, one less, or up to 6 more: the stem rounds those to the same even grids.
        if (height + 1) % 32 > 7 or (width + 1) % 32 > 7 or min(height, width) < 31:
            raise ConfigError(
                f"bn_inception takes images whose sides are multiples of 32 pixels; got {height}×{width}. "
                f"Set data.image_size, to 224 for instance."
            )
        features = _halve(self._unit("conv1_7x7_s2", images))
        features = _halve(self._unit("conv2_3x3", self._unit("conv2_3x3_reduce", features)))
        for block, output in zip(BLOCKS, self.outputs, strict=True):
            features = output(self._inception(block, features))
        return features

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The inception blocks' outputs."""
        return list(self.outputs)

    def _inception(self, block: _Block, features: torch.Tensor) -> torch.Tensor:
        prefix = f"inception_{block.name}"
        branches = [self._unit(f"{prefix}_1x1", features)] if block.one else []
        for branch in (("3x3_reduce", "3x3"), ("double_3x3_reduce", "double_3x3_1", "double_3x3_2")):
            output = features
            for unit in branch:
                output = self._unit(f"{prefix}_{unit}", output)
            branches.append(output)
        if block.stride == 2:
            pooled = _halve(features)
        elif block.pool == "max":
            pooled = functional.max_pool2d(features, 3, stride=1, padding=1)
        else:
            pooled = functional.avg_pool2d(features, 3, stride=1, padding=1)  # the border's zeros count, as in Caffe
        branches.append(self._unit(f"{prefix}_pool_proj", pooled) if block.proj else pooled)
        return torch.cat(branches, dim=1)

    def _add(self, name: str, in_channels: int, out_channels: int, *, kernel: int = 1, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(out_channels))

    def _unit(self, name: str, images: torch.Tensor) -> torch.Tensor:
        """Convolution, BatchNorm, ReLU."""
        convolved = self.get_submodule(name)(images)
        return functional.relu(self.get_submodule(f"{name}_bn")(convolved), inplace=True)


def _halve(features: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(features, 3, stride=2, ceil_mode=True)
