"""What the tests of backbones and of pretrained weights share."""

from __future__ import annotations

from typing import Any

import torch

from eat_dist.config import ModelConfig
from eat_dist.models import (
    BACKBONES,
    Embedder,
    build_embedder,
)
from eat_dist.models.table import Backbone
from eat_dist.seeding import generator

# Ioffe & Szegedy 2015, figure 5, with what the published weights change: 4c and 4d project to 128 channels, so 4c, 4d
# and 4e put out 608, 608 and 1056. Columns: input, 1×1, 3×3 reduce, 3×3, double reduce, double, projection, output.
INCEPTION = {
    "3a": (192, 64, 64, 64, 64, 96, 32, 256),
    "3b": (256, 64, 64, 96, 64, 96, 64, 320),
    "3c": (320, 0, 128, 160, 64, 96, 0, 576),
    "4a": (576, 224, 64, 96, 96, 128, 128, 576),
    "4b": (576, 192, 96, 128, 96, 128, 128, 576),
    "4c": (576, 160, 128, 160, 128, 160, 128, 608),
    "4d": (608, 96, 128, 192, 160, 192, 128, 608),
    "4e": (608, 0, 128, 192, 192, 256, 0, 1056),
    "5a": (1056, 352, 192, 320, 160, 224, 128, 1024),
    "5b": (1024, 352, 192, 320, 192, 224, 128, 1024),
}


def bn_inception_shapes() -> dict[str, tuple[int, ...]]:
    """Every entry of the published file but the classifier: convolutions with bias, each with its BatchNorm."""
    layers = [("conv1_7x7_s2", 3, 64, 7), ("conv2_3x3_reduce", 64, 64, 1), ("conv2_3x3", 64, 192, 3)]
    for block, (channels, one, reduce, three, double_reduce, double, projection, _) in INCEPTION.items():
        layers += [
            (f"inception_{block}_{name}", inputs, outputs, kernel)
            for name, inputs, outputs, kernel in (
                ("1x1", channels, one, 1),
                ("3x3_reduce", channels, reduce, 1),
                ("3x3", reduce, three, 3),
                ("double_3x3_reduce", channels, double_reduce, 1),
                ("double_3x3_1", double_reduce, double, 3),
                ("double_3x3_2", double, double, 3),
                ("pool_proj", channels, projection, 1),
            )
            if outputs
        ]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs, kernel in layers:
        shapes |= {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}
        shapes |= {f"{name}_bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}_bn.num_batches_tracked"] = ()
    return shapes


def on_meta(name: str) -> Backbone:
    """Shapes without numbers: quick even for a large network."""
    with torch.device("meta"):
        return BACKBONES[name](ModelConfig(), 3)


def small(name: str = "convnet", **config: Any) -> ModelConfig:
    return ModelConfig(backbone=name, widths=(4, 8), embedding_dim=5, **config)


def built(config: ModelConfig, channels: int = 3, seed: int = 0) -> Embedder:
    return build_embedder(config, in_channels=channels, generator=generator(seed)).eval()


def random_images(size: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, size, size, generator=generator(0, "images"))
