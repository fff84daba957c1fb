"""The optimiser of one member, over its network and its proxies."""

from __future__ import annotations

from typing import Any

import torch

from eat_dist.config import OptimiserConfig


def make_optimiser(config: OptimiserConfig, model: torch.nn.Module, loss: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over the network and, with their own learning rate, the loss's proxies."""
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters()), "lr": config.learning_rate},
        {"params": list(loss.parameters()), "lr": config.learning_rate * config.proxy_learning_rate_factor},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=config.weight_decay)


def gradient_norm(optimiser: torch.optim.Optimizer) -> float:
    """L2 norm over the gradients of everything that is trained, network and proxies."""
    gradients = [parameter.grad for parameter in optimised(optimiser) if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def optimised(optimiser: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Everything an optimiser trains, in its order."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
