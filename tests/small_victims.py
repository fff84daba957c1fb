"""Networks trained for a few seconds on scikit-learn's digits: what the attacks of the tests have to break."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

from eat_dist.attacks import Ball, GradientAttack, WhiteBox
from eat_dist.attacks.objectives import batch_loss
from eat_dist.config import LossConfig, ModelConfig
from eat_dist.losses import make_loss
from eat_dist.models import build_embedder
from eat_dist.seeding import generator


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """[1797, 1, 8, 8] float32 images in [0, 1] and their [1797] labels, in an order drawn once."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator(0, "order"))
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(found.target)[order]


@functools.cache
def victim(*, hardened: bool, iterations: int = 120) -> nn.Module:
    """An embedder of the first 1,400 digits under Proxy Anchor, in evaluation mode; not to be changed.

    Args:
        hardened: Every batch is attacked (PGD, three steps, ε = 0.1 in L∞) before the model learns from it.
        iterations: Of batches of 128.
    """
    images, labels = digits()
    model = build_embedder(
        ModelConfig(widths=(12, 24), embedding_dim=16), in_channels=1, generator=generator(0, "weights")
    )
    loss = make_loss(LossConfig(), num_classes=10, embedding_dim=16, generator=generator(0, "proxies"))
    optimiser = torch.optim.Adam(
        [{"params": model.parameters(), "lr": 2e-3}, {"params": loss.parameters(), "lr": 2e-2}]
    )
    attack = GradientAttack(Ball("linf", 0.1), num_steps=3, step_size=0.08, random_start=True)
    model.train()
    for iteration in range(iterations):
        rows = torch.randint(1400, (128,), generator=generator(0, "batch", iteration))
        batch = images[rows]
        if hardened:
            surface = WhiteBox(model, batch_loss(loss, labels[rows]))
            batch = attack(surface, batch, generators=generator(0, "attack", iteration))
        optimiser.zero_grad()
        loss(model(batch), labels[rows]).backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


def unseen_digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits that no victim was trained on, and their labels."""
    images, labels = digits()
    return images[1400 : 1400 + count], labels[1400 : 1400 + count]


def recall_at_1(embeddings: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor) -> float:
    """Of queries against a gallery of the same images, each one's own copy left out."""
    similarities = embeddings @ gallery.T
    return float((labels[similarities.fill_diagonal_(float("-inf")).argmax(dim=1)] == labels).float().mean())
