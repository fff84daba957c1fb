"""Where clean images lie, and images attacked so that they lie elsewhere."""

from __future__ import annotations

import torch

from eat_dist.attacks import WhiteBox, frozen
from eat_dist.attacks.objectives import displacement
from eat_dist.defenses.table import Learner


def reference_embeddings(learner: Learner, images: torch.Tensor) -> torch.Tensor:
    """[B, D] where images [B, C, H, W] lie as an attack sees them: evaluation mode, no gradient. A third of a pass."""
    with frozen(learner.model), torch.no_grad():
        embeddings: torch.Tensor = learner.model(images)
    return embeddings


def displaced(learner: Learner, images: torch.Tensor) -> torch.Tensor:
    """The images attacked so that their embeddings move as far as they can: x̃ = argmax ‖f(x̃) − f(x)‖.

    It costs the attack's passes and a forward pass. The attack must start at random, which the config demands: at the
    image itself the distance has no slope.
    """
    surface = WhiteBox(learner.model, displacement(reference_embeddings(learner, images)))
    return learner.attack(surface, images, generators=learner.generator("attack"))
