"""Attacking a whole test set: the references of the objectives, and the loop over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from eat_dist.attacks import Ball, Objective, ascend, objectives
from eat_dist.data.images import ImageSet
from eat_dist.evaluation.embed import batch_indices
from eat_dist.registry import Registry
from eat_dist.seeding import generator


@dataclass(frozen=True)
class References:
    """What the objectives compare an attacked embedding with; all of it from one model and the clean test set.

    Queries and gallery are not told apart: an attacker of either knows the classes of all clean images.

    Attributes:
        clean: [N, D] embeddings of the clean images.
        labels: [N] int64, true classes.
        centroids: [C, D] of length 1, mean clean embedding of each class.
        wrong_classes: [N] int64, another class for each image, drawn uniformly.
    """

    clean: torch.Tensor
    labels: torch.Tensor
    centroids: torch.Tensor
    wrong_classes: torch.Tensor

    @classmethod
    def of(cls, clean: torch.Tensor, images: ImageSet, *, seed: int) -> References:
        """The references of one model. The wrong classes depend on the seed and the labels alone.

        Args:
            clean: [N, D] the model's embeddings of ``images``, on the CPU.
            images: The test set; at least two classes, each with an image.
            seed: Of the evaluation.
        """
        return cls(
            clean=clean,
            labels=images.labels,
            centroids=objectives.class_centroids(clean, images.labels, images.num_classes),
            wrong_classes=objectives.draw_wrong_classes(
                images.labels, images.num_classes, generator(seed, "evaluation", "wrong classes")
            ),
        )

    def at(self, indices: torch.Tensor, device: torch.device | str) -> References:
        """Those of the images at ``indices`` [B], with all centroids, on ``device``."""
        return References(
            clean=self.clean[indices].to(device),
            labels=self.labels[indices].to(device),
            centroids=self.centroids.to(device),
            wrong_classes=self.wrong_classes[indices].to(device),
        )


OBJECTIVES: Registry[Callable[[References], Objective]] = Registry("evaluation objective")
"""What the attacker maximises, by name: the references of a batch → its objective."""


@OBJECTIVES.register("displacement")
def _displacement(batch: References) -> Objective:
    return objectives.displacement(batch.clean)


@OBJECTIVES.register("nearest_wrong_centroid")
def _nearest_wrong_centroid(batch: References) -> Objective:
    return objectives.nearest_wrong_centroid(batch.centroids, batch.labels)


@OBJECTIVES.register("random_wrong_centroid")
def _random_wrong_centroid(batch: References) -> Objective:
    return objectives.random_wrong_centroid(batch.centroids, batch.wrong_classes)


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
    build = OBJECTIVES[objective]
    for indices in batch_indices(len(images), batch_size):
        clean = images.batch(indices, device).images
        steps = ascend(
            model,
            clean,
            start=_random_starts(clean, indices, ball=ball, key=(seed, "evaluation", "start", objective)),
            objective=build(references.at(indices, device)),
            ball=ball,
            step_size=step_size,
            num_steps=num_steps,
        )
        yield AttackedBatch(indices=indices, clean=clean, adversarial=steps.images)


def _random_starts(
    clean: torch.Tensor, indices: torch.Tensor, *, ball: Ball, key: tuple[int | str, ...]
) -> torch.Tensor:
    """[B, C, H, W] a uniform point of each image's ball, drawn on the CPU, on the images' device."""
    points = [
        ball.random_point(image[None], generator(*key, index))
        for image, index in zip(clean.cpu(), indices.tolist(), strict=True)
    ]
    return torch.cat(points).to(clean.device)
