"""What an attack sees of a model: the value of its objective at some images, and the slope there.

A surface is all that an attack is given. White-box attacks climb its gradient, black-box attacks ask for values.
Whether behind it is one network, the fused ensemble, several members or a randomised defence is not their business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from eat_dist.attacks.ball import finite

Objective = Callable[[torch.Tensor], torch.Tensor]
"""What the attacker maximises: embeddings [B, D] → [B] (one value an image), or a scalar for a batch loss."""


@dataclass(frozen=True)
class Reading:
    """A surface at some images.

    Attributes:
        values: [B], detached; a scalar for a batch loss.
        gradient: [B, C, H, W], of the sum of the values with respect to the images.
        embeddings: [B, D] detached, where there is one model behind the surface; None elsewhere.
    """

    values: torch.Tensor
    gradient: torch.Tensor
    embeddings: torch.Tensor | None


class Surface(Protocol):
    """An objective as a function of the images; an image's value must not depend on the rest of its batch."""

    @property
    def draws(self) -> int:
        """Passes averaged in a reading; above 1, readings are random and an attack does not trust a single one."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """A context manager: evaluation mode, parameters frozen, gradients enabled; everything restored after."""
        ...

    def read(self, images: torch.Tensor) -> Reading:
        """Values and gradient at [B, C, H, W] images; one forward-backward pass. Call inside :meth:`held`."""
        ...

    def values(self, images: torch.Tensor) -> torch.Tensor:
        """[B] values alone, without gradient; one forward pass. Call inside :meth:`held`."""
        ...


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every module's mode and every flag restored after.

    Evaluation mode keeps BatchNorm's running statistics untouched and makes an image's gradient independent of the
    rest of its batch; without parameter gradients the backward pass computes the input's alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class WhiteBox:
    """One model (a member, the fused ensemble, anybody's) under one objective.

    Attributes:
        model: Maps images in [0, 1] to embeddings [B, D].
        objective: Of the embeddings.
        draws: Passes averaged in every reading, for models that draw random numbers at inference: expectation over
            transformation (Athalye et al. 2018), E_t[objective(f_t(x))], with the gradient of that mean. 1 for a
            model that always answers the same.
    """

    model: nn.Module
    objective: Objective
    draws: int = 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Frozen, with gradients enabled."""
        with frozen(self.model), torch.enable_grad():
            yield

    def read(self, images: torch.Tensor) -> Reading:
        """See :class:`Surface`; ``embeddings`` are the first draw's.

        The mean of a slope is over the draws in which it is finite, so that one bad draw does not undo the others.
        """
        reading = self._read_once(images)
        if self.draws == 1:
            return reading
        values, gradient = reading.values.clone(), finite(reading.gradient)
        counted = reading.gradient.isfinite().to(gradient.dtype)
        for _ in range(self.draws - 1):
            another = self._read_once(images)
            values += another.values
            gradient += finite(another.gradient)
            counted += another.gradient.isfinite()
        # 0 / 0 is NaN: where no draw has a slope there is none, and the check of gradients must see it.
        return Reading(values / self.draws, gradient / counted, reading.embeddings)

    def values(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`Surface`."""
        with torch.no_grad():
            values = self.objective(self.model(images))
            for _ in range(self.draws - 1):
                values = values + self.objective(self.model(images))
        return values / self.draws

    def _read_once(self, images: torch.Tensor) -> Reading:
        images = images.detach().requires_grad_(True)
        embeddings = self.model(images)
        values = self.objective(embeddings)
        (gradient,) = torch.autograd.grad(values.sum(), images)
        return Reading(values.detach(), gradient, embeddings.detach())


@dataclass(frozen=True)
class MemberSum:
    """All members of an ensemble at once, each under its own objective: the sum of their values.

    Each member's gradient is scaled to length 1 an image before they are added, so that no member's steep surface
    outshouts the others (gradients of members differ by orders of magnitude). The reading's gradient is therefore a
    direction that raises all members, not the derivative of the values.

    Attributes:
        surfaces: One a member.
    """

    surfaces: Sequence[WhiteBox]

    @property
    def draws(self) -> int:
        """The most that any member averages."""
        return max(surface.draws for surface in self.surfaces)

    @contextmanager
    def held(self) -> Iterator[None]:
        """All members frozen."""
        with ExitStack() as stack:
            for surface in self.surfaces:
                stack.enter_context(surface.held())
            yield

    def read(self, images: torch.Tensor) -> Reading:
        """See :class:`Surface`."""
        values: torch.Tensor | float = 0.0
        direction: torch.Tensor | float = 0.0
        for surface in self.surfaces:
            reading = surface.read(images)
            gradient = finite(reading.gradient)  # else one member's NaN would be the length, and so the end, of all
            lengths = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            values, direction = values + reading.values, direction + gradient / lengths
        assert isinstance(values, torch.Tensor)
        assert isinstance(direction, torch.Tensor)
        return Reading(values, direction, None)

    def values(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`Surface`."""
        return torch.stack([surface.values(images) for surface in self.surfaces]).sum(dim=0)
