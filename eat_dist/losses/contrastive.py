"""Contrastive loss (Hadsell, Chopra & LeCun, CVPR 2006, equation 4), pytorch-metric-learning's."""

from __future__ import annotations

from pytorch_metric_learning.losses import ContrastiveLoss
from torch import nn

from eat_dist.losses.table import register


@register("contrastive", pairs=True, positive_margin=0.0, margin=1.0)
def contrastive(*, positive_margin: float, margin: float) -> nn.Module:
    """Mean of [d − m⁺]₊ over pairs of one class + mean of [m − d]₊ over pairs of two; d = ‖x − x'‖ ∈ [0, 2].

    Each mean runs over all pairs of the batch whose term is greater than 0. Where two images coincide, the distance
    has no gradient; the library (torch.cdist) takes 0.

    Deviations from the paper, with the library: the terms are not squared and halved; pairs without a term are left
    out of the means; the embeddings have length 1; m⁺ is new (0 there and by default).

    Args:
        positive_margin: m⁺, distance that a pair of one class is not charged for.
        margin: m, distance from which on a pair of two classes is not charged.
    """
    loss: nn.Module = ContrastiveLoss(pos_margin=positive_margin, neg_margin=margin)
    return loss
