"""Transfer attack (Papernot, McDaniel & Goodfellow 2016): craft on a model one has, use on the one one has not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.randomness import Generators
from eat_dist.attacks.surface import Surface
from eat_dist.attacks.table import Attack


@dataclass(frozen=True)
class Transfer:
    """Any attack, crafted on another surface; it never asks the victim's.

    It is not in ATTACKS, whose attacks are made of settings alone: it needs a source (another member, the ensemble
    without the victim, another run's model), with an objective whose references are the source's own.

    Attributes:
        attack: What is run on the source.
        source: The surface that it climbs; made for the same images as those of the call.
    """

    attack: Attack
    source: Surface

    @property
    def ball(self) -> Ball:
        """The crafting attack's."""
        return self.attack.ball

    @property
    def passes(self) -> float:
        """Those over the source; the victim has none."""
        return self.attack.passes

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`~eat_dist.attacks.table.Attack`; ``surface``, the victim's, is left alone."""
        return self.attack(self.source, images, generators=generators)
