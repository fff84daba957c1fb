"""Backward pass differentiable approximation (Athalye, Carlini & Wagner 2018, "Obfuscated gradients give a false sense
of security", section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from eat_dist.errors import ConfigError

Transform = Callable[[torch.Tensor], torch.Tensor]


def identity(images: torch.Tensor) -> torch.Tensor:
    """g(x) = x, the approximation where a defence changes an image only a little (section 4.1.1)."""
    return images


class Bpda(nn.Module):
    """A model behind a transform without useful gradient (rounding, compression), attackable all the same.

    The forward pass is the true one, model(transform(x)), to the bit. The backward pass goes through the model as it is
    and through ``backward`` in place of the transform. A randomised transform needs EOT as well: ``WhiteBox(draws=…)``.

    Args:
        transform: [B, C, H, W] → what the model takes; called without gradients.
        model: Differentiable.
        backward: Differentiable, near ``transform``, with an output of the same shape.
    """

    def __init__(self, transform: Transform, model: nn.Module, backward: Transform = identity) -> None:
        super().__init__()
        self.transform = transform
        self.model = model
        self.backward = backward

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] → the model's embeddings [B, D].

        Raises:
            ConfigError: The approximation's output has another shape than the transform's.
        """
        with torch.no_grad():
            exact = self.transform(images)
        approximate = self.backward(images)
        if approximate.shape != exact.shape:
            raise ConfigError(
                f"the backward approximation must give the transform's shape {tuple(exact.shape)}; "
                f"got {tuple(approximate.shape)}"
            )
        embeddings: torch.Tensor = self.model(straight_through(approximate, exact))
        return embeddings


def straight_through(approximate: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The value of ``exact``, to the bit, with the derivative of ``approximate``; of one shape."""
    substituted: torch.Tensor = _Substituted.apply(approximate, exact)
    return substituted


class _Substituted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, approximate: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
