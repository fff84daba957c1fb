"""Image sets in shards: the same images as the original files, everywhere, and damage named in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ObjectStore
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from eat_dist.config import DataConfig
from eat_dist.data.decode import decode_image, to_tensor
from eat_dist.data.images import ZeroShotData
from eat_dist.data.memory import available_memory, fits_in_memory, in_memory
from eat_dist.data.prepare import prepare
from eat_dist.data.shard_format import MANIFEST, read_manifest
from eat_dist.data.shards import ShardImages, open_shards
from eat_dist.data.transforms import InferenceForm
from eat_dist.errors import ConfigError, DataError
from eat_dist.storage import Folder
from small_sources import encoded, few_files, flip_byte, one_line, picture, source_of


def config(**settings: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", **settings})


def many_files() -> dict[str, bytes]:
    """300 images of different sizes in 20 row groups and two parts."""
    shapes = [(9, 12), (12, 9), (8, 8), (30, 11)]
    return {
        name: encoded(picture(seed, height=shapes[seed % 4][0], width=shapes[seed % 4][1]))
        for seed, name in enumerate(few_files(75))
    }


FILES = many_files()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once and only read."""
    path = tmp_path_factory.mktemp("shards")
    prepare(source_of(FILES), Folder.at(path))
    return path


@pytest.fixture
def own_shards(tmp_path: Path) -> Path:
    """Few images, to be damaged."""
    prepare(source_of(few_files()), Folder.at(tmp_path))
    return tmp_path


def opened(path: Path, **settings: Any) -> ZeroShotData:
    return open_shards(Folder.at(path), config(**settings))


def train_of(data: ZeroShotData) -> ShardImages:
    assert isinstance(data.train, ShardImages)
    return data.train


def expected(name: str, *, resize: int = 8, size: int = 6) -> torch.Tensor:
    return InferenceForm(resize, size)(decode_image(FILES[name], name=name, channels=3))


# The same images


def test_a_batch_has_the_original_images_in_inference_form_with_their_labels(shards: Path) -> None:
    for images in (opened(shards).train, opened(shards).test):
        assert (len(images), images.num_classes, images.image_shape) == (150, 2, (3, 6, 6))
        chosen = torch.from_numpy(np.random.default_rng(0).permutation(150)[:40])
        batch = images.batch(chosen, "cpu")
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images, torch.stack([expected(images.names[i]) for i in chosen]).float() / 255)
        names = [images.class_names[label] for label in batch.labels]
        assert names == [images.names[i].split("/")[1] for i in chosen]
        assert torch.equal(batch.indices, chosen)


def test_a_batch_may_repeat_images_and_be_given_in_numpy(shards: Path) -> None:
    images = opened(shards).train
    batch = images.batch(np.array([7, 149, 7]), "cpu").images
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch, torch.stack([expected(images.names[i]) for i in (7, 149, 7)]).float() / 255)
    assert images.batch(np.array([], dtype=np.int64), "cpu").images.shape == (0, 3, 6, 6)


def test_a_stored_image_has_all_of_its_own_pixels(shards: Path) -> None:
    images = opened(shards).train
    for index in (0, 1, 2, 3, 140):
        pixels = to_tensor(decode_image(FILES[images.names[index]], name="", channels=3))
        assert torch.equal(images.stored(index), pixels)
        assert images.sizes[index].tolist() == list(pixels.shape[1:])


def test_inverted_shards_exchange_black_and_white(tmp_path: Path, shards: Path) -> None:
    prepare(source_of(FILES, inverted=True), Folder.at(tmp_path))
    plain, inverted = opened(shards), opened(tmp_path)
    assert (plain.inverted, inverted.inverted) == (False, True)
    assert torch.equal(inverted.train.stored(3), 255 - plain.train.stored(3))
    batches = [data.train.batch(np.arange(9), "cpu").images for data in (plain, inverted)]
    assert torch.allclose(batches[0] + batches[1], torch.ones(()))


def test_the_config_overrides_the_form_and_the_resize_follows_the_image_size(shards: Path) -> None:
    for settings, resize, size in (
        ({}, 8, 6),
        ({"image_size": 9}, 12, 9),  # 9 · 8/6
        ({"resize": 7}, 7, 6),
        ({"image_size": 9, "resize": 9}, 9, 9),
    ):
        data = opened(shards, **settings)
        assert data.resize == resize
        wanted = expected(data.train.names[3], resize=resize, size=size).float() / 255
        assert torch.equal(data.train.batch(np.array([3]), "cpu").images[0], wanted)
    with pytest.raises(ConfigError, match=r"data\.resize"):
        opened(shards, resize=5)


