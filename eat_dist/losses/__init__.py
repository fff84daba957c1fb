"""Metric losses, thin over pytorch-metric-learning."""

from eat_dist.losses import proxy_anchor  # noqa: F401  (registers it)
from eat_dist.losses.table import LOSSES, ProxyLoss, make_loss

__all__ = ["LOSSES", "ProxyLoss", "make_loss"]
