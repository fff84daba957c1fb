"""The defenses at inference by name, the options each takes, and the form they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from eat_dist.attacks import Generators
from eat_dist.config import InferenceConfig
from eat_dist.registry import Registry, own_options

NONE = "none"

# Handled by :class:`eat_dist.inference.Defended` and by the training loop, not by a transform.
_OF_ALL = ("draws", "training")


class ImageTransform(nn.Module, ABC):
    """What a defense does to images. It has no parameters.

    Differentiable with respect to the images wherever that is useful; elsewhere its backward pass is an approximation
    (BPDA, :func:`eat_dist.attacks.straight_through`), so that a defended network can always be attacked.

    Attributes:
        randomised: Whether two calls differ.
    """

    randomised = True

    @abstractmethod
    def forward(self, images: torch.Tensor, generators: Generators | None = None) -> torch.Tensor:
        """Transform [B, C, H, W] images in [0, 1].

        Args:
            images: Not changed.
            generators: What is drawn comes from them alone, for each image by itself; None: from torch's global
                generators.

        Returns:
            [B, C, H', W'] in [0, 1].
        """


Build = TypeVar("Build", bound=Callable[..., ImageTransform])


@dataclass(frozen=True)
class InferenceEntry:
    """A defense of the table.

    Attributes:
        build: Options by name, and ``pool`` where it needs one (uint8 [P, C, H, W]) → the transform.
        options: The optional fields of :class:`InferenceConfig` that it takes, with its own defaults.
    """

    build: Callable[..., ImageTransform]
    options: Mapping[str, Any]


INFERENCE_DEFENSES: Registry[InferenceEntry] = Registry("defense at inference")


def register(name: str, **options: Any) -> Callable[[Build], Build]:
    """Decorator that adds a transform to the table under ``name``, with the options it takes and their defaults."""

    def add(build: Build) -> Build:
        INFERENCE_DEFENSES.register(name)(InferenceEntry(build, options))
        return build

    return add


@register(NONE)
class Unchanged(ImageTransform):
    """No defense."""

    randomised = False

    def forward(self, images: torch.Tensor, generators: Generators | None = None) -> torch.Tensor:
        """The images."""
        return images


def make_transform(config: InferenceConfig, *, pool: torch.Tensor | None) -> ImageTransform:
    """Build the configured transform.

    Args:
        config: Name and options; an option that is None takes the defense's own default.
        pool: uint8 [P, C, H, W], for a defense that needs one (:func:`needs_pool`).

    Raises:
        ConfigError: As :func:`check_inference`.
    """
    options = {name: value for name, value in options_of(config).items() if name not in (*_OF_ALL, "pool")}
    if needs_pool(config):
        assert pool is not None
        options["pool"] = pool
    return INFERENCE_DEFENSES[config.name].build(**options)


def check_inference(config: InferenceConfig) -> None:
    """Refuse what :func:`make_transform` would refuse, without building anything.

    Raises:
        ConfigError: No such defense, or an option is set that it does not take.
    """
    options_of(config)


def options_of(config: InferenceConfig) -> dict[str, Any]:
    """The configured defense's options: those that are set, its defaults for the others.

    Raises:
        ConfigError: As :func:`check_inference`.
    """
    given = config.model_dump(exclude={"name"}, exclude_none=True)
    defaults = INFERENCE_DEFENSES[config.name].options
    return own_options(INFERENCE_DEFENSES.kind, config.name, section="inference", defaults=defaults, given=given)


def needs_pool(config: InferenceConfig) -> bool:
    """Whether the defense mixes with training images, which are then part of the defended model."""
    return "pool" in INFERENCE_DEFENSES[config.name].options


def trained_through(config: InferenceConfig) -> bool:
    """Whether members are trained through the defense, too."""
    return bool(options_of(config).get("training", False))
