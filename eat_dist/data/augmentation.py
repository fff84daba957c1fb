"""The training augmentation of Proxy Anchor: a random part of the image, scaled to the model's size, perhaps mirrored.

The official code (tjddus9597/Proxy-Anchor-CVPR2020, ``code/dataset/utils.py``) trains with torchvision's
``RandomResizedCrop`` and ``RandomHorizontalFlip`` at their defaults: crops of 8 to 100 % of the area at a ratio of 3/4
to 4/3 (Szegedy et al. 2014, section 6), half of them mirrored. torchvision draws them from torch's global generator,
which members that are threads of one process would share; so they are drawn here, by the same algorithm, from a
generator of the caller's. The pixels are torchvision's own work (:func:`crop_and_flip`) or, for a batch on a GPU, two
matrix products (:func:`crop_and_flip_batch`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torchvision.transforms.v2 import InterpolationMode, functional

SCALE = (0.08, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width : height
FLIP = 0.5  # probability
_TRIES = 10
# Values of the padded images that are scaled at once: 128 MiB as float32, and as much again a few times over.
_AT_ONCE = 2**25


class Crop(NamedTuple):
    """One image's part, in its own pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool


@dataclass(frozen=True, eq=False)
class Crops:
    """The parts of B images.

    Attributes:
        top: [B] int64, first row.
        left: [B] int64, first column.
        height: [B] int64, rows, 1 or more.
        width: [B] int64, columns, 1 or more.
        flipped: [B] bool, whether left and right are exchanged.
    """

    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    flipped: torch.Tensor

    def __len__(self) -> int:
        return len(self.top)

    def __iter__(self) -> Iterator[Crop]:
        columns = (self.top, self.left, self.height, self.width, self.flipped)
        return (Crop(*row) for row in zip(*(column.tolist() for column in columns), strict=True))

    def __getitem__(self, part: slice) -> Crops:
        return Crops(self.top[part], self.left[part], self.height[part], self.width[part], self.flipped[part])


