"""What a dataset says of itself before any image is decoded: which images there are, and how to read one."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eat_dist.errors import DataError

Role = Literal["train", "test", "query", "gallery"]
"""``train``, or of the test set: ``test`` is query and gallery in one, each image against all others."""

ROLES: tuple[Role, ...] = ("train", "test", "query", "gallery")


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        name: Its path below the dataset's root, with ``/``; different for every image.
        class_name: What it shows; a class is of the training set or of the test set, never of both.
        role: What it is used for.
    """

    name: str
    class_name: str
    role: Role


@dataclass(frozen=True)
class Source:
    """A dataset in its original layout, listed and checked but not decoded.

    Attributes:
        dataset: Name in DATASETS.
        items: All images. The order is the dataset's own and the same at every listing.
        read: The bytes of the image file of that name; called from several threads at once. Raises DataError
            where they are damaged, StorageError where they cannot be had.
        stamp: Differs whenever the listing or a file differs (by size and time, not by content).
        channels: 1 for grey, 3 for RGB.
        image_size: Side of the square that a model sees by default, pixels.
        resize: Shorter side before the centre crop by default, pixels.
        inverted: Whether black and white are to be exchanged (ink 1, paper 0).
        small: Decoded anew at every start rather than prepared into shards.
        chosen_by: Keys of the config's section ``data`` that decided which classes are trained on, with their values.
    """

    dataset: str
    items: tuple[Item, ...]
    read: Callable[[str], bytes]
    stamp: str
    channels: Literal[1, 3]
    image_size: int
    resize: int
    inverted: bool = False
    small: bool = False
    chosen_by: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = {item.role for item in self.items}
        assert roles in ({"train", "test"}, {"train", "query", "gallery"}), roles
        check_disjoint(self.items)
        assert len({item.name for item in self.items}) == len(self.items), "image names must differ"

    def class_names(self, *, train: bool) -> tuple[str, ...]:
        """The training or the test classes, sorted: a label is a position in this list."""
        return tuple(sorted({item.class_name for item in self.items if (item.role == "train") == train}))


def check_disjoint(items: Iterable[Item]) -> None:
    """Check the zero-shot split. Names that read the same are one: systems write é in one character or in two.

    Raises:
        DataError: A class has both training and test images.
    """
    roles: dict[str, set[bool]] = {}
    for item in items:
        roles.setdefault(unicodedata.normalize("NFC", item.class_name), set()).add(item.role == "train")
    common = sorted(name for name, of_train in roles.items() if len(of_train) > 1)
    if common:
        raise DataError(
            f"training and test classes must differ; {len(common)} {'is' if len(common) == 1 else 'are'} in both, e.g. "
            f"'{common[0]}'. Remove them from one of the sets."
        )


def check_counts(dataset: str, *, found: Mapping[str, int], expected: Mapping[str, int], subset: bool) -> None:
    """Compare what was found with the published dataset, count by count.

    Args:
        dataset: For the message.
        found: What is counted, in words (``training images``) → how many there are.
        expected: The same for the whole dataset.
        subset: ``data.subset``: a difference is a warning.

    Raises:
        DataError: Counts differ and ``subset`` is false. All differences in one line.
    """
    assert found.keys() == expected.keys()
    wrong = [f"{found[what]:,} {what} instead of {count:,}" for what, count in expected.items() if found[what] != count]
    if not wrong:
        return
    message = f"the dataset '{dataset}' has {', '.join(wrong)}"
    if not subset:
        raise DataError(f"{message}. Complete it, or set data.subset to true if a part of it is meant.")
    warnings.warn(f"{message}; taken as a subset (data.subset)", stacklevel=3)


def check_listed(names: Sequence[str], present: Iterable[str], *, listed_in: str, where: str) -> None:
    """Check that every listed image file is there.

    Raises:
        DataError: Some are not; how many, and the first few by name.
    """
    there = set(present)
    missing = [name for name in names if name not in there]
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:3])
        raise DataError(
            f"{len(missing)} of the {len(names)} images that {listed_in} lists are not in '{where}': {shown}"
            + (", …" if len(missing) > 3 else "")
            + ". Unpack the dataset again, or take them out of the list."
        )
