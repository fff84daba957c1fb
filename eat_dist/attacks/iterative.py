"""The one gradient loop that every gradient attack runs through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from eat_dist.attacks.ball import Ball

Objective = Callable[[torch.Tensor], torch.Tensor]
"""What the attacker maximises: embeddings [B, D] → [B] (one value an image), or a scalar for a batch loss."""


@dataclass(frozen=True)
class Steps:
    """What a stretch of the loop leaves behind.

    Attributes:
        images: [B, C, H, W] the last iterate, inside the ball and the pixel range, detached.
        first_embeddings: [B, D] embeddings of the start, detached, from the first step's own forward pass (what a
            relay measures about a batch it received, without a pass of its own); None where no step was taken.
    """

    images: torch.Tensor
    first_embeddings: torch.Tensor | None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every module's mode and every flag restored after.

    Evaluation mode keeps BatchNorm's running statistics untouched and makes an image's gradient independent of the
    rest of its batch; without parameter gradients the backward pass computes the input's alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def ascend(
    model: nn.Module,
    images: torch.Tensor,
    *,
    start: torch.Tensor,
    objective: Objective,
    ball: Ball,
    step_size: float,
    num_steps: int,
) -> Steps:
    """Projected steepest ascent: x ← project(x + step_size · steepest(∇ objective)), ``num_steps`` times.

    Madry et al. 2017, equation (2), with an objective on embeddings in place of the classification loss. The model is
    frozen for the duration; neither it nor ``images`` nor ``start`` is changed.

    Args:
        model: Maps images in [0, 1] to embeddings [B, D].
        images: [B, C, H, W] in [0, 1], the centres of the balls.
        start: [B, C, H, W], the first iterate; projected before use.
        objective: Maximised; summed over the batch, so images do not see each other unless it makes them.
        ball: Norm and radius.
        step_size: Length of a step in the ball's norm, pixel units.
        num_steps: Gradient steps; 0 returns the projected start.
    """
    images = images.detach()
    current = ball.project(start.detach(), images)
    first_embeddings: torch.Tensor | None = None
    if num_steps == 0:
        return Steps(current, None)
    with frozen(model), torch.enable_grad():
        for _ in range(num_steps):
            current.requires_grad_(True)
            embeddings = model(current)
            if first_embeddings is None:
                first_embeddings = embeddings.detach()
            (gradient,) = torch.autograd.grad(objective(embeddings).sum(), current)
            current = ball.project(current.detach() + step_size * ball.steepest(gradient), images)
    return Steps(current, first_embeddings)
