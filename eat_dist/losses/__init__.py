"""Metric losses, thin over pytorch-metric-learning (docs/losses.md)."""

from eat_dist.losses import (  # noqa: F401  (registers them)
    angular,
    contrastive,
    multi_similarity,
    proxy_anchor,
    proxy_nca,
    soft_triple,
    triplet,
)
from eat_dist.losses.table import LOSSES, MetricLoss, check_loss, is_pair_loss, make_loss, supports_weights

__all__ = ["LOSSES", "MetricLoss", "check_loss", "is_pair_loss", "make_loss", "supports_weights"]
