"""BatchNorm over a batch of which several processes hold a part each: with the statistics of all of it.

torch's own ``SyncBatchNorm`` refuses CPU tensors. This one is written in plain tensor operations, so that what is
tested on CPUs is what runs on GPUs.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class Collectives(Protocol):
    """What the processes that share a batch do together; all of them make the same calls in the same order."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor, by index; without gradient."""
        ...

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's tensor; without gradient."""
        ...


def use_whole_batch_statistics(model: nn.Module, together: Collectives) -> None:
    """Replace every BatchNorm2d in a model, in place; parameters, buffers and their names stay the same.

    In evaluation mode, and frozen, they compute as before, without talking to anybody.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                assert type(child) is nn.BatchNorm2d, f"{type(child).__name__} has no form over several processes"
                setattr(module, name, WholeBatchNorm2d(child, together))


class WholeBatchNorm2d(nn.BatchNorm2d):
    """Ioffe & Szegedy 2015, algorithm 1, over the parts of all processes, which are of one shape.

    Args:
        original: Its parameters and buffers are shared, not copied.
        together: The processes.
    """

    def __init__(self, original: nn.BatchNorm2d, together: Collectives) -> None:
        assert original.momentum is not None, "the plain mean over all batches is not provided for"
        assert original.affine, "BatchNorm without weight and bias is not provided for"
        assert original.track_running_stats, "BatchNorm without running statistics is not provided for"
        super().__init__(original.num_features, original.eps, original.momentum, device="meta")
        self.weight, self.bias = original.weight, original.bias
        for name, buffer in original.named_buffers():
            setattr(self, name, buffer)
        self.training = original.training
        self.together = together

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → the same shape and dtype; computed in float32, or in float64 where the parameters are."""
        if not self.training:
            return super().forward(features)
        normalised, mean, variance, count = cast(
            "tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]",
            _Normalise.apply(features, self.weight, self.bias, self),
        )
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():  # the running variance is the unbiased one, as in torch
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        return normalised


class _Normalise(torch.autograd.Function):
    """y = γ·x̂ + β with x̂ = (x − μ)·s, s = 1/√(σ² + ε), and μ, σ² over the parts of all processes.

    Backward: ∂L/∂x = γ·s·(∂L/∂y − mean(∂L/∂y) − x̂·mean(∂L/∂y·x̂)) with the means over the whole batch, for which one
    sum of 2C numbers is taken over the processes. The gradients of γ and β stay this process's share: like those of any
    other parameter they are summed over the processes afterwards.
    """

    @staticmethod
    def forward(
        context: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        norm: WholeBatchNorm2d,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        values = features.to(weight.dtype)
        own_variance, own_mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        means, variances = torch.stack(norm.together.all_gather(torch.stack([own_mean, own_variance])), dim=1)
        mean = means.mean(dim=0)
        # Of parts of equal size: the mean variance within them, and the variance between them.
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        count = len(means) * values.numel() // values.shape[1]
        inverse = (variance + norm.eps).rsqrt()
        scale = weight * inverse
        normalised = values * _wide(scale) + _wide(bias - mean * scale)
        context.save_for_backward(features, weight, mean, inverse)
        context.together, context.count = norm.together, count
        context.mark_non_differentiable(mean, variance)
        return normalised.to(features.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(
        context: Any, gradient: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None]:
        features, weight, mean, inverse = context.saved_tensors
        gradient = gradient.to(weight.dtype)
        centred = (features.to(weight.dtype) - _wide(mean)) * _wide(inverse)
        own = torch.stack([gradient.sum(dim=(0, 2, 3)), (gradient * centred).sum(dim=(0, 2, 3))])
        of_images = None
        if context.needs_input_grad[0]:
            means = context.together.all_sum(own) / context.count
            of_images = _wide(weight * inverse) * (gradient - _wide(means[0]) - centred * _wide(means[1]))
            of_images = of_images.to(features.dtype)
        return of_images, own[1], own[0], None


def _wide(values: torch.Tensor) -> torch.Tensor:
    """[C] → [1, C, 1, 1]."""
    return values.view(1, -1, 1, 1)
