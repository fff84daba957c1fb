"""What the datasets share: finding the files, reading the lists, and making a checked Source of both."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eat_dist.config import DataConfig
from eat_dist.data.source import Item, Source, check_counts
from eat_dist.errors import DataError, StorageError
from eat_dist.storage import FileStamp, Folder


@dataclass(frozen=True)
class Files:
    """The files of a dataset, from one or several folders or archives.

    Attributes:
        stamps: Path below the dataset's root → size and time.
        read: Path → bytes. Raises DataError where they are damaged.
    """

    stamps: Mapping[str, FileStamp]
    read: Callable[[str], bytes]

    @classmethod
    def of_folder(cls, folder: Folder, *, is_wanted: Callable[[str], bool] = lambda path: False) -> Files:
        """All files at any depth in ``folder``, also behind links.

        A file that cannot be read (no permission, no network) raises StorageError: it is not a bad image to be skipped.

        Args:
            folder: Where they are.
            is_wanted: Of a path below it: whether it must be a file, and is not to be passed over if it is none.

        Raises:
            DataError: A link leads to a folder that it lies in; or a wanted path is no file, as a link to nowhere.
        """
        if folder.is_local and folder.exists():
            _check_links(folder.path, "", is_wanted, frozenset())
        return cls(folder.files(), folder.read)

    def under(self, prefix: str) -> Files:
        """The same files with ``prefix/`` before their paths."""
        start = f"{prefix}/"
        return Files(
            {start + name: stamp for name, stamp in self.stamps.items()},
            lambda name: self.read(name.removeprefix(start)),
        )

    def __or__(self, other: Files) -> Files:
        return Files(
            {**self.stamps, **other.stamps},
            lambda name: (other if name in other.stamps else self).read(name),
        )


def _check_links(path: str, below: str, is_wanted: Callable[[str], bool], above: frozenset[tuple[int, int]]) -> None:
    """Walk what pyarrow is about to list: it follows a circle of links forty times, and leaves out what leads nowhere.

    Args:
        path: A folder.
        below: The same below the dataset's root, empty or with a ``/`` at its end.
        is_wanted: As of :meth:`Files.of_folder`.
        above: Device and number of the folders on the way to it, which a path alone does not tell behind links.
    """
    try:
        state = os.stat(path)
        entries = list(os.scandir(path))
    except OSError:  # the listing says what is wrong
        return
    here = (state.st_dev, state.st_ino)
    if here in above:
        raise DataError(f"{path!r} is a link to a folder that it lies in: its files are there already. Remove it.")
    for entry in entries:
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            _check_links(entry.path, f"{below}{entry.name}/", is_wanted, above | {here})
        elif is_wanted(below + entry.name) and not os.path.isfile(entry.path):
            what = "a link that leads nowhere" if entry.is_symlink() else "no file"
            raise DataError(f"{entry.path!r} is {what}. Mend or remove it.")


def data_root(config: DataConfig, *, holds: str) -> Folder:
    """``data.root``.

    Args:
        config: The data section.
        holds: What it must be, in words, for the message.

    Raises:
        DataError: It is not set.
    """
    if config.root is None:
        raise DataError(f"the dataset '{config.dataset}' needs data.root: {holds}")
    return Folder.at(config.root)


def find(root: Folder, name: str, *, within: Sequence[str]) -> Folder | None:
    """``root`` or the first of its folders ``within`` that holds the file or folder ``name``."""
    candidates = [root, *(root.child(folder) for folder in within)]
    return next((folder for folder in candidates if folder.exists(name)), None)


def need(root: Folder, name: str, *, within: Sequence[str], get: str) -> Folder:
    """:func:`find` what the dataset cannot do without.

    Args:
        root: ``data.root``.
        name: What is looked for.
        within: Names of folders in it where it may be.
        get: A sentence that says where to get it, for the message.

    Raises:
        DataError: It is in none of them.
    """
    folder = find(root, name, within=within)
    if folder is None:
        places = " or ".join(f"'{place}'" for place in (root, *map(root.child, within)))
        raise DataError(f"there is no {name} in {places}. {get}")
    return folder


def rows(folder: Folder, name: str, pattern: str, *, form: str, header: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Read a text file with one entry a line.

    Args:
        folder: Where it is.
        name: Its name.
        pattern: Of a line without the space around it; its groups are the columns.
        form: What a line is, in words, for the message.
        header: Patterns of the lines before the first entry.

    Returns:
        The columns of every entry. Empty lines are passed over.

    Raises:
        DataError: The file is missing or is not text; a line has another form (its number is named).
    """
    try:
        lines = folder.read(name).decode("utf-8-sig").splitlines()
    except StorageError as error:
        raise DataError(f"{error}. Unpack the dataset again.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{folder.child(name)}' is not a text file in UTF-8 ({error}). Unpack the dataset again."
        ) from error
    columns = []
    for number, line in enumerate(lines, start=1):
        in_header = number <= len(header)
        match = re.fullmatch(header[number - 1] if in_header else pattern, line.strip())
        if match and not in_header:
            columns.append(match.groups())
        elif line.strip() and not match:
            expected = "the header" if in_header else f"'{form}'"
            raise DataError(f"line {number} of '{folder.child(name)}' is {_short(line)}; expected {expected}")
    return columns


