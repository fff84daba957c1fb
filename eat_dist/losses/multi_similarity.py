"""Multi-Similarity loss with its pair mining (Wang et al., CVPR 2019, section 4), pytorch-metric-learning's."""

from __future__ import annotations

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner

from eat_dist.losses.table import register

# ε of the mining, fixed in the paper.
_SLACK = 0.1


@register("multi_similarity", pairs=True, alpha=2.0, beta=50.0, margin=0.5)
class MultiSimilarity(MultiSimilarityLoss):  # type: ignore[misc]
    """Mean over x of 1/α log(1 + Σ_{x'∈P_x} e^{−α(s(x,x')−λ)}) + 1/β log(1 + Σ_{x'∈N_x} e^{β(s(x,x')−λ)}).

    s is the cosine. The mining is part of the loss, as in the paper: P_x holds the images of x's class with
    s(x,x') < max_n s(x,n) + ε over the images n of other classes, N_x those of other classes with
    s(x,x') > min_p s(x,p) − ε over the images p of its own; ε = 0.1. An image without any adds 0. So a batch in which
    every class keeps its distance has the loss 0, and an attack on it no gradient.

    Deviation, with the library: where mining leaves at most one pair of each kind in the whole batch, the loss is 0.

    Args:
        alpha: α.
        beta: β.
        margin: λ, the similarity around which pairs are weighed.
    """

    def __init__(self, *, alpha: float, beta: float, margin: float) -> None:
        super().__init__(alpha=alpha, beta=beta, base=margin)
        self.mine = MultiSimilarityMiner(epsilon=_SLACK)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, D] of length 1, labels [B] int64 → scalar."""
        loss: torch.Tensor = super().forward(embeddings, labels, self.mine(embeddings, labels))
        return loss
