"""From a dataset in its original layout to a folder of shards: each image read, decoded and stored once.

Parts are written one after another, each under a temporary name until it is whole, and the manifest last. So a death
leaves whole parts, which the next attempt keeps, and never a folder that looks finished. docs/shards.md has the rules.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

from eat_dist import __version__
from eat_dist.cpus import usable_cpus
from eat_dist.data.parallel import in_order, workers
from eat_dist.data.shard_format import (
    MANIFEST,
    SCHEMA,
    Manifest,
    Skipped,
    find_faults,
    read_manifest,
)
from eat_dist.data.shard_part import PlannedPart, Row, WholePart, load_row, read_back, write_part
from eat_dist.data.source import ROLES, Source
from eat_dist.errors import DataError, StorageError
from eat_dist.storage import Folder

OnProgress = Callable[[int, int], None]
"""``(done, total)``, in images."""

PART_IMAGES = 256
_LOCK = ".lock"
_OWN_NAME = re.compile(r"(part-\d{5}\.parquet|manifest\.json)(\.[0-9a-f]{8}\.tmp)?")


def prepare(
    source: Source,
    out: Folder,
    *,
    image_size: int | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    threads: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Write a dataset as shards, or go on where an earlier attempt was stopped.

    Args:
        source: The dataset.
        out: Where the shards go. One that holds the finished shards already is left as it is.
        image_size: Larger images are scaled down (never up) until their shorter side has this many pixels. None: the
            original bytes are stored.
        on_bad_image: ``error`` stops at the first image that cannot be decoded, ``skip`` leaves it out and lists it.
        threads: That read, decode and hash; default: one a CPU. Memory holds a few images of each.
        overwrite: Replace what ``out`` holds of another dataset or with other options, or damaged; whole parts stay.
        on_progress: Called after every image.

    Raises:
        DataError: An image is bad; or ``out`` holds other shards or a damaged manifest and ``overwrite`` is false.
        StorageError: Something cannot be read or written; or ``out`` holds other files than shards.
    """
    _check_manifest(out)
    plan = _Plan.of(source, image_size)
    if not overwrite and (manifest := _finished(out, plan, on_bad_image)):
        return manifest
    _check_own(out)
    out.create()
    with _alone(out):
        if not overwrite and (manifest := _finished(out, plan, on_bad_image)):  # by whom this one waited for
            return manifest
        out.delete(MANIFEST)
        for name in set(out.names()) - {part.name for part in plan.parts}:
            if _OWN_NAME.fullmatch(name):
                out.delete(name)
        progress = on_progress or (lambda done, total: None)
        parts = _write_parts(plan, out, on_bad_image, threads=threads or usable_cpus(), on_progress=progress)
        manifest = plan.manifest(parts)
        manifest.write(out)
    return manifest


def bad_image(reason: str, *, checked: int) -> DataError:
    """What ``data.on_bad_image: error`` stops with.

    Args:
        reason: Which image it is and what is wrong with it.
        checked: How many others were found good.
    """
    return DataError(
        f"{reason} ({checked:,} others were checked). Replace it, or set data.on_bad_image (--on-bad-image) to skip."
    )


@dataclass(frozen=True)
class _Plan:
    """A dataset's division into parts."""

    source: Source
    image_size: int | None
    parts: tuple[PlannedPart, ...]
    made_from: str

    @classmethod
    def of(cls, source: Source, image_size: int | None) -> _Plan:
        labels = {train: {name: i for i, name in enumerate(source.class_names(train=train))} for train in (True, False)}
        # Images of one class side by side: a class-balanced batch then reads few row groups.
        items = sorted(source.items, key=lambda item: (ROLES.index(item.role), item.class_name))
        about = [SCHEMA, source.dataset, source.channels, source.inverted, source.image_size, source.resize]
        parts: list[PlannedPart] = []
        for start in range(0, len(items), PART_IMAGES):
            own = [(item, labels[item.role == "train"][item.class_name]) for item in items[start : start + PART_IMAGES]]
            rows = [[item.name, item.class_name, item.role, label] for item, label in own]
            made_from = _sha256(json.dumps([*about, image_size, source.stamp, rows]))
            parts.append(PlannedPart(f"part-{len(parts):05d}.parquet", tuple(own), made_from))
        return cls(source, image_size, tuple(parts), _sha256("".join(part.made_from for part in parts)))

    def manifest(self, written: list[WholePart]) -> Manifest:
        images = sum((part.images for part in written), Counter[str]())
        decoded_bytes = sum((part.decoded_bytes for part in written), Counter[str]())
        return Manifest(
            schema=SCHEMA,
            eat_dist=__version__,
            dataset=self.source.dataset,
            channels=self.source.channels,
            inverted=self.source.inverted,
            image_size=self.source.image_size,
            resize=self.source.resize,
            stored_shorter_side=self.image_size,
            train_classes=self.source.class_names(train=True),
            test_classes=self.source.class_names(train=False),
            images={role: images[role] for role in ROLES if role in {item.role for item in self.source.items}},
            decoded_bytes={name: decoded_bytes[name] for name in ("train", "test")},
            stamp=self.source.stamp,
            made_from=self.made_from,
            chosen_by=dict(self.source.chosen_by),
            parts=tuple(part.part for part in written),
            skipped=tuple(skipped for part in written for skipped in part.skipped),
        )


