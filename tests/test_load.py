"""From config to data: small sets are decoded, others prepared once into the cache, and workers only open."""

from __future__ import annotations

import itertools
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from eat_dist.config import DataConfig
from eat_dist.data.datasets import DATASETS
from eat_dist.data.decode import decode_image, to_tensor
from eat_dist.data.images import LabelledImages
from eat_dist.data.load import load_dataset, with_shards
from eat_dist.data.prepare import prepare
from eat_dist.data.shards import ShardImages
from eat_dist.errors import ConfigError, DataError, StorageError
from eat_dist.storage import Folder
from small_sources import encoded, few_files, one_line, picture, write_files


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A dataset of folders of images, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_files(tmp_path, few_files())
    return DataConfig(
        dataset="folder", root=str(tmp_path / "train"), test_root=str(tmp_path / "test"), image_size=8, resize=8
    )


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "eat_dist" / "shards").glob("*"))


# Small sets


@pytest.mark.parametrize("size", [8, 16])
def test_digits_are_decoded_into_memory_as_pillow_scales_them(size: int) -> None:
    data = load_dataset(DataConfig(dataset="digits", image_size=size))
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for images, class_names in ((data.train, "01234"), (data.test, "56789")):
        assert isinstance(images, LabelledImages)
        assert images.class_names == tuple(class_names)
        rows = [row for row, digit in enumerate(digits.target) if str(digit) in class_names]
        scaled = [Image.fromarray(pixels[row]).resize((size, size), Image.Resampling.BILINEAR) for row in rows]
        assert torch.equal(images.images, torch.stack([to_tensor(image) for image in scaled]))
        assert [images.class_names[label] for label in images.labels] == [str(digits.target[row]) for row in rows]
        assert images.is_query is None
    assert (data.resize, data.inverted, data.skipped) == (size, False, ())


def omniglot(root: Path, *, bad: tuple[str, ...] = ()) -> DataConfig:
    """Two characters of three drawings in each of the two archives."""
    for stem, alphabets in (
        ("images_background_small1", ("Greek", "Latin")),
        ("images_background_small2", ("Tagalog",)),
    ):
        with zipfile.ZipFile(root / f"{stem}.zip", "w") as archive:
            for alphabet, character, drawing in itertools.product(alphabets, (1, 2), (1, 2, 3)):
                name = f"{stem}/{alphabet}/character{character:02}/{drawing:02}.png"
                content = encoded(picture(drawing, height=30, width=30, mode="L"))
                archive.writestr(name, b"bad" if name in bad else content)
    return DataConfig(dataset="omniglot", root=str(root), subset=True)


@pytest.mark.filterwarnings("ignore:.*subset")
def test_a_small_set_is_scaled_first_and_inverted_then(tmp_path: Path) -> None:
    data = load_dataset(omniglot(tmp_path))
    assert data.inverted
    scaled = picture(1, height=30, width=30, mode="L").resize((28, 28), Image.Resampling.BILINEAR)
    assert isinstance(data.test, LabelledImages)
    assert torch.equal(data.test.images[0], 255 - to_tensor(scaled))


@pytest.mark.filterwarnings("ignore:.*subset")
def test_a_bad_image_of_a_small_set_stops_loading_or_is_skipped_and_its_class_stays(tmp_path: Path) -> None:
    bad = tuple(f"images_background_small1/Greek/character02/0{drawing}.png" for drawing in (1, 2, 3))
    with pytest.raises(DataError) as error:
        load_dataset(omniglot(tmp_path, bad=bad[:1]))
    assert f"'{bad[0]}'" in one_line(error)
    assert "3 others were checked" in one_line(error)
    data = load_dataset(omniglot(tmp_path, bad=bad[:1]).model_copy(update={"on_bad_image": "skip"}))
    assert data.skipped == bad[:1]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    with pytest.raises(DataError, match="'Greek/character02' has no image"):
        load_dataset(omniglot(tmp_path, bad=bad).model_copy(update={"on_bad_image": "skip"}))


def test_a_small_set_has_no_shards_but_may_be_given_some(tmp_path: Path) -> None:
    config = DataConfig(dataset="digits")
    assert with_shards(config) == config
    prepare(DATASETS["digits"](config), Folder.at(tmp_path))
    from_shards = load_dataset(DataConfig(dataset="digits", shards=str(tmp_path))).train
    assert isinstance(from_shards, ShardImages)
    decoded = load_dataset(config).train
    order = [from_shards.names.index(name) for name in decoded.names]
    assert torch.equal(from_shards.batch(np.array(order), "cpu").images, decoded.batch(np.arange(901), "cpu").images)


def test_an_unknown_dataset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="omniglot"):
        load_dataset(DataConfig(dataset="omniglott"))


# The cache


def test_a_dataset_is_prepared_once_and_opened_from_then_on(config: DataConfig, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    data = load_dataset(config, on_progress=lambda *done: progress.append(done))
    assert progress[-1] == (12, 12)
    assert len(entries(tmp_path)) == 1
    assert entries(tmp_path)[0].name.startswith("folder-")
    again = load_dataset(config, on_progress=lambda *done: pytest.fail("prepared again"))
    assert again.train.digest() == data.train.digest()
    wanted = decode_image(few_files()["train/ant/0.png"], name="", channels=3)
    assert torch.equal(data.train.stored(data.train.names.index("train/ant/0.png")), to_tensor(wanted))


def test_a_file_that_changes_in_place_gives_new_shards(config: DataConfig, tmp_path: Path) -> None:
    before = load_dataset(config).train
    changed = tmp_path / "train" / "ant" / "0.png"
    changed.write_bytes(encoded(picture(99)))
    os.utime(changed, ns=(1, 1))
    after = load_dataset(config).train
    assert before.digest() != after.digest()
    assert len(entries(tmp_path)) == 2


def test_workers_get_the_absolute_path_of_shards_that_are_there(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_workers = with_shards(config)
    assert of_workers == config.model_copy(update={"shards": str(entries(tmp_path)[0])})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))  # nor does a worker look for the original files
    (tmp_path / "train").rename(tmp_path / "moved")
    assert load_dataset(of_workers).train.digest()
    assert not (tmp_path / "another").exists()


def test_given_shards_are_made_absolute_and_urls_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_shards(DataConfig(dataset="folder", shards="here")).shards == str(tmp_path / "here")
    url = "s3://bucket/here?region=us-east-1"
    assert with_shards(DataConfig(dataset="folder", shards=url)).shards == url


def test_shards_that_this_machine_does_not_see_are_named(config: DataConfig) -> None:
    with pytest.raises(DataError) as error:
        load_dataset(config.model_copy(update={"shards": "/not/here"}))
    assert "must be on storage that every node sees" in one_line(error)


def test_a_cache_that_cannot_be_written_says_how_to_use_another(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError) as error:
        load_dataset(config)
    assert "set XDG_CACHE_HOME" in one_line(error)


# Bad images


def test_a_bad_image_stops_loading_or_is_skipped_also_after_the_other_was_tried(
    config: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"bad")
    skipping = config.model_copy(update={"on_bad_image": "skip"})
    for _ in range(2):
        with pytest.raises(DataError) as error:
            load_dataset(config)
        assert "'train/ant/0.png'" in one_line(error)
        assert "data.on_bad_image" in one_line(error)
        data = load_dataset(skipping)
        assert data.skipped == ("train/ant/0.png",)
        assert len(data.train) == 5
    assert len(entries(tmp_path)) == 1
