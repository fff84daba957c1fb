"""Preparing shards again, after damage and deaths, and beside another process: only what is missing is made."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eat_dist.data.prepare import PART_IMAGES, prepare
from eat_dist.data.shard_format import MANIFEST, read_manifest
from eat_dist.errors import DataError, StorageError
from eat_dist.storage import Folder
from small_sources import encoded, few_files, flip_byte, one_line, picture, source_of, start, unreadable, write_files


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def rewritten(path: Path) -> list[str]:
    return [part.name for part in sorted(path.glob("part-*")) if part.stat().st_mtime != 1]


# Doing it again


def test_finished_shards_are_returned_at_once(tmp_path: Path) -> None:
    files = few_files()
    manifest = prepare(source_of(files), Folder.at(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert prepare(source_of(files, read=unreadable), Folder.at(tmp_path)) == manifest
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "cub200"}, "holds shards of the dataset 'folder'"),
        ({"image_size": 8}, "holds shards with image size as in the original files"),
        ({"content": encoded(picture(99))}, "holds shards of other files"),
    ],
    ids=["dataset", "size", "files"],
)
def test_other_shards_are_refused_and_replaced_only_when_asked(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    files, out = few_files(), Folder.at(tmp_path)
    before = prepare(source_of(files), out)
    changed = source_of(
        files | ({"train/ant/0.png": change["content"]} if "content" in change else {}),
        dataset=change.get("dataset", "folder"),
    )
    image_size = change.get("image_size")
    with pytest.raises(DataError) as error:
        prepare(changed, out, image_size=image_size)
    assert message in one_line(error)
    assert "--overwrite" in one_line(error)
    assert read_manifest(out) == before
    after = prepare(changed, out, overwrite=True, image_size=image_size)
    assert read_manifest(out) == after != before


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "part-00000-of-mine.parquet").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"holds other files than shards, e\.g\. 'part-00000-of-mine\.parquet'"):
        prepare(source_of(few_files()), Folder.at(tmp_path), overwrite=True)
    assert names(tmp_path) == ["part-00000-of-mine.parquet"]


WEB_APP = b'{"name": "birds", "icons": []}'


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {MANIFEST: WEB_APP},
        {MANIFEST: WEB_APP, "index.html": b"<html>"},
        {MANIFEST: WEB_APP, "part-00000.parquet": b"mine"},
        {MANIFEST: b"[1, 2]"},
        {MANIFEST: b"Contents:"},
    ],
    ids=["alone", "with a page", "with a part", "a list", "text"],
)
def test_a_manifest_of_another_program_is_refused_and_left_alone(
    tmp_path: Path, files: dict[str, bytes], overwrite: bool
) -> None:
    write_files(tmp_path, files)
    with pytest.raises(StorageError, match=r"holds other files than shards, e\.g\. 'manifest\.json'") as error:
        prepare(source_of(few_files()), Folder.at(tmp_path), overwrite=overwrite)
    assert "--overwrite" not in one_line(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_shards_with_a_foreign_file_beside_them_are_used_but_not_replaced(tmp_path: Path) -> None:
    files, out = few_files(), Folder.at(tmp_path)
    manifest = prepare(source_of(files), out)
    write_files(tmp_path, {"notes.txt": b"mine"})
    assert prepare(source_of(files), out) == manifest
    with pytest.raises(StorageError, match=r"holds other files than shards, e\.g\. 'notes\.txt'"):
        prepare(source_of(few_files(4)), out, overwrite=True)
    assert read_manifest(out) == manifest


@pytest.fixture
def two_parts(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """Shards of 300 images in parts of 256 and 44, with times that a rewritten file cannot have."""
    files = few_files(75)
    prepare(source_of(files), Folder.at(tmp_path))
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    return tmp_path, files


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_only_the_part_that_is_not_whole_is_written_again(two_parts: tuple[Path, dict[str, bytes]], harm: str) -> None:
    path, files = two_parts
    manifest, part = read_manifest(Folder.at(path)), path / "part-00001.parquet"
    if harm == "flip":
        flip_byte(part, 3000)
    elif harm == "truncate":
        part.write_bytes(part.read_bytes()[:-100])
    else:
        part.unlink()
    assert prepare(source_of(files), Folder.at(path), overwrite=True) == manifest
    assert rewritten(path) == ["part-00001.parquet"]


def test_lost_parts_are_made_again_without_being_asked(two_parts: tuple[Path, dict[str, bytes]]) -> None:
    path, files = two_parts
    (path / "part-00000.parquet").unlink()
    prepare(source_of(files), Folder.at(path))
    assert rewritten(path) == ["part-00000.parquet"]


def test_parts_and_temporary_files_that_nothing_needs_are_deleted(two_parts: tuple[Path, dict[str, bytes]]) -> None:
    path, files = two_parts
    for name in ("part-00002.parquet", "part-00001.parquet.0123abcd.tmp", "manifest.json.0123abcd.tmp"):
        (path / name).write_bytes(b"left over")
    (path / MANIFEST).unlink()
    prepare(source_of(files), Folder.at(path))
    assert names(path) == [".lock", MANIFEST, "part-00000.parquet", "part-00001.parquet"]
    assert rewritten(path) == []


def test_parts_with_skipped_images_are_tried_again_and_the_others_kept(tmp_path: Path) -> None:
    files = few_files(75)
    last = "test/dog/74.png"
    broken = source_of(files | {last: b"bad"})
    healed = source_of(files | {last: b"bad"}, read=files.__getitem__)  # a file that was out of reach for a moment
    out = Folder.at(tmp_path)
    assert len(prepare(broken, out, on_bad_image="skip").skipped) == 1
    os.utime(tmp_path / "part-00000.parquet", (1, 1))
    assert prepare(healed, out, on_bad_image="error").skipped == ()
    assert rewritten(tmp_path) == ["part-00001.parquet"]


def test_where_a_skipped_image_is_an_error_the_shards_without_it_stay_for_whom_it_is_none(tmp_path: Path) -> None:
    files, out = few_files(), Folder.at(tmp_path)
    bad = "train/ant/1.png"
    broken = source_of(files | {bad: b"bad"})
    manifest = prepare(broken, out, on_bad_image="skip")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(DataError) as error:
        prepare(broken, out, on_bad_image="error")
    assert f"'{bad}': not a PNG" in one_line(error)
    assert f"({len(files) - 1} others were checked)" in one_line(error)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert prepare(source_of(files | {bad: b"bad"}, read=unreadable), out, on_bad_image="skip") == manifest


# Deaths and company

SLOW = """
import sys, time
from eat_dist.data.prepare import prepare
from eat_dist.storage import Folder
from small_sources import few_files, source_of
files = few_files(200)
def read(name):
    time.sleep(0.002)
    return files[name]
