"""The check that all figures begin with."""

from __future__ import annotations

import torch

from eat_dist.errors import NonFiniteEmbeddingError


def check_finite(embeddings: torch.Tensor, name: str) -> None:
    """Refuse NaN and infinity.

    Args:
        embeddings: [N, D].
        name: What one of them is called.

    Raises:
        NonFiniteEmbeddingError: Some embedding is not finite.
    """
    bad = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if bad:
        raise NonFiniteEmbeddingError(f"every {name} must be finite; {bad} of {len(embeddings)} hold NaN or infinity")
