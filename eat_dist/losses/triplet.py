"""Triplet loss (Schroff, Kalenichenko & Philbin, "FaceNet", CVPR 2015, section 3.1), pytorch-metric-learning's."""

from __future__ import annotations

from pytorch_metric_learning.losses import TripletMarginLoss
from torch import nn

from eat_dist.losses.table import register


@register("triplet", pairs=True, margin=0.05)
def triplet(*, margin: float) -> nn.Module:
    """Mean of [‖x_a − x_p‖ − ‖x_a − x_n‖ + m]₊ over all triplets of the batch where it is greater than 0.

    Deviations from the paper, with the library: distances, not squared distances (in [0, 2]); all triplets instead of
    mined semi-hard ones; triplets that keep the margin are left out of the mean; m = 0.05, where FaceNet has 0.2 on
    squared distances.

    Memory grows with the cube of the batch: B images of which n are of one class make B(n − 1)(B − n) triplets.

    Args:
        margin: m.
    """
    loss: nn.Module = TripletMarginLoss(margin=margin, triplets_per_anchor="all")
    return loss
