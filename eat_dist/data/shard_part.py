"""One part of a folder of shards: its images decoded, scaled and written, and the part read back."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torchvision.transforms.v2 import functional

from eat_dist.data.decode import decode_image
from eat_dist.data.shard_format import COLUMNS, Part, Skipped, file_sha256, open_part
from eat_dist.data.source import Item, Source
from eat_dist.errors import DataError
from eat_dist.storage import Folder

# A row group is what a reader reads at once (docs/shards.md, read amplification).
ROW_GROUP_IMAGES = 16
ROW_GROUP_BYTES = 4 * 2**20
JPEG_QUALITY = 95

_JPEG_START = b"\xff\xd8\xff"
# The pages' checksums cover the small columns, as each image's SHA-256 covers the image.
_PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}

Row = dict[str, Any]
"""A value for each column."""


@dataclass(frozen=True)
class PlannedPart:
    """Which images, with their labels, go into a part; ``made_from`` is a SHA-256 of all that decides its content."""

    name: str
    images: tuple[tuple[Item, int], ...]
    made_from: str


@dataclass(frozen=True)
class WholePart:
    """A part that was read back and is whole."""

    part: Part
    images: Counter[str]
    decoded_bytes: Counter[str]
    skipped: tuple[Skipped, ...]


def load_row(source: Source, image_size: int | None, image: tuple[Item, int]) -> Row | Skipped:
    """Read, decode and measure one image: its row."""
    item, label = image
    try:
        content = source.read(item.name)
        picture = decode_image(content, name=item.name, channels=source.channels)
    except DataError as error:
        return Skipped(item.name, str(error))
    if image_size is not None and min(picture.size) > image_size:
        content, picture = _scale_down(content, picture, image_size)
    return {
        "image": content,
        "label": label,
        "class_name": item.class_name,
        "name": item.name,
        "role": item.role,
        "sha256": hashlib.sha256(content).digest(),
        "height": picture.height,
        "width": picture.width,
    }


def _scale_down(content: bytes, picture: Image.Image, image_size: int) -> tuple[bytes, Image.Image]:
    """Bilinear and antialiased. What was JPEG stays JPEG, without subsampling of colours; all else becomes PNG."""
    picture = functional.resize(picture, [image_size])
    picture.info.clear()  # of the original: a colour profile or a comment that would be written again
    stream = io.BytesIO()
    if content.startswith(_JPEG_START):
        picture.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    else:
        picture.save(stream, "PNG")
    return stream.getvalue(), picture


def write_part(out: Folder, part: PlannedPart, images: Iterable[Row | Skipped]) -> None:
    """Write a part, a row group at a time; where that fails nothing is left of it.

    Raises:
        StorageError: No permission, no space left.
    """
    skipped: list[Skipped] = []
    rows: list[Row] = []
    with (
        out.writing(part.name) as stream,
        pq.ParquetWriter(stream, COLUMNS, **_PARQUET_OPTIONS) as writer,
    ):
        for image in images:
            if isinstance(image, Skipped):
                skipped.append(image)
                continue
            rows.append(image)
            if len(rows) == ROW_GROUP_IMAGES or sum(len(row["image"]) for row in rows) >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, COLUMNS))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, COLUMNS))
        notes = {"made_from": part.made_from, "skipped": json.dumps([asdict(image) for image in skipped])}
        writer.add_key_value_metadata(notes)


def read_back(out: Folder, channels: int, part: PlannedPart) -> WholePart | None:
    """Read a part back; None where it is damaged or made from something else."""
    images: Counter[str] = Counter()
    decoded_bytes: Counter[str] = Counter()
    try:
        with open_part(out, part.name, checked=True) as file:
            notes = file.metadata.metadata or {}
            if notes.get(b"made_from") != part.made_from.encode():
                return None
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, use_threads=False).to_pylist():
                    if hashlib.sha256(row["image"]).digest() != row["sha256"]:
                        return None
                    images[row["role"]] += 1
                    of_set = "train" if row["role"] == "train" else "test"
                    decoded_bytes[of_set] += row["height"] * row["width"] * channels
            skipped = tuple(Skipped(**image) for image in json.loads(notes[b"skipped"]))
        rows, size = images.total(), out.stamp(part.name).size
        return WholePart(Part(part.name, rows, size, file_sha256(out, part.name)), images, decoded_bytes, skipped)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # what damaged bytes may look like
        return None
