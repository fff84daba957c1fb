"""Proxy NCA loss (Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017)."""

from __future__ import annotations

import torch
from pytorch_metric_learning.losses import ProxyNCALoss
from torch.nn import functional

from eat_dist.losses.proxies import WithProxies, undrawn, weighted_mean
from eat_dist.losses.table import register


@register("proxy_nca", scale=1.0)
class ProxyNCA(WithProxies, ProxyNCALoss):  # type: ignore[misc]
    """Mean over the images of ℓ_x = −log( e^{−s‖x−p_y‖²} / Σ_p e^{−s‖x−p‖²} ), x and p scaled to length 1.

    Deviations from the paper, with the library: the sum runs over all proxies, the own one included (the paper leaves
    it out, so its loss may be negative), and there is a scale. The paper has none, s = 1, which is the
    default. The PyTorch port that is mostly cited (dichotomies/proxy-nca) multiplies the proxies by 3: that is s = 3
    here, since ‖x − 3p‖² = 3‖x − p‖² + 4 at length 1. Where it multiplies both by 3, s = 9.

    Deviation from the library: its softmax underflows to 0 at large scales, and it leaves such images, the worst ones,
    out of the mean. The log-softmax here does not underflow; up to there the numbers are the same.

    Args:
        scale: s.
        num_classes: C, one proxy each.
        embedding_dim: D.
        generator: Draws the initial proxies (standard normal, as in the library).
    """

    def __init__(self, *, scale: float, num_classes: int, embedding_dim: int, generator: torch.Generator) -> None:
        super().__init__(num_classes, embedding_dim, softmax_scale=scale, weight_init_func=undrawn)
        torch.nn.init.normal_(self.proxies.data, generator=generator)

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings [B, D], labels [B] int64 and, if given, weights [B] ≥ 0, not all 0 → scalar."""
        squared_distances = self.distance(embeddings, self.proxies)
        per_image = functional.cross_entropy(-self.softmax_scale * squared_distances, labels, reduction="none")
        return weighted_mean(per_image, weights)
