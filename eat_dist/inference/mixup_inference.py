"""Mixup inference (Pang, Xu & Zhu 2019, "Mixup inference: better exploiting mixup to defend adversarial attacks")."""

from __future__ import annotations

import torch

from eat_dist.attacks import Generators
from eat_dist.attacks.randomness import uniform
from eat_dist.inference.resampling import whole
from eat_dist.inference.table import ImageTransform, register


@register("mixup_inference", draws=30, share=0.5, pool=200)
class MixupInference(ImageTransform):
    """t(x) = λ·x + (1 − λ)·x_s, x_s a clean image drawn uniformly from a fixed pool, another one for each view.

    Algorithm 1 of the paper averages the predictions of 30 views; here it is the embeddings that are averaged and
    scaled to length 1 (:class:`eat_dist.inference.Defended`). Deviations: the paper draws x_s from another class than
    the predicted one (MI-OL) or from the same (MI-PL). Images of unseen classes have no predicted class among the
    pool's, so every one is of another class, which is MI-OL. The pool is drawn from the training set, not from the test
    set as in the authors' code.

    Args:
        pool: uint8 [P, C, H, W].
        share: λ.
    """

    pool: torch.Tensor

    def __init__(self, pool: torch.Tensor, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("pool", pool)

    def forward(self, images: torch.Tensor, generators: Generators | None = None) -> torch.Tensor:
        """See :class:`ImageTransform`."""
        chosen = whole(uniform(images.new_empty(len(images)), generators), len(self.pool))
        return self.share * images + (1 - self.share) * (self.pool[chosen].to(images.dtype) / 255)
