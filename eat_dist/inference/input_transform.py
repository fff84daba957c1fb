"""Input transformations (Guo et al. 2017, "Countering adversarial images using input transformations")."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eat_dist.attacks import Generators, straight_through
from eat_dist.attacks.randomness import uniform
from eat_dist.inference.compression import jpeg, rounded
from eat_dist.inference.resampling import linear, resample, whole
from eat_dist.inference.table import ImageTransform, register
from eat_dist.inference.total_variation import smoothed


@register(
    "input_transform",
    training=False,
    draws=1,
    transforms=("total_variation",),
    crop=90 / 224,
    bits=3,
    quality=75,
    drop=0.5,
    tv_weight=0.03,
)
class InputTransform(ImageTransform):
    """One transformation, or several one after the other (section 4 of the paper, with the authors' settings).

    - ``crop_rescale``: a square crop at a uniformly drawn place, scaled back linearly (differentiable). The paper
      averages 30 of them (``draws``). Deviation: scaled to the image's own size, as the networks take it.
    - ``bit_depth``: values rounded to 2^bits levels from 0 to 1 (BPDA identity).
    - ``jpeg``: compression at ``quality`` (BPDA identity).
    - ``total_variation``: a share of the values is dropped at random, then the image of least total variation near
      the others is taken: min_z ½·‖(1 − X) ⊙ (z − x)‖² + λ·TV(z) (equation (2); BPDA identity, dropped or not, as in
      Athalye et al. 2018). The square and the isotropic TV are those of the authors' split Bregman solver; ours is
      another with the same minimiser (:mod:`eat_dist.inference.total_variation`).

    Image quilting is left out: it needs a data base of a million patches.

    Args:
        transforms: Their names, in order.
        crop: Side of the crop as a share of the image's.
        bits: Of ``bit_depth``.
        quality: Of ``jpeg``.
        drop: Probability that a value is dropped.
        tv_weight: λ.
    """

    def __init__(
        self, transforms: Sequence[str], *, crop: float, bits: int, quality: int, drop: float, tv_weight: float
    ) -> None:
        super().__init__()
        self.transforms = tuple(transforms)
        self.crop = crop
        self.bits = bits
        self.quality = quality
        self.drop = drop
        self.tv_weight = tv_weight
        self.randomised = "crop_rescale" in transforms or ("total_variation" in transforms and drop > 0)

    def forward(self, images: torch.Tensor, generators: Generators | None = None) -> torch.Tensor:
        """See :class:`ImageTransform`."""
        for name in self.transforms:
            if name == "crop_rescale":
                images = self._crop_rescale(images, generators)
            elif name == "bit_depth":
                images = rounded(images, 2**self.bits - 1)
            elif name == "jpeg":
                images = jpeg(images, [self.quality] * len(images))
            else:
                kept = (uniform(images, generators) >= self.drop).to(images.dtype)
                images = straight_through(images, smoothed(images, kept, weight=self.tv_weight))
        return images

    def _crop_rescale(self, images: torch.Tensor, generators: Generators | None) -> torch.Tensor:
        drawn = uniform(images.new_empty(len(images), 2), generators).unbind(1)
        matrices = []
        for length, place in zip(images.shape[2:], drawn, strict=True):
            side = max(1, int(self.crop * length + 0.5))
            start = whole(place, length - side + 1).to(images.dtype)
            extent = torch.full_like(start, side)
            matrices.append(linear(length, count=length, start=start, extent=extent))
        return resample(images, *matrices)
