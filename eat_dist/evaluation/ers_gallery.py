"""What the attacks of the Empirical Robustness Score look at: the clean gallery, and pairs of an image and a sample."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Gallery:
    """The whole clean test set, against which everything is ranked.

    Attributes:
        clean: [N, D] float32 embeddings of length 1, N ≥ 3.
        labels: [N] int64, on the same device; at least two classes.
    """

    clean: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, clean: torch.Tensor, labels: torch.Tensor, *, device: torch.device | str) -> Gallery:
        """From [N, D] embeddings of any length and [N] labels, on any device."""
        assert len(clean) == len(labels) >= 3, (clean.shape, labels.shape)
        return cls(functional.normalize(clean.detach().to(device).float(), dim=1), labels.to(device))

    def distances(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, N] Euclidean distances from [B, D], differentiable; the gradient at distance 0 is 0."""
        # One formula for every B: by itself the library changes it at 25 rows.
        return torch.cdist(embeddings, self.clean, compute_mode="use_mm_for_euclid_dist")

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, N] float32 cosines of [B, D] of length 1, for ranking: float64 products, so that equal samples tie."""
        return (embeddings.double() @ self._columns).float()

    def nearest(self, indices: torch.Tensor) -> torch.Tensor:
        """[B, N] float32 cosines between the clean samples at ``indices`` [B] and all; −∞ for a sample itself."""
        return self.similarities(self.clean[indices]).scatter(1, indices[:, None], float("-inf"))

    @cached_property
    def _columns(self) -> torch.Tensor:
        return self.clean.double().T


@dataclass(frozen=True)
class Pairs:
    """The attacked images of a batch with their partners.

    Attributes:
        gallery: The clean test set.
        indices: [B] int64, the attacked images' own positions in it.
        partners: [B] int64, their partners' positions; ``indices`` again for an attack without partners.
    """

    gallery: Gallery
    indices: torch.Tensor
    partners: torch.Tensor

    @property
    def own(self) -> torch.Tensor:
        """[B, D] the images' own clean embeddings."""
        return self.gallery.clean[self.indices]

    @property
    def partner(self) -> torch.Tensor:
        """[B, D] the partners' embeddings."""
        return self.gallery.clean[self.partners]