def test_queries_and_gallery_are_told_apart(tmp_path: Path) -> None:
    prepare(source_of(few_files(roles=("train", "query", "gallery"))), Folder.at(tmp_path))
    data = opened(tmp_path)
    assert data.train.is_query is None
    assert data.test.is_query is not None
    assert data.test.is_query.tolist() == [name.startswith("query/") for name in data.test.names]
    assert data.test.is_query.sum() == 6


def test_skipped_images_are_named_by_the_opened_data(tmp_path: Path) -> None:
    source = source_of(few_files() | {"train/ant/1.png": b"bad"})
    prepare(source, Folder.at(tmp_path), on_bad_image="skip")
    assert opened(tmp_path).skipped == ("train/ant/1.png",)


# Digests and memory


def test_the_digest_depends_on_content_labels_and_form_but_not_on_the_place(tmp_path: Path, shards: Path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    prepare(source_of(FILES), Folder.at(same))
    prepare(source_of(FILES | {"train/ant/0.png": encoded(picture(999))}), Folder.at(other))
    digest = opened(shards).train.digest()
    assert opened(same).train.digest() == digest
    different = [opened(other).train, opened(shards, image_size=9).train, opened(shards).test]
    assert len({digest, *(images.digest() for images in different)}) == 4
    assert opened(other).test.digest() == opened(shards).test.digest()


def test_a_set_in_memory_has_the_same_batches_and_the_same_digest(tmp_path: Path) -> None:
    prepare(source_of(few_files(roles=("train", "query", "gallery"))), Folder.at(tmp_path))
    images = opened(tmp_path).test
    assert isinstance(images, ShardImages)
    held = in_memory(images, threads=2)
    assert held.digest() == images.digest()
    assert held.images.shape == (12, 3, 6, 6)
    mine, other = (found.batch(np.arange(12), "cpu") for found in (held, images))
    assert torch.equal(mine.images, other.images)
    assert torch.equal(mine.labels, other.labels)
    assert (held.names, held.class_names, held.image_shape) == (images.names, images.class_names, images.image_shape)
    assert held.is_query is images.is_query is not None


def test_what_fits_in_memory_is_at_most_half_of_what_is_there() -> None:
    there = available_memory()
    assert fits_in_memory(there // 4)
    assert not fits_in_memory(there)


@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_of_a_job_is_what_the_nearest_limit_leaves(tmp_path: Path, version: int) -> None:
    controllers = "memory" if version == 1 else ""
    root = tmp_path / controllers
    limit, usage = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    for group, values in {"": (900, 100), "job": (500, 300), "job/step": ("max", 200)}.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / f"memory.{limit}").write_text(f"{values[0]}\n")
        (root / group / f"memory.{usage}").write_text(f"{values[1]}\n")
        (root / group / "memory.stat").write_text("anon 7\nactive_file 20\ninactive_file 30\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:       4 kB\n")
    (tmp_path / "self" / "cgroup").write_text(f"5:cpu:/\n0:{controllers}:/job/step\n")
    assert available_memory(tmp_path, tmp_path) == 500 - 300 + 50
    (tmp_path / "self" / "cgroup").write_text("")
    assert available_memory(tmp_path, tmp_path) == 4096


# Threads and processes


def test_threads_get_the_images_that_one_gets(shards: Path) -> None:
    images = opened(shards).train
    order = np.random.default_rng(1).permutation(150)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(images.stored, order.tolist()))
        batches = list(pool.map(lambda start: images.batch(order[start : start + 30], "cpu").images, range(0, 150, 30)))
    again = opened(shards).train
    assert all(torch.equal(image, again.stored(int(index))) for image, index in zip(found, order, strict=True))
    assert torch.equal(torch.cat(batches), again.batch(order, "cpu").images)


def test_a_set_that_has_read_images_may_be_pickled_to_another_process(shards: Path) -> None:
    images = opened(shards).train
    chosen = np.random.default_rng(2).integers(0, 150, 50)
    here = images.batch(chosen, "cpu").images
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = pool.submit(images.batch, chosen, "cpu").result(timeout=120).images
    assert torch.equal(here, there)


class _Stored(Dataset[torch.Tensor]):
    def __init__(self, images: ShardImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        # Both ways in: the threads of the parent are not there after a fork.
        assert torch.equal(self.images.batch(np.array([index]), "cpu").indices, torch.tensor([index]))
        return self.images.stored(index)


def test_a_set_that_has_read_images_may_be_used_after_a_fork(shards: Path) -> None:
    images = train_of(opened(shards))
    images.batch(np.arange(40), "cpu")  # starts threads and opens files
    loader = DataLoader(_Stored(images), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(image, images.stored(index)) for index, image in enumerate(loader))


def test_in_a_bucket_the_same_images_are_read(s3: ObjectStore, bucket: str, shards: Path) -> None:
    remote = s3.folder(f"{bucket}/shards")
    prepare(source_of(FILES), remote)
    there, here = open_shards(remote, config()).train, opened(shards).train
    assert there.digest() == here.digest()
    chosen = np.arange(0, 150, 7)
    images = pickle.loads(pickle.dumps(there))
    assert torch.equal(images.batch(chosen, "cpu").images, here.batch(chosen, "cpu").images)


# What is wrong is one line


def cut(path: Path) -> None:
    (path / "part-00000.parquet").write_bytes((path / "part-00000.parquet").read_bytes()[:-1])


def of_other_schema(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"schema": 2}))


