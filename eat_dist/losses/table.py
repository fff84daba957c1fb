"""The losses by name, and the form they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from eat_dist.config import LossConfig
from eat_dist.registry import Registry


class ProxyLoss(Protocol):
    """A metric loss with one learnable proxy a class; an ``nn.Module`` whose only parameter is ``proxies``."""

    proxies: torch.nn.Parameter

    def __call__(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings [B, D], labels [B], optional weights [B] → scalar."""
        ...

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosine similarities to the proxies, [B, D] → [B, C]."""
        ...

    def parameters(self, recurse: bool = True) -> object: ...  # noqa: D102


LOSSES: Registry[Callable[..., torch.nn.Module]] = Registry("loss")


def make_loss(
    config: LossConfig, *, num_classes: int, embedding_dim: int, generator: torch.Generator
) -> torch.nn.Module:
    """Build the configured loss with proxies drawn from ``generator``."""
    return LOSSES[config.name](config, num_classes=num_classes, embedding_dim=embedding_dim, generator=generator)
