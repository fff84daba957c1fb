"""How much the members of an ensemble disagree about an image's neighbours: a score of attacked inputs.

Legend: M members, B images, D embedding dimension, N references.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch.nn import functional

# Of 0.001 … 1, the best on average over small ensembles and attacks; docs/metrics.md says how weak that is.
TEMPERATURE = 0.01


def disagreement(
    members: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    *,
    own: torch.Tensor | None = None,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Mean Jensen-Shannon divergence between two members' neighbourhoods of an image, in bits.

    A member's neighbourhood is p_m(n) = softmax_n(cos(f_m(x), f_m(x_n)) / τ) over the references. The divergence
    (Lin 1991, equation (4.1) with weights ½; base 2) of each pair of members is averaged: 0 where all members see the
    same neighbours, 1 where no two share any. Differentiable, and finite with its gradient at any temperature.

    Args:
        members: M tensors [B, D], each member's embeddings of the images, of any length (D may differ by member).
        references: M tensors [N, D], each member's embeddings of the same N references.
        own: [B, N] bool, references that do not count for an image (itself, its own copy); None: all count. At
            least one must be left for each image.
        temperature: τ > 0, in units of cosine.

    Returns:
        [B] in [0, 1]. Memory is O(M·B·N).

    Raises:
        ValueError: There is one member only, or the references are not as many as the members.
    """
    if len(members) < 2:
        raise ValueError(f"disagreement is between members: it needs two or more; got {len(members)}")
    if len(references) != len(members):
        raise ValueError(
            f"disagreement needs each member's own embeddings of the references; got {len(references)} sets of "
            f"references for {len(members)} members"
        )
    neighbourhoods = [
        _log_neighbourhood(embeddings, compared, own, temperature)
        for embeddings, compared in zip(members, references, strict=True)
    ]
    pairs = list(itertools.combinations(neighbourhoods, 2))
    total = torch.stack([_divergence(one, other) for one, other in pairs]).sum(dim=0)
    # Rounding may step out of the range by a few 10⁻⁷.
    return (total / len(pairs)).clamp(0.0, 1.0)


def _log_neighbourhood(
    embeddings: torch.Tensor, references: torch.Tensor, own: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """[B, N] natural logarithms of a member's probabilities."""
    cosines = functional.normalize(embeddings, dim=1) @ functional.normalize(references, dim=1).T
    logits = cosines / temperature
    if own is not None:
        # Not −∞, whose difference with itself is not a number; far enough below the others that its share is 0.
        logits = logits.masked_fill(own, -2.0 / temperature - 1000.0)
    return functional.log_softmax(logits, dim=1)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """[B] Jensen-Shannon divergence in bits; log p ≤ log mean + log 2, so that a share of 0 adds 0 and not NaN."""
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)
    return terms.sum(dim=1) / (2 * math.log(2))
