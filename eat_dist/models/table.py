"""The backbones by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eat_dist.config import ModelConfig
from eat_dist.registry import Registry

BACKBONES: Registry[Callable[[ModelConfig, int], torch.nn.Module]] = Registry("backbone")
"""Name → builder(config, input channels) of a module [B, C, H, W] → [B, features, h, w] with ``out_channels``."""
