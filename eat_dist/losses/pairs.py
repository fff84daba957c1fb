"""What the losses that compare the images of a batch with each other share: the checks, and one centroid a class."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from eat_dist.errors import ConfigError, DataError

MOMENTUM = 0.9


class PairLoss(nn.Module):
    """A loss over pairs or triplets of the batch, with centroids in place of the proxies that it does not have.

    Training statistics ask for an image's nearest class. So a buffer keeps, for each class, the moving average
    (momentum 0.9, the first observation taken as it is) of the direction of its mean embedding, of what
    :meth:`observe` was shown. The loss itself does not depend on it.

    Args:
        loss: The library's loss: embeddings [B, D] of length 1, labels [B] → scalar.
        num_classes: C.
        embedding_dim: D.

    Attributes:
        centroids: [C, D], of length at most 1; zero for a class that was not observed yet.
    """

    centroids: torch.Tensor

    def __init__(self, loss: nn.Module, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("centroids", torch.zeros(num_classes, embedding_dim))

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings [B, D] (scaled to length 1 here) and labels [B] int64 → scalar.

        Raises:
            DataError: The batch has no two images of one class, or none of different classes.
            ConfigError: There are weights.
        """
        if weights is not None:
            raise ConfigError(
                "a pair loss has no weight an image, since a pair has two; set defense.transfer_rule to another rule "
                "than class_risk, or loss.name to a proxy loss"
            )
        _refuse_without_pairs(labels)
        loss: torch.Tensor = self.loss(functional.normalize(embeddings, dim=1), labels)
        return loss

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosine similarities to the centroids, [B, D] → [B, C]; 0 everywhere before anything was observed.

        A class that was not observed stands at the mean of the image's other similarities. So it is not the nearest.
        The diversity regulariser, which centres over the wrong classes alone, takes it for a small agreement of the
        members, which fades as classes come to be observed: unrelated members that know 10 of 50 classes have 0.16 in
        place of 0.11, of 25 nothing is seen.
        """
        cosines = functional.normalize(embeddings, dim=1) @ functional.normalize(self.centroids, dim=1).T
        observed = self.centroids.any(dim=1)
        mean = cosines.sum(dim=1, keepdim=True) / observed.sum().clamp(min=1)  # the others' cosines are 0
        return torch.where(observed, cosines, mean)

    @torch.no_grad()
    def observe(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the centroids of the classes in ``labels`` [B] towards the means of ``embeddings`` [B, D].

        The order within the batch does not matter; how often a class occurs in it does not, either.
        """
        classes, position = torch.unique(labels, return_inverse=True)
        # A product, not index_add, whose order of summation is not fixed on a GPU.
        belongs = functional.one_hot(position, len(classes)).to(embeddings.dtype)
        seen = functional.normalize(belongs.T @ functional.normalize(embeddings, dim=1), dim=1)
        before = self.centroids[classes]
        is_first = ~before.any(dim=1, keepdim=True)
        self.centroids[classes] = torch.where(is_first, seen, MOMENTUM * before + (1 - MOMENTUM) * seen)


def _refuse_without_pairs(labels: torch.Tensor) -> None:
    distinct = len(torch.unique(labels))
    if distinct == len(labels):
        raise DataError(
            f"a pair loss needs two images of one class in every batch; got {len(labels)} of {distinct} classes. "
            f"Set data.sampler to class_balanced, or loss.name to a proxy loss."
        )
    if distinct == 1:
        raise DataError(
            f"a pair loss needs images of two classes in every batch; got {len(labels)} of one class. "
            f"Set data.sampler to class_balanced, or loss.name to a proxy loss."
        )
