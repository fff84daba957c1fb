"""Proxy Anchor loss (Kim et al., CVPR 2020, equation 4), pytorch-metric-learning's, with weights an image."""

from __future__ import annotations

import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch.nn import functional

from eat_dist.losses.proxies import WithProxies, undrawn
from eat_dist.losses.table import register


@register("proxy_anchor", alpha=32.0, margin=0.1)
class ProxyAnchor(WithProxies, ProxyAnchorLoss):  # type: ignore[misc]
    """L = 1/|P⁺| Σ_{p∈P⁺} log(1 + Σ_{x∈X⁺p} w_x e^{−α(s(x,p)−δ)}) + 1/|P| Σ_p log(1 + Σ_{x∈X⁻p} w_x e^{α(s(x,p)+δ)}).

    Without weights (all w_x = 1) it is the library's loss, unchanged. The weights are ours, for transfer rules: inside
    the sums they say that an image counts as w_x images, which is what the loss itself does with a repeated image.

    Args:
        alpha: α.
        margin: δ, on the cosine.
        num_classes: |P|, one proxy each.
        embedding_dim: D.
        generator: Draws the initial proxies (Kaiming normal, fan-out, as in the library and the official code).
    """

    def __init__(
        self, *, alpha: float, margin: float, num_classes: int, embedding_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin=margin, alpha=alpha, weight_init_func=undrawn)
        torch.nn.init.kaiming_normal_(self.proxies.data, mode="fan_out", generator=generator)

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings [B, D], labels [B] int64 and, if given, weights [B] ≥ 0 → scalar."""
        if weights is None:
            loss: torch.Tensor = super().forward(embeddings, labels)
            return loss
        cosines = self.similarities(embeddings)
        own = functional.one_hot(labels, self.num_classes).bool()
        log_weights = weights.log().unsqueeze(1)
        pull = _log_one_plus_sum(self.alpha * (self.margin - cosines) + log_weights, own)
        push = _log_one_plus_sum(self.alpha * (self.margin + cosines) + log_weights, ~own)
        weighted: torch.Tensor = pull.sum() / own.any(dim=0).sum() + push.sum() / self.num_classes
        return weighted


def _log_one_plus_sum(exponents: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """log(1 + Σ_rows e^exponent) over the kept entries of each column, [B, C] → [C]; 0 for an empty column."""
    masked = exponents.masked_fill(~keep, float("-inf"))
    return torch.cat([masked, masked.new_zeros(1, masked.shape[1])]).logsumexp(dim=0)
