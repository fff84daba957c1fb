"""What is in a dataset or a folder of shards, and whether all of it can be read and decoded."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from eat_dist.cpus import usable_cpus
from eat_dist.data.contact_sheet import SheetRow, thumbnail
from eat_dist.data.decode import decode_image
from eat_dist.data.parallel import T, in_order, workers
from eat_dist.data.prepare import OnProgress
from eat_dist.data.shard_format import Part, Skipped, file_sha256, open_part, read_manifest, reading
from eat_dist.data.source import ROLES, Item, Source
from eat_dist.errors import DataError
from eat_dist.seeding import derive_seed
from eat_dist.storage import Folder

_CLASSES_SHOWN = 6  # of the training set, and as many of the test set
_IMAGES_SHOWN = 8  # of each
_SHOWN = 3
_IMAGES_AT_ONCE = 32

ClassKey = tuple[bool, str]
"""Whether it is a training class, and its name."""


@dataclass(frozen=True)
class Seen:
    """An image that could be decoded.

    Attributes:
        item: Which it is.
        sha256: Of its file.
        size: (height, width) in pixels, as decoded.
        kind: Its file format and Pillow's name of its pixels, ``JPEG RGB``.
    """

    item: Item
    sha256: bytes
    size: tuple[int, int]
    kind: str


@dataclass
class Inspection:
    """What was found.

    Attributes:
        classes: All of them, also those of which no image could be decoded.
        skipped: Images that were left out when the shards were prepared.
        seen: Images that could be decoded.
        faults: A line for whatever is missing, damaged or cannot be decoded.
        thumbnails: Of the classes on the contact sheet: rank → image, the lowest ranks of each.
    """

    classes: tuple[ClassKey, ...]
    skipped: tuple[Skipped, ...] = ()
    seen: list[Seen] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    thumbnails: dict[ClassKey, dict[int, Image.Image]] = field(default_factory=dict)

    def report(self) -> list[str]:
        """Lines for the user."""
        roles = Counter(seen.item.role for seen in self.seen)
        kinds = Counter(seen.kind for seen in self.seen)
        sizes = Counter(seen.size for seen in self.seen)
        train, test = ([count for key, count in self._counts().items() if key[0] == train] for train in (True, False))
        lines = [
            f"images      {_listed({role: roles[role] for role in ROLES if roles[role]})}",
            f"classes     {len(train):,} training, of {_spread(train)} images",
            f"            {len(test):,} test, of {_spread(test)} images",
            f"height      {_spread([seen.size[0] for seen in self.seen])} pixels",
            f"width       {_spread([seen.size[1] for seen in self.seen])} pixels",
            f"sizes       {len(sizes):,} different, of height×width most often "
            + (", ".join(f"{h}×{w} ({count:,})" for (h, w), count in sizes.most_common(_SHOWN)) or "none"),
            f"kinds       {_listed(dict(kinds.most_common()))}",
        ]
        lines += [f"duplicates  {where}: {_some(groups)}" for where, groups in self._duplicates().items()]
        lines.append(f"skipped     {_some([f'{image.name} ({image.reason})' for image in self.skipped])}")
        lines.append(f"damaged     {_some(self.faults)}")
        return lines

    def sheet(self) -> list[SheetRow]:
        """The rows of the contact sheet, training classes first."""
        counts = self._counts()
        return [
            SheetRow(
                name=name,
                about=f"{'training' if train else 'test'}, {counts[train, name]} images",
                images=tuple(image for _, image in sorted(self.thumbnails[train, name].items())),
            )
            for train, name in sorted(self.thumbnails, key=lambda key: (not key[0], key[1]))
        ]

    def _counts(self) -> dict[ClassKey, int]:
        counts = Counter(_class_of(seen.item) for seen in self.seen)
        return {key: counts[key] for key in self.classes}

    def _duplicates(self) -> dict[str, list[str]]:
        """Where → groups of names of one and the same file."""
        items_of: dict[bytes, list[Item]] = defaultdict(list)
        for seen in self.seen:
            items_of[seen.sha256].append(seen.item)
        found: dict[str, list[str]] = {"in both sets": [], "within training": [], "within test": []}
        for items in items_of.values():
            sets = {"within training" if item.role == "train" else "within test" for item in items}
            if len(items) > 1:
                found["in both sets" if len(sets) > 1 else sets.pop()].append(" = ".join(item.name for item in items))
        return found


def inspect_source(source: Source, *, threads: int | None = None, on_progress: OnProgress | None = None) -> Inspection:
    """Read and decode every image of a dataset in its original layout."""
    items = source.items
    chunks = [items[start : start + _IMAGES_AT_ONCE] for start in range(0, len(items), _IMAGES_AT_ONCE)]
    inspection = Inspection(_classes(source.class_names(train=True), source.class_names(train=False)))
    look = _Look(source.channels, source.inverted, inspection.classes)

    def examine(chunk: Sequence[Item]) -> _Found:
        found = _Found(len(chunk))
        for item in chunk:
            try:
                look(item, source.read(item.name), found)
            except DataError as error:
                found.faults.append(str(error))
        return found

    return _collect(inspection, examine, chunks, total=len(items), threads=threads, on_progress=on_progress)


def inspect_shards(folder: Folder, *, threads: int | None = None, on_progress: OnProgress | None = None) -> Inspection:
    """Verify the SHA-256 of every part and of every image of a folder of shards, and decode every image.

    Raises:
        DataError: It has no manifest, or a damaged one. Other damage is listed.
    """
    manifest = read_manifest(folder)
    inspection = Inspection(_classes(manifest.train_classes, manifest.test_classes), manifest.skipped)
    look = _Look(manifest.channels, manifest.inverted, inspection.classes)

    def examine(part: Part) -> _Found:
        found = _Found(part.rows)
        try:
            with reading(folder, part.name):
                if file_sha256(folder, part.name) != part.sha256:
                    found.faults.append(f"the SHA-256 of '{folder.child(part.name)}' differs from the manifest's")
                with open_part(folder, part.name) as file:
                    for group in range(file.num_row_groups):
                        for row in file.read_row_group(group, use_threads=False).to_pylist():
                            _examine_row(row, folder, part, look, found)
        except DataError as error:
            found.faults.append(str(error))
        return found

    total = sum(manifest.images.values())
    return _collect(inspection, examine, manifest.parts, total=total, threads=threads, on_progress=on_progress)


@dataclass
class _Found:
    """What one call of a thread found."""

    images: int
    seen: list[Seen] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    thumbnails: list[tuple[Item, Image.Image]] = field(default_factory=list)


class _Look:
    """Decodes an image and notes what it is, with a thumbnail if its class is on the contact sheet."""

    def __init__(self, channels: Literal[1, 3], inverted: bool, classes: Iterable[ClassKey]) -> None:
        self.channels, self.inverted = channels, inverted
        # A draw that is seeded by the names: the same dataset always shows the same.
        ranked = sorted(classes, key=lambda key: derive_seed("contact sheet", *key))
        sets = ([key for key in ranked if key[0] == train] for train in (True, False))
        self.shown = {key for of_set in sets for key in of_set[:_CLASSES_SHOWN]}

    def __call__(self, item: Item, content: bytes, found: _Found) -> Seen:
        """Add an image to ``found``.

        Raises:
            DataError: It cannot be decoded.
        """
        image = decode_image(content, name=item.name, channels=self.channels)
        with Image.open(io.BytesIO(content)) as encoded:
            kind = f"{encoded.format} {encoded.mode}"
        seen = Seen(item, hashlib.sha256(content).digest(), (image.height, image.width), kind)
        found.seen.append(seen)
        if _class_of(item) in self.shown:
            found.thumbnails.append((item, thumbnail(ImageOps.invert(image) if self.inverted else image)))
        return seen


def _examine_row(row: dict[str, Any], folder: Folder, part: Part, look: _Look, found: _Found) -> None:
    where = f"image '{row['name']}' in '{folder.child(part.name)}'"
    try:
        seen = look(Item(row["name"], row["class_name"], row["role"]), row["image"], found)
    except DataError as error:
        found.faults.append(f"{error} (in '{folder.child(part.name)}')")
        return
    if seen.sha256 != row["sha256"]:
        found.faults.append(f"the SHA-256 of {where} differs")
    if seen.size != (row["height"], row["width"]):
        found.faults.append(f"{where} is {seen.size[0]}×{seen.size[1]} instead of {row['height']}×{row['width']}")


def _collect(
    inspection: Inspection,
    examine: Callable[[T], _Found],
    tasks: Iterable[T],
    *,
    total: int,
    threads: int | None,
    on_progress: OnProgress | None,
) -> Inspection:
    threads = threads or usable_cpus()
    done = 0
    with workers(threads) as pool:
        for found in in_order(pool, examine, tasks, ahead=2 * threads):
            inspection.seen += found.seen
            inspection.faults += found.faults
            for item, image in found.thumbnails:
                kept = inspection.thumbnails.setdefault(_class_of(item), {})
                kept[derive_seed("contact sheet", item.name)] = image
                if len(kept) > _IMAGES_SHOWN:
                    del kept[max(kept)]
            done += found.images
            if on_progress is not None:
                on_progress(done, total)
    return inspection


def _classes(train: Iterable[str], test: Iterable[str]) -> tuple[ClassKey, ...]:
    return (*((True, name) for name in train), *((False, name) for name in test))


def _class_of(item: Item) -> ClassKey:
    return item.role == "train", item.class_name


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "no"
    if min(values) == max(values):
        return f"{values[0]:,}"
    return f"{min(values):,} to {max(values):,} (median {np.median(values):,.0f})"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return f"{len(names):,}: " + "; ".join(names[:_SHOWN]) + ("; …" if len(names) > _SHOWN else "")
