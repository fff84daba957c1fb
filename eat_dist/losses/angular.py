"""Angular loss (Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017), pytorch-metric-learning's."""

from __future__ import annotations

from pytorch_metric_learning.losses import AngularLoss
from torch import nn

from eat_dist.losses.table import register


@register("angular", pairs=True, angle=40.0)
def angular(*, angle: float) -> nn.Module:
    """Mean over the pairs (a, p) of one class of log(1 + Σ_n e^{4 tan²α (x_a + x_p)·x_n − 2(1 + tan²α) x_a·x_p}).

    n runs over the images of other classes. It is the paper's batch form, without the N-pair loss that the paper may
    add to it.

    Deviations: all ordered pairs of the batch, where the paper draws one pair a class; all embeddings have length 1
    (the library by itself leaves x_n as it is).

    Args:
        angle: α in degrees, the upper bound that is wanted for the angle at the negative.
    """
    loss: nn.Module = AngularLoss(alpha=angle)
    return loss
