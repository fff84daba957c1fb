"""Image sets in prepared shards: an image is read and decoded whenever it is asked for."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from eat_dist.batch import Batch
from eat_dist.config import DataConfig
from eat_dist.cpus import usable_cpus
from eat_dist.data.decode import decode_image, to_tensor
from eat_dist.data.images import Indices, ZeroShotData, renumbered_subset
from eat_dist.data.shard_format import (
    COLUMNS,
    Manifest,
    Part,
    find_faults,
    how_to_mend,
    open_part,
    read_manifest,
    reading,
)
from eat_dist.data.transforms import InferenceForm
from eat_dist.errors import DataError
from eat_dist.storage import Folder

# Of each thread: about 60 images of 100 kB, and too few files for any limit on open ones.
_ROW_GROUPS, _OPEN_PARTS = 4, 16
_DECODERS = min(4, usable_cpus())
_OPENERS = 16  # opening a part in a bucket is mostly waiting


def open_shards(folder: Folder, config: DataConfig) -> ZeroShotData:
    """Open prepared shards: the manifest and all columns but the images are read and checked.

    Args:
        folder: What :func:`eat_dist.data.prepare.prepare` made.
        config: ``dataset``, and what chose the classes, must be those prepared; ``image_size`` and ``resize`` override
            its defaults.

    Raises:
        DataError: The folder is not there, not finished, damaged, of another version or of another dataset, or its
            images were stored smaller than ``resize``; or as :class:`ZeroShotData`.
        ConfigError: ``data.resize`` is smaller than the image size.
        StorageError: It cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest.dataset != config.dataset:
        raise DataError(
            f"'{folder}' has shards of the dataset '{manifest.dataset}', but data.dataset is '{config.dataset}'. Set "
            "data.dataset or data.shards to the other."
        )
    if differ := [key for key, value in manifest.chosen_by.items() if getattr(config, key) != value]:
        there = ", ".join(f"data.{key}={manifest.chosen_by[key]:g}" for key in differ)
        raise DataError(f"'{folder}' was prepared with {there}, which chose its classes. Set it so, or prepare others.")
    form = inference_form(config, image_size=manifest.image_size, resize=manifest.resize)
    side = manifest.stored_shorter_side
    if side is not None and side < form.resize:
        raise DataError(
            f"'{folder}' has images scaled down to a shorter side of {side}, but data.resize is {form.resize}. Prepare "
            f"them with --image-size {form.resize} or more, or set data.resize and data.image_size to {side} or less."
        )
    if faults := find_faults(folder, manifest):
        raise DataError(f"{faults[0]}. {how_to_mend(folder)}")
    with ThreadPoolExecutor(_OPENERS) as pool:
        rows = pa.concat_tables(pool.map(partial(_small_columns, folder), range(len(manifest.parts)), manifest.parts))
    train, test = pc.equal(rows["role"], "train"), pc.not_equal(rows["role"], "train")
    return ZeroShotData(
        train=ShardImages(folder, manifest, rows.filter(train), class_names=manifest.train_classes, form=form),
        test=ShardImages(folder, manifest, rows.filter(test), class_names=manifest.test_classes, form=form),
        resize=form.resize,
        skipped=tuple(skipped.name for skipped in manifest.skipped),
        inverted=manifest.inverted,
    )


def inference_form(config: DataConfig, *, image_size: int, resize: int) -> InferenceForm:
    """What a model sees of an image, from the config and a dataset's defaults.

    Raises:
        ConfigError: ``data.resize`` is smaller than the image size.
    """
    size = config.image_size or image_size
    return InferenceForm(resize=config.resize or round(size * resize / image_size), size=size)


def in_inference_form(image: Image.Image, form: InferenceForm, *, inverted: bool) -> torch.Tensor:
    """An L or RGB image → [C, size, size] uint8."""
    pixels = form(image)
    return 255 - pixels if inverted else pixels


def query_mask(roles: Sequence[str]) -> torch.Tensor | None:
    """``is_query`` of images with these roles: [N] bool, or None where every image is a query."""
    if {"query", "gallery"}.isdisjoint(roles):
        return None
    return torch.tensor([role == "query" for role in roles])