def edited(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"resize": 8', '"resize": 9'))


def with_damaged_names(path: Path) -> None:
    part = path / "part-00000.parquet"
    flip_byte(part, part.read_bytes().index(b"train/ant/0.png"))


def with_a_damaged_footer(path: Path) -> None:
    part = path / "part-00000.parquet"
    flip_byte(part, part.stat().st_size - 1)


def with_another_part(path: Path) -> None:
    """A whole part of other shards, and a manifest that has its size."""
    prepare(source_of(few_files(2)), Folder.at(path / "other"))
    (path / "other" / "part-00000.parquet").rename(path / "part-00000.parquet")
    manifest = read_manifest(Folder.at(path))
    part = replace(manifest.parts[0], bytes=(path / "part-00000.parquet").stat().st_size)
    replace(manifest, parts=(part,)).write(Folder.at(path))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: (path / MANIFEST).unlink(), "has no manifest.json"),
        (lambda path: (path / MANIFEST).write_text("{"), "is damaged: it is no manifest"),
        (lambda path: (path / MANIFEST).write_text("[]"), "is damaged: it is no manifest"),
        (of_other_schema, "has shards of schema 2; this version reads 1"),
        (edited, "manifest.json' is damaged: its SHA-256 differs"),
        (lambda path: (path / "part-00000.parquet").unlink(), "part-00000.parquet' is missing"),
        (cut, "bytes instead of"),
        (with_damaged_names, "cannot read"),
        (with_a_damaged_footer, "cannot read"),
        (with_another_part, "has 8 images instead of 12"),
    ],
    ids=["unfinished", "not JSON", "not a manifest", "schema", "edited", "missing", "cut", "names", "footer", "rows"],
)
def test_damaged_shards_are_refused(own_shards: Path, harm: Callable[[Path], Any], message: str) -> None:
    harm(own_shards)
    with pytest.raises(DataError) as error:
        opened(own_shards)
    assert message in one_line(error)
    assert str(own_shards) in one_line(error)
    assert "eat-dist data prepare" in one_line(error)


def test_a_folder_that_is_not_there_names_the_machine_and_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        opened(tmp_path / "nowhere")
    assert "every node" in one_line(error)
    assert f"there is no folder '{tmp_path}/nowhere'" in one_line(error)


def test_shards_of_another_dataset_are_refused(shards: Path) -> None:
    with pytest.raises(DataError) as error:
        opened(shards, dataset="cub200")
    assert "of the dataset 'folder', but data.dataset is 'cub200'" in one_line(error)


def test_images_stored_smaller_than_wanted_are_refused(tmp_path: Path) -> None:
    prepare(source_of(FILES), Folder.at(tmp_path), image_size=8)
    assert len(opened(tmp_path).train) == 150
    with pytest.raises(DataError) as error:
        opened(tmp_path, image_size=9)
    assert "--image-size 12" in one_line(error)


def test_a_damaged_image_is_named_with_its_part_when_it_is_read(own_shards: Path) -> None:
    part = own_shards / "part-00000.parquet"
    row = pq.read_table(part).to_pylist()[1]
    flip_byte(part, part.read_bytes().index(row["image"]) + len(row["image"]) // 2)
    images = opened(own_shards).train
    for read in (lambda: images.stored(1), lambda: images.batch(np.arange(6), "cpu")):
        with pytest.raises(DataError) as error:
            read()
        assert f"image '{row['name']}' in '{part}' is damaged" in one_line(error)
    assert images.stored(0).shape == (3, 9, 12)  # its neighbours are still there


def test_a_part_that_vanishes_while_in_use_is_a_data_error(own_shards: Path) -> None:
    images = opened(own_shards).train
    (own_shards / "part-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"cannot read .*part-00000\.parquet"):
        images.stored(0)


def test_a_grey_dataset_gives_one_channel(tmp_path: Path) -> None:
    prepare(source_of(few_files(), channels=1), Folder.at(tmp_path))
    images = opened(tmp_path).train
    assert images.image_shape == (1, 6, 6)
    wanted = decode_image(few_files()[images.names[0]], name="", channels=1)
    assert torch.equal(images.stored(0), to_tensor(wanted))
    assert isinstance(wanted, Image.Image)