print("ready", flush=True)
prepare(source_of(files, read=read), Folder.at(sys.argv[1]), threads=1)
"""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_after_a_stop_the_finished_parts_stay_and_the_rest_is_made(tmp_path: Path, stop: signal.Signals) -> None:
    path = tmp_path / "shards"
    process = start(SLOW, str(path))
    wait_for(lambda: bool(list(path.glob("part-00001.parquet.*.tmp"))), process)
    process.send_signal(stop)
    process.communicate(timeout=60)
    temporary = [name for name in names(path) if name.endswith(".tmp")]
    assert len(temporary) == (stop == signal.SIGKILL)
    assert [name for name in names(path) if name not in temporary] == [".lock", "part-00000.parquet"]
    os.utime(path / "part-00000.parquet", (1, 1))

    files = few_files(200)
    read: list[str] = []

    def watched(name: str) -> bytes:
        read.append(name)
        return files[name]

    source = source_of(files, read=watched)
    progress: list[int] = []
    manifest = prepare(source, Folder.at(path), on_progress=lambda done, total: progress.append(done))
    assert rewritten(path) == [part.name for part in manifest.parts[1:]]
    assert len(read) == len(files) - PART_IMAGES
    assert progress == list(range(PART_IMAGES, len(files) + 1))
    assert manifest == prepare(source_of(files), Folder.at(tmp_path / "undisturbed"))
    assert names(path) == [".lock", MANIFEST, *(part.name for part in manifest.parts)]


def test_who_comes_second_waits_and_finds_the_shards_finished(tmp_path: Path) -> None:
    path, files = tmp_path / "shards", few_files(200)
    first = start(SLOW, str(path))
    wait_for(lambda: bool(list(path.glob("part-*.tmp"))), first)
    with pytest.warns(UserWarning, match="another process prepares .*; waiting for it"):
        manifest = prepare(source_of(files, read=unreadable), Folder.at(path))
    assert first.wait() == 0
    assert manifest == prepare(source_of(files), Folder.at(tmp_path / "alone"))
