"""Attacking a whole test set: the references of the objectives, and the loop over its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from eat_dist.attacks import Ball, GradientAttack, WhiteBox
from eat_dist.data.images import ImageSet
from eat_dist.evaluation.embed import batch_indices
from eat_dist.evaluation.references import OBJECTIVES, Aimed, References
from eat_dist.seeding import generator


@dataclass(frozen=True)
class AttackedBatch:
    """Some images of the test set, attacked.

    Attributes:
        indices: [B] int64, their positions in the set, on the CPU.
        clean: [B, C, H, W] float32 in [0, 1], on the model's device.
        adversarial: [B, C, H, W] float32 in [0, 1], inside the ball; not rounded to 8 bits.
    """

    indices: torch.Tensor
    clean: torch.Tensor
    adversarial: torch.Tensor


def attack_batches(
    model: nn.Module,
    images: ImageSet,
    *,
    objective: str,
    references: References,
    ball: Ball,
    num_steps: int,
    step_size: float,
    batch_size: int,
    seed: int,
    device: torch.device | str,
) -> Iterator[AttackedBatch]:
    """PGD (Madry et al. 2017) with one random start on every image, white-box against ``model``.

    The start of image i is drawn on the CPU from a generator seeded by (seed, objective, i), and the
    objectives compare an image with fixed references only: so neither the batch size nor the device changes
    what is computed. What remains is rounding: where a library picks another kernel for another batch size, a
    gradient near zero may change its sign. Every image is decoded once.

    Args:
        model: On ``device``; frozen while it is attacked, restored after.
        images: The test set, N images.
        objective: Name in OBJECTIVES.
        references: Of ``model`` on ``images``.
        ball: Norm and radius, pixel units.
        num_steps: Gradient steps.
        step_size: Pixel units, in the ball's norm.
        batch_size: Images of one pass.
        seed: Of the evaluation.
        device: Where the model is.

    Raises:
        ConfigError: No objective has that name.
    """
    build, known = OBJECTIVES[objective], references.to(device)
    for indices in batch_indices(len(images), batch_size):
        clean = images.batch(indices, device).images
        attack = GradientAttack(ball, num_steps=num_steps, step_size=step_size, random_start=True)
        surface = WhiteBox(model, build(Aimed(known, indices.to(device))))
        generators = [generator(seed, "evaluation", "start", objective, index) for index in indices.tolist()]
        adversarial = attack(surface, clean, generators=generators)
        yield AttackedBatch(indices=indices, clean=clean, adversarial=adversarial)
