"""Labelled images, and the pair of a training and a test set without a class in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from eat_dist.batch import Batch
from eat_dist.errors import DataError

Indices = npt.NDArray[np.int64] | torch.Tensor


class ImageSet(Protocol):
    """N images with a class each, in memory or in shards.

    Attributes:
        labels: [N] int64 on the CPU, in 0 … num_classes − 1.
        class_names: The name of each label, all different.
        names: Where each of the N images came from.
        is_query: [N] bool, which images are queries; the others are the gallery. None: every image is a query against
            all others.
        sizes: [N, 2] int64, height and width of each image as it is stored.
        image_shape: (C, H, W) of the images in a batch.
    """

    @property
    def labels(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def class_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def is_query(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def sizes(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # noqa: D102
    @property
    def num_classes(self) -> int: ...  # noqa: D102
    def __len__(self) -> int: ...

    def stored(self, index: int) -> torch.Tensor:
        """One image as it is stored, [C, h, w] uint8: what augmentation starts from. Safe in several threads."""
        ...

    def batch(self, indices: Indices, device: torch.device | str) -> Batch:
        """The images at ``indices`` [B] (repeats are allowed) as a model sees them at inference.

        Returns:
            Images [B, C, H, W] float32 in [0, 1] and labels on ``device``, indices on the CPU.
        """
        ...

    def digest(self) -> str:
        """SHA-256 of images, labels and roles: what a measurement on this set depends on."""
        ...

    def of_classes(self, labels: Sequence[int]) -> ImageSet:
        """The images of some classes, in the order of this set; a class's new label is its place in ``labels``."""
        ...


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """An :class:`ImageSet` in memory, all of one size.

    Attributes:
        images: [N, C, H, W] uint8.
        labels: [N] int64, in 0 … num_classes − 1.
        class_names: The name of each label, all different.
        names: Where each of the N images came from.
        is_query: [N] bool or None, as :class:`ImageSet` has it.
        known_digest: :meth:`digest` of the set that this one was decoded from; None: it is computed.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    is_query: torch.Tensor | None = None
    known_digest: str | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8, self.images.dtype
        assert self.images.ndim == 4, self.images.shape
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.labels.shape == (len(self.images),) == (len(self.names),)
        assert self.is_query is None or (self.is_query.dtype == torch.bool and len(self.is_query) == len(self))
        assert len(set(self.class_names)) == len(self.class_names)
        assert not len(self) or 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def sizes(self) -> torch.Tensor:
        """[N, 2] int64, height and width of each image."""
        return torch.tensor(self.image_shape[1:], dtype=torch.int64).expand(len(self), 2)

    def __len__(self) -> int:
        return len(self.images)

    def stored(self, index: int) -> torch.Tensor:
        """One image, [C, H, W] uint8."""
        return self.images[index]

    def batch(self, indices: Indices, device: torch.device | str) -> Batch:
        """The images at ``indices``; they travel as uint8, a quarter of the float32 bytes."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        images = self.images[chosen].to(device).float() / 255
        return Batch(images=images, labels=self.labels[chosen].to(device), indices=chosen)

    def digest(self) -> str:
        """SHA-256 of pixels, labels and roles."""
        if self.known_digest is not None:
            return self.known_digest
        found = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        for tensor in (self.images, self.labels, self.is_query):
            found.update(b"-" if tensor is None else tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def of_classes(self, labels: Sequence[int]) -> LabelledImages:
        """See :class:`ImageSet`; a copy."""
        kept, renumbered = renumbered_subset(self.labels, labels)
        return LabelledImages(
            images=self.images[kept],
            labels=renumbered,
            class_names=tuple(self.class_names[label] for label in labels),
            names=tuple(self.names[index] for index in kept.tolist()),
            is_query=None if self.is_query is None else self.is_query[kept],
        )


def renumbered_subset(all_labels: torch.Tensor, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images are of the chosen classes, and their new labels.

    Args:
        all_labels: [N] int64.
        chosen: K labels, all different.

    Returns:
        [n] int64, ascending places in ``all_labels``, and [n] int64 labels in 0 … K − 1.
    """
    assert len(set(chosen)) == len(chosen), chosen
    place = torch.full((int(all_labels.max()) + 1 if len(all_labels) else 1,), -1)
    place[torch.tensor(chosen, dtype=torch.int64)] = torch.arange(len(chosen))
    kept = (place[all_labels] >= 0).nonzero().squeeze(1)
    return kept, place[all_labels[kept]]


@dataclass(frozen=True, eq=False)
class ZeroShotData:
    """What is trained on and what is tested on; no class is in both. :func:`check` is run on it.

    Attributes:
        train: The training set.
        test: The test set.
        resize: Shorter side, in pixels, that an image is scaled to before its centre is cut out for the model.
        skipped: Names of images left out because they could not be decoded (``data.on_bad_image: skip``).
        inverted: Whether black and white are exchanged against the image files; who embeds a file must do the same.

    Raises:
        DataError: As :func:`check`.
    """

    train: ImageSet
    test: ImageSet
    resize: int
    skipped: tuple[str, ...] = ()
    inverted: bool = False

    def __post_init__(self) -> None:
        check(self.train, self.test, skipped=self.skipped)


def check(train: ImageSet, test: ImageSet, *, skipped: Sequence[str] = ()) -> None:
    """Check what retrieval on unseen classes needs.

    Raises:
        DataError: A class is in both sets, a set has fewer than two classes, a training class has no image, a test
            class has fewer than two, or a query's class has no gallery image.
    """
    common = sorted(set(train.class_names) & set(test.class_names))
    if common:
        raise DataError(
            f"training and test classes must differ; {_counted(len(common), 'class')} in both, e.g. "
            f"'{common[0]}'. Remove them from one of the sets."
        )
    left_out = f" ({_counted(len(skipped), 'undecodable image')} left out of the sets)" if skipped else ""
    for role, images, least in (("training", train, 1), ("test", test, 2)):
        if images.num_classes < 2:
            raise DataError(
                f"the {role} set needs at least two classes; it has {images.num_classes}. Add images of another class."
            )
        counts = torch.bincount(images.labels, minlength=images.num_classes)
        for name, count in zip(images.class_names, counts.tolist(), strict=True):
            if count < least:
                raise DataError(
                    f"{role} class '{name}' has {'one image' if count else 'no image'}{left_out}; "
                    + ("a class needs at least two to be retrieved" if role == "test" else "there is nothing to learn")
                    + ". Remove it or add images."
                )
    if test.is_query is not None:
        in_gallery = set(test.labels[~test.is_query].tolist())
        alone = [label for label in sorted(set(test.labels[test.is_query].tolist())) if label not in in_gallery]
        if not bool(test.is_query.any()):
            raise DataError(f"the test set has a gallery but no query{left_out}. Complete it.")
        if alone:
            raise DataError(
                f"every query needs a gallery image of its class; {_counted(len(alone), 'class')} of queries without "
                f"one{left_out}, e.g. '{test.class_names[alone[0]]}'. Complete the gallery."
            )


def _counted(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"