def first_half(class_ids: Iterable[int]) -> set[int]:
    """The lower half of the classes that are there, rounded down: 1-100 of CUB's 1-200."""
    present = sorted(set(class_ids))
    return set(present[: len(present) // 2])


def make_source(
    config: DataConfig,
    items: Sequence[Item],
    files: Files,
    *,
    expected: Mapping[str, int] | None = None,
    channels: Literal[1, 3] = 3,
    image_size: int = 224,
    resize: int = 256,
    inverted: bool = False,
    small: bool = False,
) -> Source:
    """Check the items against each other and the published counts; the defaults are those of photographs.

    Args:
        config: The data section.
        items: All images, each among ``files``.
        files: Where they are read from.
        expected: ``<role> images`` and ``training classes``, ``test classes`` of the whole dataset.
        channels: See :class:`Source`, as of the rest.
        image_size: Pixels.
        resize: Pixels.
        inverted: Ink 1, paper 0.
        small: Not prepared.

    Raises:
        DataError: An image is listed twice, counts differ (``data.subset`` false), fewer than two classes to train on
            or to test on, queries without a gallery, or a class in both sets.
    """
    twice = [name for name, count in Counter(item.name for item in items).items() if count > 1]
    if twice:
        raise DataError(
            f"the dataset '{config.dataset}' lists '{twice[0]}' more than once. Each image must be listed once."
        )
    if expected is not None:
        found = _counts(items)
        check_counts(
            config.dataset,
            found={what: found[what] for what in expected},
            expected=expected,
            subset=config.subset,
        )
    _check_sets(config.dataset, items)
    digest = hashlib.sha256()
    for item in items:
        entry = [item.name, item.class_name, item.role, *files.stamps[item.name]]
        digest.update(f"{json.dumps(entry)}\n".encode())
    return Source(
        dataset=config.dataset,
        items=tuple(items),
        read=files.read,
        stamp=digest.hexdigest(),
        channels=channels,
        image_size=image_size,
        resize=resize,
        inverted=inverted,
        small=small,
    )


def _counts(items: Iterable[Item]) -> Counter[str]:
    of_role = {"train": "training", "test": "test", "query": "query", "gallery": "gallery"}
    counts = Counter(f"{of_role[item.role]} images" for item in items)
    classes = {(item.role == "train", item.class_name) for item in items}
    return counts + Counter("training classes" if train else "test classes" for train, _ in classes)


def _check_sets(dataset: str, items: Iterable[Item]) -> None:
    classes: dict[str, set[str]] = {"training": set(), "test": set()}
    roles = set()
    for item in items:
        roles.add(item.role)
        classes["training" if item.role == "train" else "test"].add(item.class_name)
    for name, of_set in classes.items():
        if len(of_set) < 2:
            raise DataError(
                f"the {name} set of '{dataset}' needs at least two classes; it has {len(of_set)}. Add images of others."
            )
    if len(roles & {"query", "gallery"}) == 1:
        raise DataError(f"the test set of '{dataset}' needs queries and a gallery; one of them has no image")


def _short(line: str) -> str:
    text = line.strip()
    return f"'{text[:80]}…'" if len(text) > 80 else f"'{text}'"
