"""What a folder of shards looks like: Parquet parts that hold encoded images, and a manifest that says they are whole.

docs/shards.md describes it. :mod:`eat_dist.data.prepare` writes it and :mod:`eat_dist.data.shards` reads it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from eat_dist.errors import DataError
from eat_dist.storage import Folder

SCHEMA = 1
MANIFEST = "manifest.json"
_COLUMNS = {
    "image": pa.binary(),
    "label": pa.int32(),
    "class_name": pa.string(),
    "name": pa.string(),
    "role": pa.string(),
    "sha256": pa.binary(32),
    "height": pa.int32(),
    "width": pa.int32(),
}
COLUMNS = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])


@dataclass(frozen=True)
class Part:
    """A Parquet file of the folder: its name, images, bytes and SHA-256 (hexadecimal)."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why it could not be decoded."""

    name: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. It is written last: where it is, the folder is whole.

    Attributes:
        schema: Version of the format.
        eat_dist: Version of the package that wrote it.
        dataset: Name in DATASETS.
        channels: 1 for grey, 3 for RGB.
        inverted: Whether black and white are exchanged when an image is read.
        image_size: Side of the square that a model sees by default, pixels.
        resize: Shorter side before the centre crop by default, pixels.
        stored_shorter_side: What larger images were scaled down to, pixels; None: the original bytes.
        train_classes: Sorted; a training label is a position in this list.
        test_classes: The same of the test set.
        images: Role → how many.
        decoded_bytes: ``train`` and ``test`` → Σ height · width · channels.
        stamp: Of the source it was made from.
        made_from: SHA-256 of source, options and format: shards that are to be the same have the same.
        parts: In the order of the images.
        skipped: Images left out.
        chosen_by: Keys of the config's section ``data`` that decided which classes are trained on, with their values.
    """

    schema: int
    eat_dist: str
    dataset: str
    channels: Literal[1, 3]
    inverted: bool
    image_size: int
    resize: int
    stored_shorter_side: int | None
    train_classes: tuple[str, ...]
    test_classes: tuple[str, ...]
    images: dict[str, int]
    decoded_bytes: dict[str, int]
    stamp: str
    made_from: str
    parts: tuple[Part, ...]
    skipped: tuple[Skipped, ...]
    chosen_by: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Folder) -> None:
        """Write it, with a SHA-256 of itself."""
        content = asdict(self)
        folder.write_json(MANIFEST, content | {"sha256": _checksum(content)})


def read_manifest(folder: Folder) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        DataError: There is no such folder, preparing it was not finished, or the manifest is damaged or of another
            version.
        StorageError: It cannot be read.
    """
    if not folder.exists():
        raise DataError(
            f"there is no folder '{folder}' on {platform.node()}. Shards are made by eat-dist data prepare and must be "
            "on storage that every node sees."
        )
    if not folder.exists(MANIFEST):
        raise DataError(
            f"'{folder}' has no {MANIFEST}, so it is no folder of finished shards. Run eat-dist data prepare; where "
            "it was stopped it goes on."
        )
    text = folder.read(MANIFEST)
    try:
        content = json.loads(text)
        schema, checksum = content["schema"], content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"'{folder.child(MANIFEST)}' is damaged: it is no manifest in JSON. {how_to_mend(folder)}"
        ) from error
    if schema != SCHEMA:
        raise DataError(f"'{folder}' has shards of schema {schema}; this version reads {SCHEMA}. {how_to_mend(folder)}")
    if checksum != _checksum(content):
        raise DataError(
            f"'{folder.child(MANIFEST)}' is damaged: its SHA-256 differs from the one in it. {how_to_mend(folder)}"
        )
    lists = {
        "train_classes": tuple(content["train_classes"]),
        "test_classes": tuple(content["test_classes"]),
        "parts": tuple(Part(**part) for part in content["parts"]),
        "skipped": tuple(Skipped(**skipped) for skipped in content["skipped"]),
    }
    return Manifest(**content | lists)


def find_faults(folder: Folder, manifest: Manifest) -> list[str]:
    """The parts that are missing or have another size than the manifest says, a line each; reads no file."""
    there = folder.files()
    faults = []
    for part in manifest.parts:
        if part.name not in there:
            faults.append(f"'{folder.child(part.name)}' is missing")
        elif there[part.name].size != part.bytes:
            faults.append(f"'{folder.child(part.name)}' has {there[part.name].size:,} bytes instead of {part.bytes:,}")
    return faults


def open_part(folder: Folder, name: str, *, footer: Any = None, checked: bool = False) -> pq.ParquetFile:
    """Open a part; on a local disk it is memory-mapped.

    Args:
        folder: Where it is.
        name: Its name.
        footer: Its ``ParquetFile.metadata`` where that is known already: saves requests to a bucket.
        checked: Verify the checksum of every page that is read.
    """
    filesystem = fs.LocalFileSystem(use_mmap=True) if folder.is_local else folder.filesystem
    return pq.ParquetFile(
        folder.file(name),
        filesystem=filesystem,
        metadata=footer,
        page_checksum_verification=checked,
        pre_buffer=not folder.is_local,
    )


@contextmanager
def reading(folder: Folder, name: str) -> Iterator[None]:
    """Turn what pyarrow raises on a part that is gone, damaged or out of reach into one line.

    Raises:
        DataError: Which part it is, why, and what to do.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"cannot read '{folder.child(name)}': {reason}. {how_to_mend(folder)}") from error


def file_sha256(folder: Folder, name: str) -> str:
    """SHA-256 of a file, read piece by piece.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with folder.filesystem.open_input_stream(folder.file(name)) as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def how_to_mend(folder: Folder) -> str:
    """A sentence for the user; whole parts are kept then."""
    return f"Mend it with eat-dist data prepare --overwrite --out '{folder}' and the options it was made with."


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