def _finished(out: Folder, plan: _Plan, on_bad_image: str) -> Manifest | None:
    """The manifest of the shards that are to be made, where they are there already."""
    if not out.exists(MANIFEST):
        return None
    manifest = read_manifest(out)
    if manifest.made_from != plan.made_from:
        held = "of other files: they have changed, or are split into other classes"
        if manifest.dataset != plan.source.dataset:
            held = f"of the dataset '{manifest.dataset}'"
        elif manifest.stored_shorter_side != plan.image_size:
            held = f"with image size {manifest.stored_shorter_side or 'as in the original files'}"
        raise DataError(f"'{out}' holds shards {held}. Choose another folder, or replace them with --overwrite.")
    if find_faults(out, manifest):  # lost parts are made again
        return None
    if manifest.skipped and on_bad_image == "error":
        _try_skipped(plan, manifest)
        return None
    return manifest


def _try_skipped(plan: _Plan, manifest: Manifest) -> None:
    """Stop at a skipped image that is bad still, while the shards are whole: a run that skips it may use them.

    Raises:
        DataError: There is one.
    """
    names = {skipped.name for skipped in manifest.skipped}
    again = [image for part in plan.parts for image in part.images if image[0].name in names]
    for healed, image in enumerate(again):
        if isinstance(found := load_row(plan.source, plan.image_size, image), Skipped):
            raise bad_image(found.reason, checked=sum(manifest.images.values()) + healed)


def _check_manifest(out: Folder) -> None:
    """Refuse a folder whose manifest is another program's. Ours may be damaged: mending it is what is asked for."""
    if not out.exists(MANIFEST):
        return
    try:
        content = json.loads(out.read(MANIFEST))
        ours = isinstance(content, dict) and not content.keys().isdisjoint({"eat_dist", "made_from"})
    except ValueError:
        ours = any(name != MANIFEST and _OWN_NAME.fullmatch(name) for name in out.names())
    if not ours:
        raise _foreign(out, MANIFEST)


def _check_own(out: Folder) -> None:
    """Refuse a folder that holds something else, which might be named as parts are."""
    for name in out.names():
        if not (name.startswith(".") or _OWN_NAME.fullmatch(name)):
            raise _foreign(out, name)


def _foreign(out: Folder, name: str) -> StorageError:
    return StorageError(f"'{out}' holds other files than shards, e.g. '{name}'. Choose an empty or a new folder.")


@contextmanager
def _alone(out: Folder) -> Iterator[None]:
    """Keep other processes from preparing the same folder; the lock ends with the process, however it ends."""
    if not out.is_local:  # nothing to clean up there, and two write the same bytes
        yield
        return
    with open(out.file(_LOCK), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"another process prepares '{out}'; waiting for it", stacklevel=4)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            warnings.warn(f"cannot lock '{out}' ({error.strerror}): prepare it once at a time", stacklevel=4)
        yield


def _write_parts(
    plan: _Plan, out: Folder, on_bad_image: str, *, threads: int, on_progress: OnProgress
) -> list[WholePart]:
    """Write the parts that are not there or not whole; return all of them."""
    there = set(out.names())
    check = partial(read_back, out, plan.source.channels)
    total = len(plan.source.items)
    with workers(threads) as pool:
        found = list(pool.map(lambda part: check(part) if part.name in there else None, plan.parts))
        # An image that was skipped may have been mended, or out of reach for a moment: it is tried again.
        whole = {part.name: was for part, was in zip(plan.parts, found, strict=True) if was and not was.skipped}
        missing = [part for part in plan.parts if part.name not in whole]
        done = total - sum(len(part.images) for part in missing)
        on_progress(done, total)

        def watched(images: Iterable[Row | Skipped]) -> Iterator[Row | Skipped]:
            nonlocal done
            for image in images:
                if isinstance(image, Skipped) and on_bad_image == "error":
                    raise bad_image(image.reason, checked=done)
                done += 1
                on_progress(done, total)
                yield image

        load = partial(load_row, plan.source, plan.image_size)
        images = watched(in_order(pool, load, (image for part in missing for image in part.images), ahead=4 * threads))
        written = []
        for part in missing:
            write_part(out, part, islice(images, len(part.images)))
            written.append(pool.submit(check, part))  # beside the next part's images
        for part, future in zip(missing, written, strict=True):
            if (again := future.result()) is None:
                where = out.child(part.name)
                raise StorageError(f"'{where}' does not read back as it was written. Choose another folder.")
            whole[part.name] = again
    return [whole[part.name] for part in plan.parts]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
