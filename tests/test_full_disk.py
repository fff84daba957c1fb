"""A disk that fills up while a run writes: one line, nothing half-written, and it goes on when there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eat_dist.checkpoint import Checkpoints
from eat_dist.data.prepare import prepare
from eat_dist.errors import StorageError
from eat_dist.storage import Folder
from small_runs import largest_difference, small_config, train_locally, weights
from small_sources import few_files, source_of

DISK = 2 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Something else takes the room."""
    other = disk / "other"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    other.write_bytes(bytes(free - leave))
    return other


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


def test_a_write_that_finds_no_room_keeps_the_old_file_and_nothing_half_written(disk: Path) -> None:
    folder = Folder.at(disk)
    folder.write("x", b"old")
    with pytest.raises(StorageError, match=rf"^cannot write '{disk}/x': No space left on device$"):
        folder.write("x", bytes(2 * DISK))
    assert files(disk) == {"x"}
    assert folder.read("x") == b"old"


def test_shards_that_find_no_room_are_one_line_and_go_on(disk: Path) -> None:
    other = fill(disk, leave=32 * 1024)
    out = Folder.at(disk / "shards")
    with pytest.raises(StorageError, match=r"^cannot write '.*/part-00000\.parquet': No space left on device$"):
        prepare(source_of(few_files(100)), out)
    assert files(disk / "shards") <= {".lock"}
    other.unlink()
    assert prepare(source_of(few_files(100)), out).images["train"] == 200


def test_a_run_stops_at_the_checkpoint_that_finds_no_room_and_resumes_to_the_same_weights(
    disk: Path, tmp_path: Path
) -> None:
    config = small_config("ensemble.members=2", "train.epochs=3")
    train_locally(config, tmp_path / "undisturbed")
    run = disk / "run"
    taken: list[Path] = []

    def fill_up(ensemble: object) -> None:
        if ensemble.iteration == 7 and not taken:  # type: ignore[attr-defined]
            taken.append(fill(disk, leave=8 * 1024))

    with pytest.raises(StorageError, match=rf"^cannot write '{run}/.*': No space left on device$") as caught:
        train_locally(config, run, fill_up)
    assert "\n" not in str(caught.value)
    assert not [name for name in files(run) if name.endswith(".tmp")]
    found = Checkpoints(Folder.at(run / "checkpoints"), config).newest()
    assert found is not None
    assert found.iteration == 5

    with pytest.raises(StorageError, match="No space left on device"):  # still no room
        train_locally(config, run)
    taken[0].unlink()
    results = train_locally(config, run)
    assert {result.resumed_from for result in results} == {5}
    assert largest_difference(weights(tmp_path / "undisturbed", 2), weights(run, 2)) == 0
