"""Folders on a local disk or in a bucket, through pyarrow filesystems, with writes that are whole or not there."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyarrow import ArrowInvalid, fs

from eat_dist.errors import StorageError


class FileStamp(NamedTuple):
    """What tells two versions of a file apart without reading them: bytes, and nanoseconds since 1970 if known."""

    size: int
    mtime_ns: int | None


@dataclass(frozen=True)
class Folder:
    """A folder addressed by a path or URL (``runs/a``, ``s3://bucket/runs/a``, ``gs://…``).

    A file is written under a temporary name and renamed on a local disk; object stores make an object visible only
    once it is complete, so there it is written directly. Names may contain ``/``.
    """

    filesystem: fs.FileSystem
    path: str

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> Folder:
        """Open (not create) the folder at a path or URL.

        Raises:
            StorageError: The URL's scheme is unknown.
        """
        text = os.fspath(location)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (ArrowInvalid, OSError) as error:
            raise StorageError(f"cannot open '{text}': {_first_line(error)}") from error
        return cls(filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's disk."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}://{self.path}"

    def child(self, name: str) -> Folder:
        """The folder ``name`` inside this one."""
        return Folder(self.filesystem, f"{self.path}/{name}")

    def file(self, name: str) -> str:
        """The filesystem path of a file in this folder."""
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder ``name`` (default: the folder itself) is there."""
        return bool(self._info(name).type != fs.FileType.NotFound)

    def names(self) -> list[str]:
        """Sorted names of the files and folders directly inside; empty where the folder does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        try:
            return sorted(info.base_name for info in self.filesystem.get_file_info(selector))
        except OSError as error:
            raise StorageError(f"cannot list '{self}': {_reason(error)}") from error

    def files(self) -> dict[str, FileStamp]:
        """All files at any depth, by their path below this folder, sorted; empty where the folder does not exist.

        Raises:
            StorageError: It cannot be listed.
        """
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except UnicodeDecodeError as error:
            raise StorageError(f"cannot list '{self}': a file name in it is not UTF-8; rename the file") from error
        except OSError as error:
            raise StorageError(f"cannot list '{self}': {_reason(error)}") from error
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
            raise StorageError(f"cannot read '{self}/{name}': there is no such file")
        return FileStamp(info.size, info.mtime_ns)

    def create(self) -> None:
        """Make the folder and its parents.

        Raises:
            StorageError: It cannot be made or is not writable.
        """
        probe = f"{self.path}/.write-{uuid.uuid4().hex}"
        try:
            self.filesystem.create_dir(self.path, recursive=True)
            with self.filesystem.open_output_stream(probe) as stream:
                stream.write(b"ok")
            self.filesystem.delete_file(probe)
        except OSError as error:
            raise StorageError(f"cannot write to '{self}': {_reason(error)}. Choose another folder.") from error

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            StorageError: It is not there or cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(self.file(name)) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise StorageError(f"cannot read '{self}/{name}': {_reason(error)}") from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole: a reader sees the old content or the new one, never a part.

        Raises:
            StorageError: No permission, no space left.
        """
        target = self.file(name)
        written = f"{target}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else target
        try:
            self.filesystem.create_dir(os.path.dirname(target), recursive=True)
            with self.filesystem.open_output_stream(written) as stream:
                stream.write(content)
            if self.is_local:
                self.filesystem.move(written, target)
        except OSError as error:
            if self.is_local and os.path.exists(written):
                os.unlink(written)
            raise StorageError(f"cannot write '{self}/{name}': {_reason(error)}") from error

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
            raise StorageError(f"cannot write '{self}/{name}': {_reason(error)}") from error
        return True

    def read_json(self, name: str) -> Any:
        """A JSON file's content.

        Raises:
            StorageError: Missing, unreadable or not JSON.
        """
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise StorageError(f"'{self}/{name}' is not valid JSON: {error}") from error

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
            raise StorageError(f"cannot delete '{self}/{name}': {_reason(error)}") from error

    def _info(self, name: str) -> fs.FileInfo:
        try:
            return self.filesystem.get_file_info(self.file(name) if name else self.path)
        except OSError as error:
            raise StorageError(f"cannot reach '{self}': {_reason(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: OSError) -> str:
    if error.errno:
        return os.strerror(error.errno)
    # pyarrow puts the operating system's words into the text: "… Detail: [errno 28] No space left on device".
    return str(error).rsplit("] ", maxsplit=1)[-1].strip().splitlines()[0]
