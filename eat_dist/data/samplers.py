"""Which images are drawn when: endless streams that are pure functions of an integer position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from eat_dist.config import DataConfig
from eat_dist.errors import ConfigError, DataError
from eat_dist.seeding import generator

Indices = npt.NDArray[np.int64]


class Sampler(Protocol):
    """Draws batches from a split. Positions count batches from 0 and never end."""

    @property
    def batches_per_epoch(self) -> int:
        """⌈N / B⌉."""
        ...

    def batch_indices(self, position: int) -> Indices:
        """[B] indices into the labels it was made with; the same position always gives the same ones."""
        ...


class ShuffleSampler:
    """Every image once a pass, each pass in a new order; batches run on across passes, so none is dropped.

    Corner cases: a set smaller than the batch repeats images within the batch. A batch that spans two passes
    holds no image twice where :class:`_Stream` can arrange it (always from 2·batch_size − 1 images on).

    Args:
        labels: [N] class of each image that may be drawn.
        batch_size: B.
        seed: Of this sampler; give every member its own.

    Raises:
        DataError: The labels hold fewer than two classes.
    """

    def __init__(self, labels: npt.ArrayLike | torch.Tensor, *, batch_size: int, seed: int) -> None:
        given, _ = _two_classes(labels)
        self.batches_per_epoch = -(-len(given) // batch_size)
        self._batch_size = batch_size
        self._stream = _Stream(np.arange(len(given)), window=batch_size, key=(seed, "shuffle"))

    def batch_indices(self, position: int) -> Indices:
        """[B] indices into ``labels``."""
        return self._stream.take(position * self._batch_size, self._batch_size)


class ClassBalancedSampler:
    """Batches of batch_size / images_per_class classes with images_per_class images each.

    Classes come from an endless stream in which every pass visits each class once, in a new order. On its
    visit v a class gives the images v·images_per_class … of its own endless stream of permutations; since v
    is the pass number, nothing has to be remembered. Every image of every class is drawn, and equally often
    within its class; images of small classes are drawn more often than those of large ones, which is what
    balancing means.

    Corner cases: a class smaller than images_per_class repeats images within a batch. With fewer classes than
    a batch holds, classes repeat within it. Otherwise a batch that spans two passes holds no class twice
    where :class:`_Stream` can arrange it (always from twice as many classes as a batch holds on); the same is
    true of the images of one class in a batch.

    Args:
        labels: [N] class of each image that may be drawn; not every class of the dataset has to occur.
        batch_size: B, a multiple of images_per_class.
        images_per_class: Images of one class in a batch.
        seed: Of this sampler; give every member its own.

    Raises:
        DataError: The labels hold fewer than two classes.
        ConfigError: batch_size is no multiple of images_per_class.
    """

    def __init__(
        self, labels: npt.ArrayLike | torch.Tensor, *, batch_size: int, images_per_class: int, seed: int
    ) -> None:
        if batch_size % images_per_class:
            raise ConfigError(
                f"batch_size must be a multiple of images_per_class; got {batch_size} and {images_per_class}"
            )
        given, classes = _two_classes(labels)
        self.batches_per_epoch = -(-len(given) // batch_size)
        self._classes_per_batch = batch_size // images_per_class
        self._images_per_class = images_per_class
        self._classes = _Stream(classes, window=self._classes_per_batch, key=(seed, "classes"))
        self._images = {
            int(label): _Stream(
                np.flatnonzero(given == label), window=images_per_class, key=(seed, "images", int(label))
            )
            for label in classes
        }

    def batch_indices(self, position: int) -> Indices:
        """[B] indices into ``labels``, the images of one class side by side."""
        first = position * self._classes_per_batch
        drawn = []
        for slot, label in enumerate(self._classes.take(first, self._classes_per_batch), start=first):
            visit = slot // len(self._classes)
            images = self._images[int(label)]
            drawn.append(images.take(visit * self._images_per_class, self._images_per_class))
        return np.concatenate(drawn)


def make_sampler(config: DataConfig, labels: npt.ArrayLike | torch.Tensor, *, seed: int) -> Sampler:
    """The configured sampler over ``labels`` ([N], the classes of one member's split).

    Raises:
        DataError: The labels hold fewer than two classes.
    """
    if config.sampler == "shuffle":
        return ShuffleSampler(labels, batch_size=config.batch_size, seed=seed)
    return ClassBalancedSampler(
        labels, batch_size=config.batch_size, images_per_class=config.images_per_class, seed=seed
    )


class _Stream:
    """An endless sequence of permutations of ``items``, read in windows of ``window`` from its start on.

    Pass p is a permutation seeded by the key and p. A window that spans two passes could hold an item twice;
    so the later pass swaps such items out of its head, for items behind the window. The last items of a pass,
    which the next window spans, are never swapped: so pass p depends on the drawn order of pass p − 1 alone,
    and any position can be reached at once. With n items and windows of w no window holds an item twice if n
    ≥ 2w − gcd(n, w): the head, the tail and the earlier pass's share of the window then leave enough to swap
    with. Below that (w ≤ n) it is made rarer; with n < w it cannot be.
    """

    def __init__(self, items: Indices, *, window: int, key: Sequence[int | str]) -> None:
        self._items = items
        self._window = window
        self._key = tuple(key)
        # The newest passes, for speed only: whatever is not here is drawn again, and equal.
        self._passes: dict[int, Indices] = {}

    def __len__(self) -> int:
        return len(self._items)

    def take(self, start: int, count: int) -> Indices:
        """The ``count`` items from position ``start`` on."""
        assert start >= 0, start
        pieces = []
        while count:
            number, offset = divmod(start, len(self))
            piece = self._pass(number)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def _pass(self, number: int) -> Indices:
        if number not in self._passes:
            if len(self._passes) >= 2:
                self._passes.clear()
            self._passes[number] = self._arranged(number)
        return self._passes[number]

    def _arranged(self, number: int) -> Indices:
        order = self._drawn(number)
        before = number * len(self) % self._window  # of the window over the pass's start: items of the earlier pass
        if not before or len(self) < self._window:
            return order
        head = self._window - before
        free = len(self) - (number + 1) * len(self) % self._window  # behind it: the tail that the next pass reads
        taken = np.isin(order, self._drawn(number - 1)[-before:])
        repeated = np.flatnonzero(taken[: min(head, free)])
        others = head + np.flatnonzero(~taken[head:free])
        swaps = min(len(repeated), len(others))
        repeated, others = repeated[:swaps], others[:swaps]
        order[repeated], order[others] = order[others], order[repeated]
        return order

    def _drawn(self, number: int) -> Indices:
        order = torch.randperm(len(self), generator=generator(*self._key, number)).numpy()
        return np.asarray(self._items[order], dtype=np.int64)


def _two_classes(labels: npt.ArrayLike | torch.Tensor) -> tuple[Indices, Indices]:
    given = np.asarray(labels, dtype=np.int64)
    classes = np.unique(given)
    if len(classes) < 2:
        raise DataError(
            f"a batch needs images of at least two classes to compare; the split's {len(given)} images have "
            f"{len(classes)}. Use more classes, or ensemble.split.by: sample."
        )
    return given, classes
