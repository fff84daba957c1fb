"""What the losses with learnable proxies share."""

from __future__ import annotations

import torch
from torch.nn import functional


class WithProxies:
    """One learnable proxy a class, compared by cosine. A proxy learns by gradient, so there is nothing to observe.

    Attributes:
        proxies: [C, D].
    """

    proxies: torch.nn.Parameter

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosine similarities to the proxies, [B, D] → [B, C]."""
        cosines: torch.Tensor = functional.normalize(embeddings, dim=1) @ functional.normalize(self.proxies, dim=1).T
        return cosines

    def observe(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Nothing to do."""


def undrawn(proxies: torch.Tensor) -> None:
    """Stands in for the library's initialisation, which would draw from torch's global generator."""


def weighted_mean(per_image: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Σ_x w_x ℓ_x / Σ_x w_x over losses [B]; the plain mean without weights [B].

    So an image with weight 2 counts as if it were twice in the batch, which is what a weight means everywhere here.
    """
    return per_image.mean() if weights is None else (weights * per_image).sum() / weights.sum()
