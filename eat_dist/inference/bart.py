"""BaRT (Raff et al. 2019, "Barrage of random transforms for adversarially robust defense")."""

from __future__ import annotations

import torch

from eat_dist.attacks import Generators
from eat_dist.attacks.randomness import normal, uniform
from eat_dist.inference.bart_groups import COLOUR_GROUPS, GROUPS
from eat_dist.inference.table import ImageTransform, register

# The most that a group draws for an image.
_DRAWN = 8


@register("bart", training=False, draws=1, groups=5)
class Bart(ImageTransform):
    """k of the transform groups, drawn without repeats and in random order, anew for every image (section 3).

    Ten groups for images of three channels, eight for one (:mod:`eat_dist.inference.bart_groups`); where k is larger
    than that, all of them. The paper's k is 5 in most of its tables. Within a group one of its transforms and its
    strength are drawn. After each, values are clipped to [0, 1].

    Args:
        groups: k.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, images: torch.Tensor, generators: Generators | None = None) -> torch.Tensor:
        """See :class:`ImageTransform`; of the images' size."""
        available = [group for group in GROUPS if images.shape[1] == 3 or group not in COLOUR_GROUPS]
        # All is drawn before anything is done, so that an image's numbers do not depend on what others go through.
        order = uniform(images.new_empty(len(images), len(available)), generators).argsort(dim=1)
        drawn = uniform(images.new_empty(len(images), len(available), _DRAWN), generators)
        # One channel more than the images have: the field of fft_perturbation, which is not the injected noise.
        noise = torch.cat([normal(images, generators), normal(images[:, :1], generators)], dim=1)
        for chosen in order[:, : self.groups].cpu().unbind(1):
            rows = [(chosen == number).nonzero().squeeze(1).to(images.device) for number in range(len(available))]
            done = [
                group(images[these], drawn[these, number], noise[these]).clamp(0, 1)
                for number, (group, these) in enumerate(zip(available, rows, strict=True))
                if len(these)
            ]
            if done:  # an empty batch goes through nothing
                images = torch.cat(done)[torch.cat(rows).argsort()]
        return images
