"""Preparing shards: bytes kept, bad images found, little memory, and nothing left half-written in a bucket."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ObjectStore
from PIL import Image
from torchvision.transforms.v2 import functional

from eat_dist.data.decode import to_tensor
from eat_dist.data.prepare import prepare
from eat_dist.data.shard_format import MANIFEST, Manifest, read_manifest
from eat_dist.errors import DataError, StorageError
from eat_dist.storage import Folder
from small_sources import encoded, few_files, one_line, picture, source_of, start


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a folder of shards, in order."""
    parts = sorted(path.glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


# What is stored


def test_the_original_bytes_and_what_is_said_of_them_come_back_exactly(tmp_path: Path) -> None:
    files = few_files()
    prepare(source_of(files), Folder.at(tmp_path))
    labels = {"ant": 0, "wasp": 1, "cat": 0, "dog": 1}
    assert {row["name"]: row for row in rows(tmp_path)} == {
        name: {
            "image": content,
            "label": labels[name.split("/")[1]],
            "class_name": name.split("/")[1],
            "name": name,
            "role": name.split("/")[0],
            "sha256": hashlib.sha256(content).digest(),
            "height": 9,
            "width": 12,
        }
        for name, content in files.items()
    }
    column = pq.ParquetFile(tmp_path / "part-00000.parquet").metadata.row_group(0).column(0)
    assert (column.compression, column.has_dictionary_page) == ("UNCOMPRESSED", False)


def test_rows_are_in_the_order_of_roles_then_classes_then_the_source(tmp_path: Path) -> None:
    files = few_files(2, roles=("train", "query", "gallery"))
    prepare(source_of(files), Folder.at(tmp_path))
    assert [row["name"] for row in rows(tmp_path)] == [
        f"{role}/{name}/{i}.png"
        for role, classes in (("train", ("ant", "wasp")), ("query", ("cat", "dog")), ("gallery", ("cat", "dog")))
        for name in classes
        for i in range(2)
    ]


def test_a_row_group_has_16_images_or_fewer_large_ones_and_a_part_256(tmp_path: Path) -> None:
    tiny, large = few_files(75), few_files(2)
    prepare(source_of(tiny), Folder.at(tmp_path / "tiny"))
    parts = [pq.ParquetFile(path).metadata for path in sorted((tmp_path / "tiny").glob("part-*"))]
    lengths = [[part.row_group(group).num_rows for group in range(part.num_row_groups)] for part in parts]
    assert lengths == [[16] * 16, [16, 16, 12]]
    # A JPEG reader stops at the end of the image, so what follows only makes the file larger.
    large = {name: encoded(picture(0), "JPEG") + bytes(3 * 2**20) for name in large}
    prepare(source_of(large), Folder.at(tmp_path / "large"))
    part = pq.ParquetFile(tmp_path / "large" / "part-00000.parquet").metadata
    assert [part.row_group(group).num_rows for group in range(part.num_row_groups)] == [2, 2, 2, 2]


def test_the_manifest_tells_what_the_folder_holds(tmp_path: Path) -> None:
    files = few_files(roles=("train", "query", "gallery"))
    source = source_of(files, inverted=True)
    manifest = prepare(source, Folder.at(tmp_path))
    assert manifest == read_manifest(Folder.at(tmp_path))
    part = tmp_path / "part-00000.parquet"
    assert [vars(part) for part in manifest.parts] == [
        {
            "name": part.name,
            "rows": 18,
            "bytes": part.stat().st_size,
            "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
        }
    ]
    assert (manifest.dataset, manifest.stamp, manifest.inverted) == ("folder", source.stamp, True)
    assert (manifest.channels, manifest.image_size, manifest.resize, manifest.stored_shorter_side) == (3, 6, 8, None)
    assert (manifest.train_classes, manifest.test_classes) == (("ant", "wasp"), ("cat", "dog"))
    assert manifest.images == {"train": 6, "query": 6, "gallery": 6}
    assert manifest.decoded_bytes == {"train": 6 * 9 * 12 * 3, "test": 12 * 9 * 12 * 3}
    assert manifest.skipped == ()


def test_any_number_of_threads_makes_the_same_files(tmp_path: Path) -> None:
    source = source_of(few_files(75))
    one, four = (prepare(source, Folder.at(tmp_path / str(threads)), threads=threads) for threads in (1, 4))
    assert one == four
    assert len(one.parts) == 2


# Scaling down


def test_with_an_image_size_large_images_are_scaled_as_torchvision_does_and_small_ones_kept(tmp_path: Path) -> None:
    files = few_files()
    big, exact, small = "train/ant/0.png", "train/ant/1.png", "train/ant/2.png"
    files[big] = encoded(picture(1, height=40, width=31))
    files[exact] = encoded(picture(2, height=20, width=50))
    manifest = prepare(source_of(files), Folder.at(tmp_path), image_size=20)
    stored = {row["name"]: row for row in rows(tmp_path)}
    assert manifest.stored_shorter_side == 20
    assert stored[exact]["image"] == files[exact]
    assert stored[small]["image"] == files[small]
    scaled = Image.open(io.BytesIO(stored[big]["image"]))
    assert scaled.format == "PNG"
    assert torch.equal(to_tensor(scaled), to_tensor(functional.resize(picture(1, height=40, width=31), [20])))
    assert (stored[big]["height"], stored[big]["width"]) == (25, 20)


def test_a_scaled_jpeg_stays_a_jpeg_with_all_of_its_colours(tmp_path: Path) -> None:
    files = few_files()
    colour, grey = "train/ant/0.png", "train/ant/1.png"
    files[colour] = encoded(picture(1, height=64, width=64), "JPEG", quality=95)
    files[grey] = encoded(picture(2, height=64, width=64, mode="L"), "JPEG", quality=95)
    prepare(source_of(files), Folder.at(tmp_path), image_size=16)
    stored = {row["name"]: Image.open(io.BytesIO(row["image"])) for row in rows(tmp_path)}
    assert stored[colour].format == stored[grey].format == "JPEG"
    assert {layer[1:3] for layer in vars(stored[colour])["layer"]} == {(1, 1)}  # 4:4:4
    wanted = np.asarray(picture(1, height=64, width=64).resize((16, 16), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(np.asarray(stored[colour], dtype=int) - wanted).mean() < 3


def test_a_scaled_image_is_upright_and_loses_its_orientation_tag(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right by 90°
    files = few_files() | {"train/ant/0.png": encoded(picture(1, height=20, width=40), "JPEG", exif=exif)}
    prepare(source_of(files), Folder.at(tmp_path), image_size=10)
    row = rows(tmp_path)[0]
    image = Image.open(io.BytesIO(row["image"]))
    assert (row["height"], row["width"]) == (image.height, image.width) == (20, 10)
    assert 0x0112 not in image.getexif()


# Odd and bad images

JPEG = encoded(picture(0, height=64, width=64), "JPEG")


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(0, height=9, width=12), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (encoded(picture(0, mode="L")), (9, 12)),
        (encoded(picture(0).convert("CMYK"), "JPEG"), (9, 12)),
        (encoded(picture(0).convert("P")), (9, 12)),
        (encoded(Image.fromarray(np.full((9, 12), 40_000, np.uint16))), (9, 12)),
        (rotated_jpeg(), (12, 9)),
        (encoded(picture(0, height=1, width=1)), (1, 1)),
    ],
    ids=["grey", "CMYK", "palette", "16 bits", "turned", "1×1"],
)
def test_odd_images_are_stored_as_they_are_with_the_size_they_decode_to(
    tmp_path: Path, content: bytes, size: tuple[int, int]
) -> None:
    prepare(source_of(few_files() | {"train/ant/0.png": content}), Folder.at(tmp_path))
    row = rows(tmp_path)[0]
    assert row["image"] == content
    assert (row["height"], row["width"]) == size


@pytest.mark.parametrize("content", [JPEG[:-300], b"", b"text"], ids=["truncated", "empty", "text"])
def test_a_bad_image_stops_preparing_or_is_left_out_and_listed(tmp_path: Path, content: bytes) -> None:
    bad = "train/wasp/1.png"
    source = source_of(few_files() | {bad: content})
    out = Folder.at(tmp_path)
    with pytest.raises(DataError) as error:
        prepare(source, out, threads=1)
    assert f"cannot decode image '{bad}'" in one_line(error)
    assert "4 others were checked" in one_line(error)
    assert "data.on_bad_image" in one_line(error)
    assert not out.exists(MANIFEST)
    manifest = prepare(source, out, on_bad_image="skip")
    assert [skipped.name for skipped in manifest.skipped] == [bad]
    assert "cannot decode" in manifest.skipped[0].reason
    assert manifest.images == {"train": 5, "test": 6}
    assert bad not in {row["name"] for row in rows(tmp_path)}


def test_a_source_that_is_out_of_reach_stops_preparing_even_where_bad_images_are_skipped(tmp_path: Path) -> None:
    def read(name: str) -> bytes:
        raise StorageError(f"cannot read '{name}': the network is down")

    with pytest.raises(StorageError, match="the network is down"):
        prepare(source_of(few_files(), read=read), Folder.at(tmp_path), on_bad_image="skip")


def test_a_class_whose_images_are_all_skipped_stays_in_the_list(tmp_path: Path) -> None:
    files = few_files(1) | {"train/ant/0.png": b"bad"}
    manifest = prepare(source_of(files), Folder.at(tmp_path), on_bad_image="skip")
    assert manifest.train_classes == ("ant", "wasp")
    assert [row["label"] for row in rows(tmp_path) if row["role"] == "train"] == [1]


# Memory

PEAK = """
import resource, sys, tempfile
from eat_dist.data.prepare import prepare
from eat_dist.storage import Folder
from small_sources import encoded, few_files, source_of
import numpy as np
from PIL import Image
noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)))
for per_class in (128, 400):
    files = dict.fromkeys(few_files(per_class), noise)
    with tempfile.TemporaryDirectory() as folder:
        prepare(source_of(files), Folder.at(folder), threads=2)
    print(len(noise) * len(files), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_dataset() -> None:
    printed, error = start(PEAK).communicate(timeout=120)
    assert not error
    few, many, *_ = (tuple(map(int, line.split())) for line in printed.splitlines())
    assert many[0] - few[0] > 120e6  # bytes of image files
    assert many[1] - few[1] < 30e6  # of memory, at the highest


# Buckets


def test_in_a_bucket_the_same_files_are_made_without_temporary_ones(
    s3: ObjectStore, bucket: str, tmp_path: Path
) -> None:
    source, remote = source_of(few_files(75)), s3.folder(f"{bucket}/shards")
    manifest = prepare(source, remote)
    assert s3.keys(bucket) == [f"shards/{name}" for name in (MANIFEST, "part-00000.parquet", "part-00001.parquet")]
    assert manifest == prepare(source, Folder.at(tmp_path / "local"))
    remote.delete(MANIFEST)
    remote.delete("part-00001.parquet")
    assert prepare(source, remote) == manifest


def test_an_error_leaves_no_half_part_in_a_bucket_and_shows_none_on_the_way(s3: ObjectStore, bucket: str) -> None:
    """pyarrow completes an object when its stream is closed, by an error as well; versions keep what was ever seen."""
    s3.client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    with pytest.raises(DataError):
        prepare(source_of(few_files() | {"test/dog/2.png": b"bad"}), s3.folder(f"{bucket}/shards"))
    seen = s3.client.list_object_versions(Bucket=bucket).get("Versions", [])
    assert [version["Key"] for version in seen if version["Key"].endswith(".parquet")] == []


def test_a_place_that_cannot_be_written_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StorageError) as error:
        prepare(source_of(few_files()), Folder.at(tmp_path / "file" / "shards"))
    assert str(tmp_path / "file" / "shards") in one_line(error)


def test_a_part_cannot_be_read_without_its_notes(tmp_path: Path) -> None:
    """A part of unknown origin under our name is replaced, not trusted."""
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "part-00000.parquet")
    manifest: Manifest = prepare(source_of(few_files()), Folder.at(tmp_path))
    assert manifest.parts[0].rows == 12
    assert json.loads((tmp_path / MANIFEST).read_text())["schema"] == 1
