"""Zip archives read in place: safe names, safe sizes, threads, buckets, and every kind of damage in one line."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from object_store import ObjectStore

from dataset_layouts import write_zip
from eat_dist.data import archive as archive_module
from eat_dist.data.archive import Archive
from eat_dist.errors import DataError
from eat_dist.storage import Folder

NOISE = np.random.default_rng(0).bytes(3000)


def opened(path: Path) -> Archive:
    return Archive(Folder.at(path.parent), path.name)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def patched(path: Path, name: str, offset: int, value: bytes) -> Archive:
    """Overwrite bytes of an entry in the table of contents, ``offset`` from its start (APPNOTE 4.3.12)."""
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    content[start + offset : start + offset + len(value)] = value
    path.write_bytes(content)
    return opened(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entries_are_listed_sorted_and_read_whole(tmp_path: Path, method: int) -> None:
    archive = opened(write_zip(tmp_path / "a.zip", {"b/2.bin": NOISE, "b/": b"", "a.bin": b"", "b/1": b"x"}, method))
    assert list(archive.files()) == ["a.bin", "b/1", "b/2.bin"]
    assert [archive.read(name) for name in archive.files()] == [b"", b"x", NOISE]


def test_an_entry_has_the_stamp_of_its_archive(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"x": b"1", "y": b"2"})
    assert set(opened(path).files().values()) == {Folder.at(tmp_path).stamp("a.zip")}


def test_threads_read_what_one_reader_reads(tmp_path: Path) -> None:
    entries = {f"{index}.bin": NOISE[index:] * (index % 7) for index in range(300)}
    archive = opened(write_zip(tmp_path / "a.zip", entries, zipfile.ZIP_DEFLATED))
    names = random.Random(0).choices(sorted(entries), k=2000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(archive.read, names)) == [entries[name] for name in names]


def test_an_archive_in_a_bucket_is_read_in_place(s3: ObjectStore, bucket: str, tmp_path: Path) -> None:
    remote = s3.folder(f"{bucket}/data")
    remote.write("a.zip", write_zip(tmp_path / "a.zip", {"x": NOISE}).read_bytes())
    assert Archive(remote, "a.zip").read("x") == NOISE


@pytest.mark.parametrize(
    "name",
    [
        "../out.png",
        "a/../../out.png",
        "a/..",
        "/etc/passwd",
        "a\\b.png",
        "C:/x.png",
        "c:x.png",
        "..\\x.png",
        "a\nb.png",
    ],
)
def test_a_name_that_points_out_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "a.zip", {"fine.png": b"1", name: b"2"})
    with pytest.raises(DataError) as error:
        opened(path)
    assert f"'{path}' has an entry {name!r}; names must" in one_line(error)


@pytest.mark.parametrize("name", ["a..b/c.png", "..a.png", "a/...", "ab:c.png", "Ünï/ c.png"])
def test_an_unusual_name_that_stays_inside_is_read(tmp_path: Path, name: str) -> None:
    assert opened(write_zip(tmp_path / "a.zip", {name: b"1"})).read(name) == b"1"


def test_a_missing_archive_and_a_missing_entry_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.zip"):
        opened(tmp_path / "none.zip")
    archive = opened(write_zip(tmp_path / "a.zip", {"x": b"1"}))
    with pytest.raises(DataError, match=r"there is no 'y' in '.*a\.zip'"):
        archive.read("y")


@pytest.mark.parametrize("kept", [0, 1, 30, 1000, -1, -40])
def test_a_truncated_archive_is_named(tmp_path: Path, kept: int) -> None:
    path = write_zip(tmp_path / "a.zip", {"x": NOISE})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError) as error:
        opened(path)
    assert f"'{path}' is not a whole zip archive" in one_line(error)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_changed_byte_is_found_by_the_checksum(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "a.zip", {"x": NOISE, "y": b"whole"}, method)
    content = bytearray(path.read_bytes())
    content[1500] ^= 0xFF
    path.write_bytes(content)
    archive = opened(path)
    with pytest.raises(DataError) as error:
        archive.read("x")
    assert f"cannot read 'x' in '{path}': " in one_line(error)
    assert archive.read("y") == b"whole"


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"secret.png": NOISE})
    with pytest.raises(DataError, match=r"'secret\.png' in .*: it is encrypted"):
        patched(path, "secret.png", 8, b"\x01").read("secret.png")


def test_only_stored_and_deflated_entries_are_read(tmp_path: Path) -> None:
    archive = opened(write_zip(tmp_path / "a.zip", {"x": NOISE}, zipfile.ZIP_BZIP2))
    with pytest.raises(DataError, match="another method than deflate"):
        archive.read("x")


def test_an_entry_larger_than_the_cap_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "MAX_ENTRY_BYTES", 2**20)
    archive = opened(write_zip(tmp_path / "a.zip", {"bomb": bytes(2**20 + 1), "ok": bytes(2**20)}, 8))
    assert len(archive.read("ok")) == 2**20
    with pytest.raises(DataError, match=r"cannot read 'bomb' in .*more than 1 MiB"):
        archive.read("bomb")


def test_an_entry_that_hides_its_size_is_not_unpacked_beyond_it(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"bomb": bytes(2**25)}, zipfile.ZIP_DEFLATED)
    archive = patched(path, "bomb", 24, struct.pack("<I", 1000))
    tracemalloc.start()
    with pytest.raises(DataError, match="cannot read 'bomb'"):
        archive.read("bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_an_entry_that_is_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"short.bin": NOISE}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"cannot read 'short\.bin'"):
        patched(path, "short.bin", 24, struct.pack("<I", 5000)).read("short.bin")


def test_any_damage_is_one_data_error_or_none(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {f"{index}/x.png": NOISE[:200] for index in range(5)}, 8)
    whole, numbers, messages = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(numbers.randint(1, 4)):
            content[numbers.randrange(len(content))] = numbers.randrange(256)
        path.write_bytes(content[: numbers.choice([None, numbers.randrange(len(content))])])
        try:
            archive = opened(path)
            for name in archive.files():
                archive.read(name)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert not [message for message in messages if "\n" in message]
