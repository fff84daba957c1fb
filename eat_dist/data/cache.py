"""Decoded images: made when asked for, or made once and kept in memory; and whether they fit there."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from eat_dist.data.images import ImageSet
from eat_dist.data.memory import available_memory
from eat_dist.data.parallel import in_order, workers

Indices = npt.NDArray[np.int64]

_CHUNK = 64  # images decoded at a time; neighbours lie together on disk


class Pixels(Protocol):
    """Decoded images of a training set, uint8."""

    def centred(self, indices: torch.Tensor) -> torch.Tensor:
        """[B, C, S, S]: the images at ``indices`` ([B] int64) in inference form."""
        ...

    def stored(self, index: int) -> torch.Tensor:
        """[C, h, w]: one image as it is stored."""
        ...


class Decoding:
    """Images decoded when they are asked for, on the CPU; picklable where the image set is."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def centred(self, indices: torch.Tensor) -> torch.Tensor:
        """See :class:`Pixels`."""
        return (self._images.batch(indices, "cpu").images * 255).round().to(torch.uint8)  # exact: they are k / 255

    def stored(self, index: int) -> torch.Tensor:
        """See :class:`Pixels`."""
        return self._images.stored(index)


class Decoded:
    """Images decoded once, and kept on a device in one of the two forms.

    Args:
        images: The training set.
        kept: Indices of the images to keep, all different.
        as_stored: Keep them as they are stored (for augmentation), each a tensor; else in inference form, all in one.
        device: Where they are kept.
        threads: That decode images as they are stored.

    Raises:
        DataError: An image cannot be decoded.
    """

    def __init__(self, images: ImageSet, kept: Indices, *, as_stored: bool, device: torch.device, threads: int) -> None:
        self._place = torch.full((len(images),), -1)
        self._place[torch.from_numpy(kept)] = torch.arange(len(kept))
        self._device = device
        chunks = [kept[start : start + _CHUNK] for start in range(0, len(kept), _CHUNK)]
        if as_stored:
            with workers(threads) as pool:
                decoded = in_order(
                    pool, lambda chunk: [images.stored(index) for index in chunk.tolist()], chunks, ahead=2 * threads
                )
                self._stored = [image.to(device) for chunk in decoded for image in chunk]
            return
        self._centred = torch.empty((len(kept), *images.image_shape), dtype=torch.uint8, device=device)
        for number, chunk in enumerate(chunks):  # a set decodes a batch by threads of its own
            self._centred[number * _CHUNK :][: len(chunk)] = Decoding(images).centred(torch.from_numpy(chunk))

    def centred(self, indices: torch.Tensor) -> torch.Tensor:
        """See :class:`Pixels`; on the device."""
        return self._centred[sent(self._place[indices], self._device)]

    def stored(self, index: int) -> torch.Tensor:
        """See :class:`Pixels`; on the device."""
        return self._stored[int(self._place[index])]


def sent(small: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device, without waiting for it; only a copy from pinned memory does not."""
    return small.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else small


def decoded_bytes(images: ImageSet, kept: Indices, *, as_stored: bool) -> int:
    """What :class:`Decoded` takes, found without decoding."""
    channels, height, width = images.image_shape
    if not as_stored:
        return len(kept) * channels * height * width
    return channels * int(images.sizes[torch.from_numpy(kept)].prod(dim=1).sum())


def free_memory(device: torch.device) -> int:
    """Bytes: of a GPU, or what this process can still take of the machine's or the container's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def readable(size: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
