"""Labelled images in memory, and the pair of a training and a test set without a class in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from eat_dist.batch import Batch
from eat_dist.errors import DataError


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A set of images with a class each, on the CPU.

    Attributes:
        images: [N, C, H, W] uint8.
        labels: [N] int64, in 0 … num_classes − 1.
        class_names: The name of each label, all different.
        names: Where each of the N images came from.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8, self.images.dtype
        assert self.images.ndim == 4, self.images.shape
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.labels.shape == (len(self.images),) == (len(self.names),)
        assert len(set(self.class_names)) == len(self.class_names)
        assert not len(self) or 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes

    @classmethod
    def stack(
        cls, images: Mapping[str, torch.Tensor], *, class_of: Callable[[str], str], class_names: Sequence[str]
    ) -> LabelledImages:
        """Put single images together.

        Args:
            images: Name → [C, H, W] uint8; their order is kept.
            class_of: The class name of the image of that name.
            class_names: All classes, in the order that the labels count them. A class whose images are all
                left out stays in the list, so that :func:`check` finds it instead of a class going missing
                unseen.

        Raises:
            DataError: There are no images, or two of different shape.
        """
        if not images:
            raise DataError(f"none of the images of {len(class_names)} classes could be read")
        label_of = {name: label for label, name in enumerate(class_names)}
        first, *_ = images
        for name, image in images.items():
            if image.shape != images[first].shape:
                raise DataError(
                    f"all images must have the same shape; '{first}' is {_shape(images[first])}, '{name}' is "
                    f"{_shape(image)} (channels×height×width). Set data.image_size to resize them."
                )
        labels = torch.tensor([label_of[class_of(name)] for name in images], dtype=torch.int64)
        return cls(torch.stack(list(images.values())), labels, tuple(class_names), tuple(images))

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: npt.NDArray[np.int64] | torch.Tensor, device: torch.device | str) -> Batch:
        """The images at ``indices``.

        Args:
            indices: [B] positions in this set; repeats are allowed.
            device: Where images and labels go. They travel as uint8, a quarter of the float32 bytes.

        Returns:
            Images [B, C, H, W] float32 in [0, 1] and labels on ``device``, indices on the CPU.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        images = self.images[chosen].to(device).float() / 255
        return Batch(images=images, labels=self.labels[chosen].to(device), indices=chosen)


@dataclass(frozen=True, eq=False)
class ZeroShotData:
    """What is trained on and what is tested on; no class is in both. :func:`check` is run on it.

    Attributes:
        train: The training set.
        test: The test set.
        skipped: Names of images left out because they could not be decoded (``data.on_bad_image: skip``).
        inverted: Whether black and white are exchanged against the image files; who embeds a file must do the same.

    Raises:
        DataError: As :func:`check`.
    """

    train: LabelledImages
    test: LabelledImages
    skipped: tuple[str, ...] = ()
    inverted: bool = False

    def __post_init__(self) -> None:
        check(self.train, self.test, skipped=self.skipped)


def check(train: LabelledImages, test: LabelledImages, *, skipped: Sequence[str] = ()) -> None:
    """Check what retrieval on unseen classes needs.

    Raises:
        DataError: A class is in both sets, a set has fewer than two classes, a class has fewer than two
            images, or the two sets' images differ in shape.
    """
    common = sorted(set(train.class_names) & set(test.class_names))
    if common:
        raise DataError(
            f"training and test classes must differ; {_counted(len(common), 'class')} in both, e.g. "
            f"'{common[0]}'. Remove them from one of the sets."
        )
    for role, images in (("training", train), ("test", test)):
        if images.num_classes < 2:
            raise DataError(
                f"the {role} set needs at least two classes; it has {images.num_classes}. Add images of another class."
            )
        for name, count in zip(images.class_names, _class_counts(images), strict=True):
            if count < 2:
                left_out = f" ({_counted(len(skipped), 'undecodable image')} left out of the sets)" if skipped else ""
                raise DataError(
                    f"class '{name}' has {'one image' if count else 'no image'}{left_out}; a class needs at "
                    f"least two to be retrieved. Remove it or add images."
                )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"training and test images must have the same shape; got {_shape(train.images[0])} and "
            f"{_shape(test.images[0])} (channels×height×width). Set data.image_size to resize them."
        )


def _class_counts(images: LabelledImages) -> list[int]:
    return [int(count) for count in torch.bincount(images.labels, minlength=images.num_classes)]


def _counted(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"


def _shape(image: torch.Tensor) -> str:
    return "×".join(str(side) for side in image.shape)
