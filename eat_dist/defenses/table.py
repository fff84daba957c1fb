"""The defenses by name, what a training step works with, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from eat_dist.attacks import Generators, GradientAttack
from eat_dist.batch import Batch
from eat_dist.config import DefenseConfig
from eat_dist.exchange import Exchange, Pending, Tensors
from eat_dist.losses import MetricLoss
from eat_dist.models import Embedder
from eat_dist.registry import Registry, own_options
from eat_dist.replicas import ALONE, Replicas
from eat_dist.robustness.statistics import ClassCounts, EnsembleStatistics, MemberStatistics, Received, fooled

# Optional fields that are no single defense's own: they belong to the transfer rules.
SHARED = {"relay_steps"}
# What a forward pass alone costs, in forward-backward passes.
FORWARD = 1 / 3


@dataclass
class Waits:
    """Seconds a step stood still."""

    coordinator: float = 0.0
    exchange: float = 0.0
    data: float = 0.0


@dataclass
class Learner:
    """One member as a training step sees it.

    Attributes:
        rank: The member's number.
        model: Images in [0, 1] → embeddings; in training mode outside attacks. With several replicas: this one's images
            → embeddings of the whole batch (:mod:`eat_dist.replicas`).
        loss: With the member's proxies.
        attack: The configured attack.
        exchange: The way to the other members.
        config: β, γ, λ and the rule; what only some defenses have is in ``options``.
        generator: purpose → random numbers for this member, iteration and purpose, on the model's device.
        options: The defense's own options by name, configured or its defaults (:func:`options_of`).
        replicas: The other processes that train the same member, if any.
        memory: What a defense carries from one iteration to the next, by name; kept in checkpoints. Empty at first.
        last_gradient_norm: Of the previous update.
        last_waits: Where the previous iteration stood still.
        last_time: Seconds the previous iteration took.
    """

    rank: int
    model: nn.Module
    loss: MetricLoss
    attack: GradientAttack
    exchange: Exchange
    config: DefenseConfig
    generator: Callable[[str], Generators]
    options: Mapping[str, Any] = field(default_factory=dict)
    replicas: Replicas = ALONE
    memory: dict[str, float] = field(default_factory=dict)
    last_gradient_norm: float | None = None
    last_waits: Waits = field(default_factory=Waits)
    last_time: float = 0.0

    @property
    def embedder(self) -> Embedder:
        """The network itself; with several replicas it maps this one's images alone."""
        return next(module for module in self.model.modules() if isinstance(module, Embedder))


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, besides the gradients in the parameters.

    Attributes:
        ensemble: The merged statistics of all members.
        passes: Forward-backward passes over one batch that this step took; a forward pass alone counts as a third.
        waits: Where it stood still.
    """

    ensemble: EnsembleStatistics
    passes: float
    waits: Waits = field(default_factory=Waits)


class Defense(Protocol):
    """One training step: fills the gradients (which the caller has cleared) and hands in the statistics.

    The caller checks the losses for NaN, then takes the optimiser's step.
    """

    def __call__(self, learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult: ...  # noqa: D102


@dataclass(frozen=True)
class DefenseEntry:
    """A defense of the table.

    Attributes:
        step: Its training step.
        options: The optional fields of :class:`DefenseConfig` (those that default to None) that it takes, with its
            own defaults.
    """

    step: Defense
    options: Mapping[str, Any]


DEFENSES: Registry[DefenseEntry] = Registry("defense")


def register(name: str, **options: Any) -> Callable[[Defense], Defense]:
    """Decorator that adds a training step to the table under ``name``, with the options it takes and their defaults."""

    def add(step: Defense) -> Defense:
        DEFENSES.register(name)(DefenseEntry(step, options))
        return step

    return add


def options_of(config: DefenseConfig) -> dict[str, Any]:
    """The configured defense's own options: those that are set, its defaults for the others.

    Raises:
        ConfigError: No such defense, or an option is set that it does not take.
    """
    optional = {name for name, about in DefenseConfig.model_fields.items() if about.default is None}
    given = config.model_dump(include=optional - SHARED, exclude_none=True)
    defaults = DEFENSES[config.name].options
    return own_options(DEFENSES.kind, config.name, section="defense", defaults=defaults, given=given)


def await_merged(pending: Pending, waits: Waits) -> EnsembleStatistics:
    """Wait for the coordinator's answer and book the time."""
    begin = time.perf_counter()
    merged: EnsembleStatistics = pending.wait()
    waits.coordinator += time.perf_counter() - begin
    return merged


def await_batches(pending: Pending, waits: Waits) -> list[tuple[int, Tensors]]:
    """Wait for what peers sent, (sender, tensors) in the plan's order, and book the time."""
    begin = time.perf_counter()
    batches: list[tuple[int, Tensors]] = pending.wait()
    waits.exchange += time.perf_counter() - begin
    return batches


@dataclass(frozen=True)
class Measured:
    """Own measurements still on the device, so that one copy brings all of them to the CPU.

    Attributes:
        clean_loss: Scalar.
        adversarial_loss: Scalar.
        similarities: [B, C] to the proxies, of the own adversarial batch; at any positive scale.
        labels: [B] its labels.
        displacement: Scalar.
    """

    clean_loss: torch.Tensor | None = None
    adversarial_loss: torch.Tensor | None = None
    similarities: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    displacement: torch.Tensor | None = None


@dataclass(frozen=True)
class MeasuredPeer:
    """Measurements on a received batch, on the device: loss (scalar) and fooled rate (scalar)."""

    sender: int
    loss: torch.Tensor
    fooled_rate: torch.Tensor


def statistics_of(
    learner: Learner, batch: Batch, ensemble: EnsembleStatistics, own: Measured, peers: list[MeasuredPeer]
) -> MemberStatistics:
    """Bring a step's measurements to the CPU, in one copy, as :class:`MemberStatistics`."""
    optional = (own.clean_loss, own.adversarial_loss, own.displacement)
    scalars = [value for value in optional if value is not None]
    scalars += [value for peer in peers for value in (peer.loss, peer.fooled_rate)]
    parts = [torch.stack([value.detach().float() for value in scalars])] if scalars else []
    if own.similarities is not None and own.labels is not None:
        parts += [fooled(own.similarities.detach(), own.labels).float(), own.labels.float()]
    numbers = torch.cat(parts).cpu() if parts else torch.zeros(0)

    values = iter(numbers[: len(scalars)].tolist())
    clean_loss, adversarial_loss, displacement = (None if entry is None else next(values) for entry in optional)
    received = tuple(Received(peer.sender, next(values), next(values)) for peer in peers)
    fooled_rate = by_class = None
    if len(parts) > 1:
        is_fooled, labels = numbers[len(scalars) :].view(2, -1).numpy()
        fooled_rate = float(is_fooled.mean())
        by_class = ClassCounts.of(is_fooled > 0, labels.astype("int64"))
    return MemberStatistics(
        member=learner.rank,
        iteration=ensemble.iteration,
        batch_size=len(batch.labels),
        clean_loss=clean_loss,
        adversarial_loss=adversarial_loss,
        fooled_rate=fooled_rate,
        displacement=displacement,
        gradient_norm=learner.last_gradient_norm,
        received=received,
        by_class=by_class,
        coordinator_wait=learner.last_waits.coordinator,
        exchange_wait=learner.last_waits.exchange,
        data_wait=learner.last_waits.data,
        iteration_time=learner.last_time,
    )
