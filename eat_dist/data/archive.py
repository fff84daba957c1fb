"""A zip archive read in place, on a disk or in a bucket, without being unpacked and without trusting it."""

from __future__ import annotations

import io
import re
import threading
import zipfile
import zlib

from eat_dist.errors import DataError, StorageError
from eat_dist.storage import FileStamp, Folder

MAX_ENTRY_BYTES = 256 * 2**20
"""An entry that says, or turns out, to be larger when unpacked is refused (256 MiB): no image file is."""

# Entries are mostly read in the archive's order: a bucket is then asked once a MiB rather than several times an image.
_BUFFER_BYTES = 2**20
# Of the others zipfile unpacks without a limit whatever the entry holds.
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 0x1
_UNSAFE_NAME = re.compile(r"/|[A-Za-z]:|.*[\\\x00-\x1f]|(.*/)?\.\.(/|$)", re.DOTALL)


class Archive:
    """A zip archive of which only the table of contents is held in memory.

    Reading is safe from several threads, which take turns. The archive is an open file, so it is not for other
    processes: each opens its own.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        """Open ``name`` in ``folder`` and check the names of all entries.

        Raises:
            DataError: It is not there, is not a whole zip archive, or has an entry whose name is absolute or holds
                ``..``, a backslash, a drive letter or a control character.
        """
        self._location = str(folder.child(name))
        try:
            self._stamp = folder.stamp(name)
            file = folder.filesystem.open_input_file(folder.file(name))
            self._zip = zipfile.ZipFile(io.BufferedReader(file, _BUFFER_BYTES))
        except StorageError as error:
            raise DataError(str(error)) from error
        # On damaged bytes zipfile raises nearly anything: BadZipFile, ValueError, OSError, NotImplementedError, …
        except Exception as error:
            raise DataError(
                f"'{self._location}' is not a whole zip archive ({_one_line(error)}). Get or pack it again."
            ) from error
        self._entries = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        self._lock = threading.Lock()
        for info in self._zip.infolist():
            if _UNSAFE_NAME.match(info.orig_filename):
                raise DataError(
                    f"'{self._location}' has an entry {info.orig_filename!r}; names must be relative, without '..', "
                    "backslashes, drive letters or control characters. Pack it again."
                )

    def __str__(self) -> str:
        return self._location

    def files(self) -> dict[str, FileStamp]:
        """All entries but folders, sorted; an entry is as old as its archive, so each has the archive's stamp."""
        return dict.fromkeys(sorted(self._entries), self._stamp)

    def read(self, name: str) -> bytes:
        """The unpacked bytes of an entry, checked against its checksum.

        Raises:
            DataError: There is no such entry; it is encrypted, damaged or truncated, larger than
                :data:`MAX_ENTRY_BYTES`, or packed by another method than deflate.
        """
        info = self._entries.get(name)
        if info is None:
            raise DataError(f"there is no '{name}' in '{self._location}'")
        if info.flag_bits & _ENCRYPTED:
            raise self._unreadable(name, "it is encrypted. Pack it without a password")
        if info.compress_type not in _METHODS:
            raise self._unreadable(name, "it is packed by another method than deflate. Pack it again")
        if info.file_size > MAX_ENTRY_BYTES:
            raise self._unreadable(name, f"it unpacks to more than {MAX_ENTRY_BYTES // 2**20} MiB")
        try:
            # Asked for a number of bytes, zipfile unpacks no more, whatever the entry really holds.
            with self._lock, self._zip.open(info) as stream:
                content = stream.read(info.file_size)
        # A wrong checksum or name, a broken or cut stream, a disk or network that fails.
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
            raise self._unreadable(name, _one_line(error)) from error
        if len(content) != info.file_size:
            raise self._unreadable(name, f"it has {len(content)} of its {info.file_size} bytes")
        return content

    def _unreadable(self, name: str, reason: str) -> DataError:
        return DataError(f"cannot read '{name}' in '{self._location}': {reason}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
