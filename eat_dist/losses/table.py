"""The losses by name, the options each takes, and the form they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from eat_dist.config import LossConfig
from eat_dist.losses.pairs import PairLoss
from eat_dist.registry import Registry, own_options


class MetricLoss(Protocol):
    """A metric loss as the training step sees it; an ``nn.Module`` whose parameters, if any, are its proxies."""

    def __call__(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings [B, D], labels [B] int64 → scalar.

        Weights [B] ≥ 0, not all 0: an image counts as w_x images. Only where :func:`supports_weights`.
        """
        ...

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """How near each class is, in [-1, 1], [B, D] → [B, C]: to its proxies, or to its centroid (pair losses)."""
        ...

    def observe(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Note where the member's own images lie, [B, D] and [B], once an iteration. Nothing to do for proxies."""
        ...


Build = TypeVar("Build", bound=Callable[..., torch.nn.Module])


@dataclass(frozen=True)
class LossEntry:
    """A loss of the table.

    Attributes:
        build: Options by name → the loss. A proxy loss also takes ``num_classes``, ``embedding_dim`` and
            ``generator``; a pair loss gives the library's loss, which :class:`PairLoss` then wraps.
        options: The fields of :class:`LossConfig` that it takes, with its own defaults.
        pairs: It compares the images of a batch with each other and has no proxies.
    """

    build: Callable[..., torch.nn.Module]
    options: Mapping[str, float]
    pairs: bool


LOSSES: Registry[LossEntry] = Registry("loss")


def register(name: str, *, pairs: bool = False, **options: float) -> Callable[[Build], Build]:
    """Decorator that adds a loss to the table under ``name``, with the options it takes and their defaults."""

    def add(build: Build) -> Build:
        LOSSES.register(name)(LossEntry(build, options, pairs))
        return build

    return add


def make_loss(
    config: LossConfig, *, num_classes: int, embedding_dim: int, generator: torch.Generator
) -> torch.nn.Module:
    """Build the configured loss, of the form :class:`MetricLoss`.

    Args:
        config: Name and options; an option that is None takes the loss's own default.
        num_classes: C.
        embedding_dim: D.
        generator: Draws the initial proxies, alone: torch's global generator is not touched.

    Raises:
        ConfigError: As :func:`check_loss`.
    """
    entry, options = LOSSES[config.name], _options(config)
    if entry.pairs:
        return PairLoss(entry.build(**options), num_classes=num_classes, embedding_dim=embedding_dim)
    return entry.build(**options, num_classes=num_classes, embedding_dim=embedding_dim, generator=generator)


def check_loss(config: LossConfig) -> None:
    """Refuse what :func:`make_loss` would refuse, without building anything.

    Raises:
        ConfigError: No such loss, or an option is set that it does not take.
    """
    _options(config)


def is_pair_loss(name: str) -> bool:
    """Whether the loss compares the images of a batch with each other, so that each needs a partner of its class.

    Raises:
        ConfigError: No such loss.
    """
    return LOSSES[name].pairs


def supports_weights(name: str) -> bool:
    """Whether the loss takes a weight an image (the transfer rule ``class_risk``). A pair has two: no pair loss does.

    Raises:
        ConfigError: No such loss.
    """
    return not LOSSES[name].pairs


def _options(config: LossConfig) -> dict[str, float]:
    given = config.model_dump(exclude={"name"}, exclude_none=True)
    defaults = LOSSES[config.name].options
    return own_options(LOSSES.kind, config.name, section="loss", defaults=defaults, given=given)
