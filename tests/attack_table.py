"""The small model, images and objectives that the tests of attacks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from eat_dist.attacks import Objective, Reading, WhiteBox
from eat_dist.attacks.objectives import (
    class_centroids,
    displacement,
    draw_wrong_classes,
    nearest_negative,
    nearest_wrong_centroid,
    proxy_anchor,
    random_wrong_centroid,
)
from eat_dist.config import ModelConfig
from eat_dist.models import build_embedder
from eat_dist.seeding import generator

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
EVERY_ROW = torch.arange(6)
OBJECTIVES = ("displacement", "nearest_wrong_centroid", "random_wrong_centroid", "nearest_negative", "proxy")


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fresh weights, and BatchNorm statistics of real batches."""
    config = ModelConfig(widths=(4, 8), embedding_dim=6)
    model = build_embedder(config, in_channels=1, generator=generator(0, "weights")).to(dtype)
    model(torch.rand(32, 1, 8, 8, generator=generator(0, "warm-up"), dtype=dtype))
    return model


def small_images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Six images, some pixels at the ends of the range."""
    images = torch.rand(6, 1, 8, 8, generator=generator(0, "images"), dtype=dtype)
    images[:, :, 0] = 0
    images[:, :, 1] = 1
    return images


def make_objective(name: str, clean: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> Objective:
    """One of OBJECTIVES for some images of a set whose clean embeddings [N, D] are the references."""
    num_classes = int(labels.max()) + 1
    centroids = class_centroids(clean, labels, num_classes)
    if name == "displacement":
        return displacement(clean[rows])
    if name == "nearest_wrong_centroid":
        return nearest_wrong_centroid(centroids, labels[rows])
    if name == "random_wrong_centroid":
        return random_wrong_centroid(centroids, draw_wrong_classes(labels, num_classes, generator(0, "aims"))[rows])
    if name == "nearest_negative":
        return nearest_negative(clean, labels, labels=labels[rows], own=rows)
    assert name == "proxy"
    return proxy_anchor(centroids, labels[rows])


def small_objective(
    model: nn.Module, rows: torch.Tensor = EVERY_ROW, name: str = "nearest_wrong_centroid"
) -> Objective:
    """For some of the six images; the model's modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        clean = model.eval()(small_images(next(model.parameters()).dtype))
    for module, mode in modes:
        module.training = mode
    return make_objective(name, clean, LABELS, rows)


class Counted:
    """A white box that counts what it is asked."""

    def __init__(self, inner: WhiteBox) -> None:
        self.inner, self.draws = inner, inner.draws
        self.gradients = self.forward_passes = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.inner.held():
            yield

    def read(self, images: torch.Tensor) -> Reading:
        self.gradients += 1
        return self.inner.read(images)

    def values(self, images: torch.Tensor) -> torch.Tensor:
        self.forward_passes += 1
        return self.inner.values(images)
