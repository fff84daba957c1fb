"""What the tests of single attacks share: a surface over the pixels themselves, and an undefended model of digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from eat_dist.attacks import Objective, Reading
from eat_dist.attacks.objectives import class_centroids, nearest_wrong_centroid
from eat_dist.data.load import load_dataset
from eat_dist.models import build_embedder
from eat_dist.seeding import generator
from small_runs import small_config, train_locally, weights


@dataclass
class Watched:
    """A surface over the pixels themselves, which remembers where it was read."""

    score: Callable[[torch.Tensor], torch.Tensor]
    read_at: list[torch.Tensor] = field(default_factory=list)
    draws: int = 1

    @contextmanager
    def held(self) -> Iterator[None]:
        with torch.enable_grad():
            yield

    def read(self, images: torch.Tensor) -> Reading:
        self.read_at.append(images.clone())
        images = images.detach().requires_grad_(True)
        values = self.score(images.flatten(1))
        (gradient,) = torch.autograd.grad(values.sum(), images)
        return Reading(values.detach(), gradient, None)

    def values(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.score(images.flatten(1))


def per_image(count: int) -> list[torch.Generator]:
    return [generator(0, "image", index) for index in range(count)]


def undefended(folder: Path) -> tuple[nn.Module, torch.Tensor, Objective]:
    """Trained without a defence, 64 digits of the classes it learned, and what makes a wrong centroid the nearest."""
    config = small_config(
        "ensemble.members=1",
        "defense.name=natural",
        "train.epochs=12",
        "optimiser.learning_rate=0.005",
        "model.widths=[16,32]",
    )
    train_locally(config, folder)
    model = build_embedder(config.model, in_channels=1, generator=generator(0)).eval()
    model.load_state_dict(weights(folder, members=1)[0])
    train = load_dataset(config.data).train
    batch = train.batch(torch.arange(len(train)), "cpu")
    with torch.no_grad():
        centroids = class_centroids(model(batch.images), batch.labels, train.num_classes)
    return model, batch.images[:64], nearest_wrong_centroid(centroids, batch.labels[:64])
