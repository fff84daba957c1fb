"""What an attacker of a test set aims at: the objectives by name, and the clean embeddings they compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eat_dist.attacks import Objective, objectives
from eat_dist.data.images import ImageSet
from eat_dist.registry import Registry
from eat_dist.seeding import generator


@dataclass(frozen=True)
class References:
    """What the objectives compare an attacked embedding with; all of it from one model and the clean test set.

    The attacker of a query or of a gallery image knows the classes of all clean images.

    Attributes:
        clean: [N, D] embeddings of the clean images.
        labels: [N] int64, true classes.
        centroids: [C, D] of length 1, mean clean embedding of each class, queries and gallery together.
        wrong_classes: [N] int64, another class for each image, drawn uniformly.
        searched: [N] bool, the images that a neighbour search may return (the gallery).
    """

    clean: torch.Tensor
    labels: torch.Tensor
    centroids: torch.Tensor
    wrong_classes: torch.Tensor
    searched: torch.Tensor

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
            searched=torch.ones(len(images), dtype=torch.bool) if images.is_query is None else ~images.is_query,
        )

    @property
    def place_in_gallery(self) -> torch.Tensor:
        """[N] int64, where each image is among the searched ones; −1 for an image that is not."""
        return (self.searched.long().cumsum(0) - 1).masked_fill(~self.searched, -1)

    def to(self, device: torch.device | str) -> References:
        """All of it on ``device``."""
        return References(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Aimed:
    """The references as the objectives see them for one batch.

    Attributes:
        references: On the model's device.
        indices: [B] int64, the attacked images' positions in the test set, on that device.
    """

    references: References
    indices: torch.Tensor


OBJECTIVES: Registry[Callable[[Aimed], Objective]] = Registry("evaluation objective")
"""What the attacker maximises, by name: the references of a batch → its objective, one value an image."""


@OBJECTIVES.register("displacement")
def _displacement(batch: Aimed) -> Objective:
    return objectives.displacement(batch.references.clean[batch.indices])


@OBJECTIVES.register("nearest_wrong_centroid")
def _nearest_wrong_centroid(batch: Aimed) -> Objective:
    return objectives.nearest_wrong_centroid(batch.references.centroids, batch.references.labels[batch.indices])


@OBJECTIVES.register("random_wrong_centroid")
def _random_wrong_centroid(batch: Aimed) -> Objective:
    return objectives.random_wrong_centroid(batch.references.centroids, batch.references.wrong_classes[batch.indices])


@OBJECTIVES.register("nearest_negative")
def _nearest_negative(batch: Aimed) -> Objective:
    known = batch.references
    return objectives.nearest_negative(
        known.clean[known.searched],
        known.labels[known.searched],
        labels=known.labels[batch.indices],
        # Its own clean copy is nobody's neighbour: the retrieval figures leave it out, too.
        own=known.place_in_gallery[batch.indices],
    )


@OBJECTIVES.register("proxy")
def _proxy(batch: Aimed) -> Objective:
    return objectives.proxy_anchor(batch.references.centroids, batch.references.labels[batch.indices])