class ShardImages:
    """An :class:`~eat_dist.data.images.ImageSet` in shards.

    The SHA-256 of every image is checked when it is read. Each process, and in it each thread, opens the parts for
    itself when it first reads, so a set may be pickled and a process that holds one may fork.

    Attributes:
        labels: [N] int64.
        class_names: The name of each label.
        names: Path of each image in the original dataset.
        is_query: [N] bool, or None where every image is a query.
        sizes: [N, 2] int64, height and width as stored.
        image_shape: (C, H, W) in a batch.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, rows: pa.Table, *, class_names: tuple[str, ...], form: InferenceForm
    ) -> None:
        def column(name: str) -> npt.NDArray[np.int64]:
            return np.array(rows[name].to_numpy(), dtype=np.int64)

        self.labels = torch.from_numpy(column("label"))
        self.class_names = class_names
        self.names: tuple[str, ...] = tuple(rows["name"].to_pylist())
        self.is_query = query_mask(rows["role"].to_pylist())
        self.sizes = torch.from_numpy(np.stack([column("height"), column("width")], axis=1))
        self.image_shape: tuple[int, int, int] = (manifest.channels, form.size, form.size)
        self._folder, self._parts = folder, tuple(part.name for part in manifest.parts)
        self._channels, self._inverted, self._form = manifest.channels, manifest.inverted, form
        self._part, self._group, self._row = column("part"), column("group"), column("row")
        self._sha256: list[bytes] = rows["sha256"].to_pylist()
        self._handles: _Handles | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, index: int) -> torch.Tensor:
        """One image as it is stored, [C, h, w] uint8.

        Raises:
            DataError: It is damaged; the message names image and part.
        """
        pixels = to_tensor(self._image(index))
        return 255 - pixels if self._inverted else pixels

    def batch(self, indices: Indices, device: torch.device | str) -> Batch:
        """The images at ``indices`` [B], decoded by a few threads; they travel as uint8.

        Raises:
            DataError: One is damaged; the message names image and part.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        different, places = torch.unique(chosen, return_inverse=True)  # sorted, so that a row group is read once
        images = self.decoded(different, self._open().pool)[places].to(device).float() / 255
        return Batch(images=images, labels=self.labels[chosen].to(device), indices=chosen)

    def decoded(self, indices: torch.Tensor, pool: Executor) -> torch.Tensor:
        """The images at ``indices`` [B], best in ascending order, as a model sees them: [B, C, H, W] uint8."""
        images = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        at = indices.numpy()
        change = (np.diff(self._part[at]) != 0) | (np.diff(self._group[at]) != 0)

        def fill(places: npt.NDArray[np.int64]) -> None:
            for place in places.tolist():
                image = self._image(int(at[place]))
                images[place] = in_inference_form(image, self._form, inverted=self._inverted)

        for _ in pool.map(fill, np.split(np.arange(len(at)), np.flatnonzero(change) + 1)):
            pass  # raises what a thread raised
        return images

    def digest(self) -> str:
        """SHA-256 of the images' own ones, labels, roles and the form they are seen in."""
        about = (self.image_shape, self._form.resize, self._inverted, self.class_names)
        found = hashlib.sha256(repr(about).encode())
        found.update(b"".join(self._sha256))
        for tensor in (self.labels, self.is_query):
            found.update(b"-" if tensor is None else tensor.numpy().tobytes())
        return found.hexdigest()

    def of_classes(self, labels: Sequence[int]) -> ShardImages:
        """See :class:`~eat_dist.data.images.ImageSet`; nothing is read."""
        kept, renumbered = renumbered_subset(self.labels, labels)
        at = kept.numpy()
        subset = copy.copy(self)
        subset.labels = renumbered
        subset.class_names = tuple(self.class_names[label] for label in labels)
        subset.names = tuple(self.names[index] for index in at)
        subset.is_query = None if self.is_query is None else self.is_query[kept]
        subset.sizes = self.sizes[kept]
        subset._part, subset._group, subset._row = self._part[at], self._group[at], self._row[at]
        subset._sha256 = [self._sha256[index] for index in at]
        subset._handles = None
        return subset

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": None}

    def _open(self) -> _Handles:
        if self._handles is None or self._handles.process != os.getpid():  # a fork has none of its parent's threads
            self._handles = _Handles(self._folder, self._parts)
        return self._handles

    def _image(self, index: int) -> Image.Image:
        name, part = self.names[index], self._parts[self._part[index]]
        with reading(self._folder, part):
            images = self._open().reader().row_group(int(self._part[index]), int(self._group[index]))
        content: bytes = images[int(self._row[index])].as_py()
        if hashlib.sha256(content).digest() != self._sha256[index]:
            raise DataError(
                f"image '{name}' in '{self._folder.child(part)}' is damaged: its SHA-256 differs. "
                + how_to_mend(self._folder)
            )
        return decode_image(content, name=name, channels=self._channels)


class _Handles:
    """What one process has open."""

    def __init__(self, folder: Folder, parts: tuple[str, ...]) -> None:
        self.process = os.getpid()
        self.pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._new_reader = partial(_Reader, folder, parts, {})
        self._of_thread = _OfThread()

    def reader(self) -> _Reader:
        """This thread's own: a ParquetFile is not for several threads."""
        if self._of_thread.reader is None:
            self._of_thread.reader = self._new_reader()
        return self._of_thread.reader


class _OfThread(threading.local):
    reader: _Reader | None = None


class _Reader:
    """What one thread has open: the last parts, and the images of the last row groups."""

    def __init__(self, folder: Folder, parts: tuple[str, ...], footers: dict[int, Any]) -> None:
        def opened(part: int) -> pq.ParquetFile:
            file = open_part(folder, parts[part], footer=footers.get(part))
            footers[part] = file.metadata
            return file

        def read(part: int, group: int) -> pa.ChunkedArray:
            return file(part).read_row_group(group, columns=["image"], use_threads=False).column(0)

        file = lru_cache(_OPEN_PARTS)(opened)
        self.row_group = lru_cache(_ROW_GROUPS)(read)


def _small_columns(folder: Folder, number: int, part: Part) -> pa.Table:
    """All columns of a part but the images, and ``part``, ``group`` and ``row``: where each image is."""
    with reading(folder, part.name), open_part(folder, part.name, checked=True) as file:
        table = file.read(columns=[name for name in COLUMNS.names if name != "image"], use_threads=False)
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if table.num_rows != part.rows:
        raise DataError(
            f"'{folder.child(part.name)}' has {table.num_rows} images instead of {part.rows}. {how_to_mend(folder)}"
        )
    places = {
        "part": np.full(part.rows, number),
        "group": np.repeat(np.arange(len(lengths)), lengths),
        "row": np.concatenate([np.arange(length) for length in (0, *lengths)]),
    }
    for name, values in places.items():
        table = table.append_column(name, pa.array(values, pa.int64()))
    return table
