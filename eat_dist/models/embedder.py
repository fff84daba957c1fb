"""One member's network: normalisation, backbone, pooling, linear head, length 1."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from eat_dist.config import ModelConfig
from eat_dist.errors import ConfigError
from eat_dist.models.execution import Execution
from eat_dist.models.pretrained import load_backbone_weights
from eat_dist.models.table import BACKBONES, Backbone, InputForm


class Embedder(nn.Module):
    """Maps images in [0, 1] to embeddings of length 1.

    Global average and maximum pooling are summed before the head, as in the official Proxy Anchor code. Images of one
    channel are repeated for a backbone that takes three.

    Args:
        config: Backbone, embedding dimension, input normalisation, whether BatchNorm is frozen. ``weights`` is not
            read: see :func:`build_embedder`.
        in_channels: Of the images; 1 or 3.

    Attributes:
        execution: How it computes; not saved with the weights (:func:`~eat_dist.models.apply_execution`).

    Raises:
        ConfigError: The backbone does not take such images, or mean or std has a wrong number of values.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        builder = BACKBONES[config.backbone]
        self.backbone: Backbone = builder(config, in_channels)
        form = self.backbone.input_form
        if in_channels not in (1, form.channels or in_channels):
            raise ConfigError(
                f"backbone '{config.backbone}' takes images of 1 or {form.channels} channels; the data have "
                f"{in_channels}. Choose another model.backbone."
            )
        channels = form.channels or in_channels
        for name, values in (("mean", config.mean or form.mean), ("std", config.std or form.std)):
            self.register_buffer(name, _in_pixels(name, values, form, channels), persistent=False)
        self.bgr = form.bgr
        self.head = nn.Linear(self.backbone.out_channels, config.embedding_dim)
        self.freeze_batch_norm = config.freeze_batch_norm
        self.execution = Execution()
        self.train_head_only(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] → [B, D] of length 1, both float32 (or both float64)."""
        embeddings = self.execution.run(self._project, self._normalised(images))
        return functional.normalize(embeddings.to(images.dtype), dim=1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] → the backbone's feature maps [B, out_channels, h, w], in the images' dtype."""
        return self.execution.run(self.backbone, self._normalised(images)).to(images.dtype)

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Feature maps [B, out_channels, h, w] → embeddings [B, D] of length 1, in the maps' dtype."""
        return functional.normalize(self._headed(features), dim=1)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        normalised = (images - self.mean) / self.std  # repeats a single channel, if the backbone takes three
        return normalised.flip(1) if self.bgr else normalised

    def _project(self, normalised: torch.Tensor) -> torch.Tensor:
        return self._headed(self.backbone(normalised))

    def _headed(self, features: torch.Tensor) -> torch.Tensor:
        pooled = functional.adaptive_avg_pool2d(features, 1) + functional.adaptive_max_pool2d(features, 1)
        projected: torch.Tensor = self.head(pooled.flatten(1))
        return projected

    def train(self, mode: bool = True) -> Embedder:
        """As ``nn.Module.train``, but a frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self._batch_norms():
                module.eval()
        return self

    def train_head_only(self, flag: bool) -> None:
        """Warm-up: while on, the backbone's parameters take no gradient.

        Turning it off leaves a frozen BatchNorm frozen. The official Proxy Anchor code then trains BatchNorm's weights
        and biases even where it froze them before; we do not. BatchNorm that is not frozen updates its statistics
        during a warm-up, as there.
        """
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not flag)
        if self.freeze_batch_norm:
            for module in self._batch_norms():
                module.requires_grad_(False)

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def build_embedder(config: ModelConfig, *, in_channels: int, generator: torch.Generator) -> Embedder:
    """A new embedder: weights drawn from ``generator`` alone, then the backbone's pretrained ones if configured.

    Convolutions and the head are Kaiming normal (fan-out), biases zero, as in the official Proxy Anchor head. The head
    is the same with and without pretrained weights.

    Raises:
        ConfigError: As :class:`Embedder`, or the backbone has no weights of that name.
        StorageError: The weights cannot be read or do not fit.
    """
    with torch.device("cpu"):
        model = Embedder(config, in_channels)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_out = module.weight.shape[0] * math.prod(module.weight.shape[2:])
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    load_backbone_weights(model.backbone, config)
    return model


def _in_pixels(name: str, values: tuple[float, ...], form: InputForm, channels: int) -> torch.Tensor:
    """A mean or std for pixels in [0, 1] and channels as the images have them, [1, channels, 1, 1]."""
    if len(values) not in (1, channels):
        expected = "1 value" if channels == 1 else f"1 or {channels} values"
        raise ConfigError(f"model.{name} must have {expected} here; got {len(values)}: {list(values)}")
    scaled = [value / form.scale for value in values] * (channels // len(values))
    if form.bgr:
        scaled.reverse()
    return torch.tensor(scaled).view(1, channels, 1, 1)
