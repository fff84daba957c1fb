"""How iterations make epochs, and the learning rate of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eat_dist.config import OptimiserConfig, RunConfig
from eat_dist.data.splits import Splits


@dataclass(frozen=True)
class Schedule:
    """How iterations make epochs, equal in every member.

    Attributes:
        iterations_per_epoch: ⌈largest split / batch size⌉: nobody's epoch leaves an image out (but under
            ``adp``, whose members train on each other's batches in turn).
        epochs: Of the run.
    """

    iterations_per_epoch: int
    epochs: int

    @classmethod
    def of(cls, config: RunConfig, splits: Splits) -> Schedule:
        """The schedule of a run."""
        largest = max(len(indices) for indices in splits.indices)
        return cls(math.ceil(largest / config.data.batch_size), config.train.epochs)

    @property
    def iterations(self) -> int:
        """Of the whole run."""
        return self.iterations_per_epoch * self.epochs

    def epoch(self, iteration: int) -> int:
        """The epoch, from 0, that an iteration belongs to."""
        return iteration // self.iterations_per_epoch

    def learning_rate_factor(self, config: OptimiserConfig, iteration: int) -> float:
        """What the configured learning rate is multiplied with; a function of the iteration, so it needs no state."""
        if config.schedule == "cosine":  # Loshchilov & Hutter 2016, equation (5), one period
            return 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))
        if config.schedule == "step":
            return config.step_factor ** (self.epoch(iteration) // config.step_epochs)
        return 1.0
