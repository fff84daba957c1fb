"""A network behind a defense at inference, and where its random numbers come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from eat_dist.attacks import Generators
from eat_dist.config import InferenceConfig
from eat_dist.inference.table import ImageTransform, make_transform, options_of


class Defended(nn.Module):
    """f(x) = Σ_k g(t_k(x)) / ‖Σ_k g(t_k(x))‖ over ``draws`` random views t_k of the image, g the network.

    A transform without random numbers has one view. The parameters are the network's; ``model`` is the network as it
    was, undefended.

    Args:
        model: Images in [0, 1] → [B, D] of length 1.
        config: Which defense; not ``none``.
        pool: uint8 [P, C, H, W] clean images, where the defense needs them.
        generators: Where random numbers come from, asked at every call; None: torch's global generators.

    Attributes:
        settings: ``name`` and every option of the defense, defaults included; JSON-ready.
    """

    def __init__(
        self,
        model: nn.Module,
        config: InferenceConfig,
        *,
        pool: torch.Tensor | None = None,
        generators: Callable[[], Generators] | None = None,
    ) -> None:
        super().__init__()
        options = options_of(config)
        self.model = model
        self.settings: dict[str, Any] = json.loads(json.dumps({"name": config.name, **options}))
        self.transform: ImageTransform = make_transform(config, pool=pool)
        self.draws: int = options.get("draws", 1) if self.transform.randomised else 1
        self.generators = generators

    @property
    def randomised(self) -> bool:
        """Whether two calls differ."""
        return self.transform.randomised

    @property
    def pool(self) -> torch.Tensor | None:
        """The images that the defense mixes with."""
        return dict(self.transform.named_buffers()).get("pool")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] → [B, D] of length 1."""
        generators = None if self.generators is None else self.generators()
        embeddings: torch.Tensor = self.model(self.transform(images, generators))
        if self.draws == 1:
            return embeddings
        for _ in range(self.draws - 1):
            embeddings = embeddings + self.model(self.transform(images, generators))
        return functional.normalize(embeddings, dim=1)


def defenses_of(models: Iterable[nn.Module]) -> list[Defended]:
    """Every defended network within some models, each once."""
    modules = (module for model in models for module in model.modules())
    return list(dict.fromkeys(module for module in modules if isinstance(module, Defended)))


@contextmanager
def drawing(models: Iterable[nn.Module], generators: Generators) -> Iterator[None]:
    """Have what is defended within the models draw from ``generators`` inside, and as before afterwards.

    With one generator an image, what is drawn for an image depends neither on its batch nor on the device.
    """
    before = [(module, module.generators) for module in defenses_of(models)]
    try:
        for module, _ in before:
            module.generators = lambda: generators
        yield
    finally:
        for module, source in before:
            module.generators = source
