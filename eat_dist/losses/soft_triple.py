"""SoftTriple loss (Qian et al., ICCV 2019, section 3.2), pytorch-metric-learning's, with weights an image."""

from __future__ import annotations

import math

import torch
from pytorch_metric_learning.losses import SoftTripleLoss
from pytorch_metric_learning.reducers import DoNothingReducer

from eat_dist.losses.proxies import WithProxies, undrawn, weighted_mean
from eat_dist.losses.table import register


@register("soft_triple", centers_per_class=10, scale=20.0, gamma=0.1, margin=0.01)
class SoftTriple(WithProxies, SoftTripleLoss):  # type: ignore[misc]
    """Mean of ℓ_x = −log( e^{λ(S_{x,y} − δ)} / (e^{λ(S_{x,y} − δ)} + Σ_{c≠y} e^{λ S_{x,c}}) ), with K centres a class.

    S_{x,c} = Σ_k softmax_k(x·w_{c,k} / γ) x·w_{c,k} is the relaxed similarity to class c, x and w of length 1.

    Deviation: the paper also adds a regulariser that merges centres (weight τ, 0.2 in its experiments). The library
    leaves it out by default, and so it is left out here: τ = 0.

    Args:
        centers_per_class: K.
        scale: λ.
        gamma: γ; small: the nearest centre alone counts.
        margin: δ, on the similarity.
        num_classes: C.
        embedding_dim: D.
        generator: Draws the initial centres (Kaiming uniform with a = √5, as in the library and the official code).

    Attributes:
        fc: [D, C·K] the centres, under the library's name.
    """

    fc: torch.nn.Parameter

    def __init__(
        self,
        *,
        centers_per_class: int,
        scale: float,
        gamma: float,
        margin: float,
        num_classes: int,
        embedding_dim: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_dim,
            centers_per_class=centers_per_class,
            la=scale,
            gamma=gamma,
            margin=margin,
            weight_init_func=undrawn,
            reducer=DoNothingReducer(),  # one loss an image, which the weights then average
        )
        torch.nn.init.kaiming_uniform_(self.fc.data, a=math.sqrt(5), generator=generator)

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings [B, D], labels [B] int64 and, if given, weights [B] ≥ 0, not all 0 → scalar."""
        per_image = super().forward(embeddings, labels)["loss"]["losses"]
        return weighted_mean(per_image, weights)

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The paper's relaxed similarities S_{x,c} ∈ [-1, 1], [B, D] → [B, C]."""
        relaxed: torch.Tensor = self.get_logits(embeddings)
        return relaxed
