"""Folders on a local disk or in a bucket, through pyarrow filesystems, with writes that are whole or not there."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from eat_dist.bucket import OPTIONS, open_bucket, reason
from eat_dist.errors import StorageError

_CHECK_BUCKET = "Check the bucket's name, endpoint and credentials, and what they permit (docs/storage.md)."


# Age from which on nobody is replacing a file in a bucket at this very moment; younger ones are read twice.
_SETTLED_NS = 10 * 10**9


class FileStamp(NamedTuple):
    """What tells two versions of a file apart without reading them: bytes, and nanoseconds since 1970 if known."""

    size: int
    mtime_ns: int | None


@dataclass(frozen=True)
class Folder:
    """A folder addressed by a path or URL (``runs/a``, ``s3://bucket/runs/a``, ``gs://…``).

    A file is written under a temporary name and renamed on a local disk; object stores make an object visible only
    once it is complete, so there it is written directly. Names may contain ``/``. ``str(folder)`` leads to the same
    folder again in any process, the URL's query (endpoint, region) included; so does a pickled one.

    Attributes:
        filesystem: Where it is.
        path: In the filesystem; of a bucket ``BUCKET/KEY``.
        scheme: ``s3`` or ``gs``; empty: a local disk.
        query: Of the URL, with its ``?``.
    """

    filesystem: fs.FileSystem
    path: str
    scheme: str = ""
    query: str = ""

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> Folder:
        """Open (not create) the folder at a path or URL.

        Raises:
            StorageError: The URL's scheme is unknown, or as :func:`eat_dist.bucket.open_bucket`.
        """
        text = os.fspath(location)
        scheme, separator, _ = text.partition("://")
        if not separator:
            return cls(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))
        if scheme in OPTIONS:
            filesystem, path, query = open_bucket(text)
            return cls(filesystem, path, scheme, query)
        if scheme != "file":
            raise StorageError(f"cannot open '{text}': expected a path or a URL of {', '.join(OPTIONS)} or file")
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"cannot open '{text}': {reason(error)}") from error
        return cls(filesystem, path.rstrip("/"))

    @classmethod
    def of_file(cls, location: str | os.PathLike[str]) -> tuple[Folder, str]:
        """The folder that holds the file at a path or URL, and the file's name in it.

        Raises:
            StorageError: The location is a folder's; or as :meth:`at`.
        """
        whole = cls.at(location)
        parent, _, name = whole.path.rpartition("/")
        if os.fspath(location).partition("?")[0].endswith("/") or not name or not (parent or whole.is_local):
            raise StorageError(f"'{location}' names a folder; expected a file")
        return replace(whole, path=parent or "/"), name

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's disk."""
        return not self.scheme

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.scheme}://{quote(self.path)}{self.query}"

    @property
    def argument(self) -> str:
        """``str`` as an argument in a shell, where a query's ``?`` and ``&`` mean something else."""
        return shlex.quote(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder.at, (str(self),)

    def child(self, name: str) -> Folder:
        """The folder ``name`` inside this one; in a message also a file, ``str`` of which is its path or URL."""
        return replace(self, path=f"{self.path}/{name}")

    def file(self, name: str) -> str:
        """The filesystem path of a file in this folder."""
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder ``name`` (default: the folder itself) is there."""
        return bool(self._info(name).type != fs.FileType.NotFound)

    def names(self) -> list[str]:
        """Sorted names of the files and folders directly inside; empty where the folder does not exist.

        Raises:
            StorageError: It cannot be listed.
        """
        return sorted(info.base_name for info in self._infos(recursive=False).values())

    def files(self) -> dict[str, FileStamp]:
        """All files at any depth, by their path below this folder, sorted; empty where the folder does not exist.

        Raises:
            StorageError: It cannot be listed.
        """
        infos = self._infos(recursive=True).values()
        above = f"{self.path.rstrip('/')}/" if self.path else ""
        found = {info.path.removeprefix(above): FileStamp(info.size, info.mtime_ns) for info in infos if info.is_file}
        return dict(sorted(found.items()))

    def stamp(self, name: str) -> FileStamp:
        """Size and time of one file.

        Raises:
            StorageError: It is not there.
        """
        info = self._info(name)
        if not info.is_file:
            raise StorageError(f"cannot read '{self.child(name)}': there is no such file")
        return FileStamp(info.size, info.mtime_ns)

    def create(self) -> None:
        """Make the folder and its parents, and try a write. In a bucket, which has no folders, only the latter.

        Raises:
            StorageError: It cannot be made, or files in it cannot be written and deleted.
        """
        probe = f".write-{uuid.uuid4().hex}"
        advice = "Choose another folder." if self.is_local else _CHECK_BUCKET
        try:
            self.write(probe, b"ok")
            self.filesystem.delete_file(self.file(probe))
        except (StorageError, OSError) as error:
            cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
            raise StorageError(f"cannot write to '{self}': {reason(cause)}. {advice}") from error

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            StorageError: It is not there or cannot be read.
        """
        before: bytes | None = None
        while True:
            try:
                with self.filesystem.open_input_file(self.file(name)) as file:
                    # Of a bucket in one request: what that gets is of one moment. read() asks again for what is
                    # missing, and would put two versions together.
                    content = bytes(file.read() if self.is_local else file.read_at(file.size(), 0))
            except OSError as error:
                raise StorageError(f"cannot read '{self.child(name)}': {reason(error)}") from error
            if self.is_local:
                return content
            # How much "all" is was asked before: a longer version that came in between is cut. One that is being
            # replaced right now may have its old size back by the time it is asked; then two answers must agree.
            stamp = self.stamp(name)
            settled = stamp.mtime_ns is None or abs(time.time_ns() - stamp.mtime_ns) > _SETTLED_NS
            if len(content) == stamp.size and (settled or content == before):
                return content
            before = content

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file whole: a reader sees the old content or the new one, never a part.

        Raises:
            StorageError: No permission, no space left.
        """
        if self.is_local:
            with self.writing(name) as stream:
                stream.write(content)
            return

        def upload() -> None:
            with self.filesystem.open_output_stream(self.file(name)) as stream:
                stream.write(content)

        try:
            # Closing pyarrow's stream completes the object, whatever is in it so far: so nothing may come in between.
            # Ctrl-C, which interrupts the main thread alone, waits for the other one here.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(upload).result()
        except OSError as error:
            raise StorageError(f"cannot write '{self.child(name)}': {reason(error)}") from error

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A stream into a file that is whole or, when what writes it raises, not there (or as it was).

        For a bucket it is collected in the local temporary folder first.

        Raises:
            StorageError: No permission, no space left.
        """
        if not self.is_local:
            try:
                with tempfile.NamedTemporaryFile(prefix="eat-dist-") as collected:
                    yield collected
                    collected.flush()
                    with pa.memory_map(collected.name) as content:
                        self.write(name, content.read_buffer())
            except OSError as error:
                raise StorageError(
                    f"cannot write '{self.child(name)}' by way of {tempfile.gettempdir()}: {reason(error)}"
                ) from error
            return
        target = self.file(name)
        written = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self.filesystem.create_dir(os.path.dirname(target), recursive=True)
            with self.filesystem.open_output_stream(written) as stream:
                yield stream
            self.filesystem.move(written, target)
        except BaseException as error:
            if os.path.exists(written):
                os.unlink(written)
            if isinstance(error, OSError):
                raise StorageError(f"cannot write '{self.child(name)}': {reason(error)}") from error
            raise

    def write_new(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one of that name already.

        On a local disk or NFS the file system decides, so of several who try at once one succeeds. Object stores are
        asked first and written then: two who try at the same instant may both succeed, and the later content stays.

        Returns:
            Whether it was written.

        Raises:
            StorageError: No permission, no space left.
        """
        if not self.is_local:
            if self.exists(name):
                return False
            self.write(name, content)
            return True
        try:
            self.filesystem.create_dir(os.path.dirname(self.file(name)), recursive=True)
            with open(self.file(name), "xb") as file:
                file.write(content)
        except FileExistsError:
            if not os.path.isfile(self.file(name)):  # a folder's place is taken by a file
                raise StorageError(f"cannot write '{self}/{name}': it is in the way of a file or folder") from None
            return False
        except OSError as error:
            raise StorageError(f"cannot write '{self}/{name}': {reason(error)}") from error
        return True

    def read_json(self, name: str) -> Any:
        """A JSON file's content.

        Raises:
            StorageError: Missing, unreadable or not JSON.
        """
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise StorageError(f"'{self.child(name)}' is not valid JSON: {error}") from error

    def write_json(self, name: str, content: Any) -> None:
        """Write JSON, indented, keys in the order given. NaN is refused: JSON has none."""
        self.write(name, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def delete(self, name: str = "") -> None:
        """Delete a file or a whole folder; nothing happens where it is not there.

        Raises:
            StorageError: It cannot be deleted.
        """
        try:
            kind = self._info(name).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.file(name) if name else self.path)
            elif kind == fs.FileType.File:
                self.filesystem.delete_file(self.file(name))
        except OSError as error:
            raise StorageError(f"cannot delete '{self.child(name)}': {reason(error)}") from error

    def _infos(self, *, recursive: bool) -> dict[str, fs.FileInfo]:
        """By path, which is read here: pyarrow decodes a name only when it is asked for."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        try:
            return {info.path: info for info in self.filesystem.get_file_info(selector)}
        except UnicodeDecodeError as error:
            raise StorageError(f"cannot list '{self}': a file name in it is not UTF-8; rename the file") from error
        except OSError as error:
            raise StorageError(f"cannot list '{self}': {reason(error)}") from error

    def _info(self, name: str) -> fs.FileInfo:
        try:
            return self.filesystem.get_file_info(self.file(name) if name else self.path)
        except OSError as error:
            advice = "" if self.is_local else f". {_CHECK_BUCKET}"
            raise StorageError(f"cannot reach '{self}': {reason(error)}{advice}") from error
