"""From a decoded image to what a model sees, at inference: torchvision's Resize and CenterCrop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from eat_dist.data.decode import to_tensor
from eat_dist.errors import ConfigError

_LONGEST_STRIP = 8  # times its width


@dataclass(frozen=True)
class InferenceForm:
    """Scale the shorter side to ``resize`` (bilinear, antialiased), then cut ``size`` × ``size`` out of the centre.

    The official Proxy Anchor recipe has 256 and 224. A square image with resize = size is only scaled.

    Raises:
        ConfigError: ``resize`` is smaller than ``size``, which would leave a black frame.
    """

    resize: int
    size: int

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ConfigError(
                f"data.resize, the shorter side before the centre crop, must be at least data.image_size = "
                f"{self.size}; got {self.resize}"
            )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """An L or RGB image → [C, size, size] uint8."""
        # Of a long strip only the middle is cut out; scaling up all of it could take gigabytes.
        width, height = image.size
        if max(width, height) > _LONGEST_STRIP * min(width, height):
            longest = _LONGEST_STRIP * min(width, height)
            image = functional.center_crop(image, [min(height, longest), min(width, longest)])
        if min(image.size) != self.resize:
            image = functional.resize(image, [self.resize])
        if image.size != (self.size, self.size):
            image = functional.center_crop(image, [self.size, self.size])
        return to_tensor(image)