def draw_crops(sizes: torch.Tensor, generator: torch.Generator) -> Crops:
    """Draw a crop for each image as torchvision's ``RandomResizedCrop.make_params`` does.

    Ten times an area (uniform) and a ratio (uniform in its logarithm) are drawn; the first rectangle that fits into the
    image is put at a uniform place. If none fits, it is the largest central one whose ratio is allowed. Unlike
    torchvision, all ten are always drawn, so that one image's crop does not depend on the sizes of the others.

    Args:
        sizes: [B, 2] int64, height and width of the images in pixels.
        generator: On the CPU.
    """
    shape = (len(sizes), _TRIES)
    area = torch.empty(shape, dtype=torch.float64).uniform_(*SCALE, generator=generator)
    area = area * sizes.double().prod(dim=1, keepdim=True)
    lowest, highest = RATIO
    ratio = torch.empty(shape, dtype=torch.float64).uniform_(math.log(lowest), math.log(highest), generator=generator)
    place = torch.rand(len(sizes), 2, dtype=torch.float64, generator=generator)
    flipped = torch.rand(len(sizes), generator=generator) < FLIP

    tried = torch.stack([area / ratio.exp(), area * ratio.exp()], dim=2).sqrt().round().long()  # [B, tries, 2]
    fits = ((tried > 0) & (tried <= sizes[:, None])).all(dim=2)
    first = tried[torch.arange(len(sizes)), fits.int().argmax(dim=1)]  # argmax: of equal values the first
    found = fits.any(dim=1, keepdim=True)
    box = torch.where(found, first, _central(sizes))
    free = sizes - box
    corner = torch.where(found, (place * (free + 1)).long(), free // 2)
    return Crops(top=corner[:, 0], left=corner[:, 1], height=box[:, 0], width=box[:, 1], flipped=flipped)


def crop_and_flip(image: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """One image's crop, scaled by torchvision (bilinear, antialiased).

    Args:
        image: [C, h, w] uint8 on the CPU.
        crop: Inside the image.
        size: S, pixels.

    Returns:
        [C, S, S] uint8.
    """
    box = {"top": crop.top, "left": crop.left, "height": crop.height, "width": crop.width}
    scaled: torch.Tensor = functional.resized_crop(
        image, **box, size=[size, size], interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    return scaled.flip(-1) if crop.flipped else scaled


def crop_and_flip_batch(images: Sequence[torch.Tensor], crops: Crops, size: int) -> torch.Tensor:
    """The crops of a whole batch on one device, without waiting for it.

    Scaling is linear in the pixels and separable, so it is a product with one matrix for the columns and one for the
    rows, and a batch of images is a batched product. The matrices hold the triangle filter of Pillow and torch, as wide
    as the image shrinks. Weights and levels are rounded where torch's kernel for uint8 does so; the result differs from
    :func:`crop_and_flip` by one of the 256 levels at most, in a few values of a million.

    Crops are padded to the largest of them. What would make more than 2²⁵ values that way, C·H·W each with H and W at
    least S, is taken in parts.

    Args:
        images: B images [C, h, w] uint8 on one device.
        crops: [B] on the CPU, each inside its image.
        size: S, pixels.

    Returns:
        [B, C, S, S] float32 in [0, 1], multiples of 1/255, on the images' device.
    """
    values = len(images[0]) * max(size, int(crops.height.max())) * max(size, int(crops.width.max()))
    count = max(1, _AT_ONCE // values)
    parts = [
        _crop_part(images[start : start + count], crops[start : start + count], size)
        for start in range(0, len(images), count)
    ]
    return torch.cat(parts)


def _central(sizes: torch.Tensor) -> torch.Tensor:
    """[B, 2] int64, height and width of the largest rectangle of an allowed ratio."""
    height, width = sizes.double().unbind(dim=1)
    lowest, highest = RATIO
    allowed = torch.stack([width / lowest, height * highest], dim=1).round().long()
    return torch.minimum(sizes, allowed)


def _crop_part(images: Sequence[torch.Tensor], crops: Crops, size: int) -> torch.Tensor:
    first = images[0]
    shape = (len(images), len(first), int(crops.height.max()), int(crops.width.max()))
    padded = torch.zeros(shape, device=first.device)
    for room, image, crop in zip(padded, images, crops, strict=True):
        part = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        room[:, : crop.height, : crop.width] = part
    numbers = torch.stack([crops.height, crops.width, crops.flipped.long()])
    if first.is_cuda:  # only a copy from pinned memory does not wait
        numbers = numbers.pin_memory()
    height, width, flipped = numbers.to(first.device, non_blocking=True)
    rows = _interpolation(height, size, shape[2])
    columns = _interpolation(width, size, shape[3])
    columns = torch.where(flipped.bool()[:, None, None], columns.flip(1), columns)
    narrow = _levels(padded @ columns.mT[:, None])  # [B, C, H, S]
    return _levels(rows[:, None] @ narrow) / 255


def _interpolation(lengths: torch.Tensor, size: int, longest: int) -> torch.Tensor:
    """[B, size, longest] float32: how much each pixel in a row of an image counts in each scaled one."""
    shrink = lengths.double()[:, None, None] / size
    middle = (torch.arange(size, device=lengths.device) + 0.5)[:, None] * shrink
    pixel = torch.arange(longest, device=lengths.device) + 0.5
    weights = (1 - (pixel - middle).abs() / shrink.clamp(min=1)).clamp(min=0) * (pixel < lengths[:, None, None])
    weights = weights / weights.sum(dim=2, keepdim=True)
    # torch's kernel for uint8 has 16-bit weights, with as many binary digits as the largest of them leaves.
    digits = (torch.log2((2**15 - 0.5) / weights.amax(dim=(1, 2), keepdim=True)).ceil() - 1).clamp(max=22)
    return (torch.floor(weights * 2**digits + 0.5) / 2**digits).float()


def _levels(values: torch.Tensor) -> torch.Tensor:
    """Rounded to the levels 0 … 255, halves up."""
    return torch.floor(values + 0.5).clamp(0, 255)
