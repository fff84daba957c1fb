"""Validation classes come out of the training classes, and nothing of the test classes is looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset_layouts import write_inshop
from eat_dist.config import DataConfig
from eat_dist.data import load
from eat_dist.data.datasets import DATASETS
from eat_dist.data.images import LabelledImages, ZeroShotData
from eat_dist.data.load import load_dataset
from eat_dist.data.prepare import prepare
from eat_dist.data.shards import ShardImages
from eat_dist.data.source import Source
from eat_dist.data.validation import held_out
from eat_dist.errors import DataError
from eat_dist.storage import Folder
from small_runs import largest_difference, small_config, train_locally, weights
from small_sources import encoded, one_line, picture, source_of


def photographs(folder: Path, *, classes: int = 6) -> DataConfig:
    """Shards of ``classes`` training and three test classes with four images each."""
    files = {
        f"{role}/{role}{number}/{i}.png": encoded(picture(hash((number, i)) % 1000))
        for role, count in (("train", classes), ("test", 3))
        for number in range(count)
        for i in range(4)
    }
    prepare(source_of(files), Folder.at(folder), on_bad_image="error")
    return DataConfig(dataset="folder", shards=str(folder), image_size=6, resize=8)


def inshop(folder: Path) -> DataConfig:
    write_inshop(folder, classes=5)
    return DataConfig(dataset="inshop", root=str(folder), subset=True, image_size=8, resize=8)


def with_share(config: DataConfig, share: float, seed: int = 0) -> DataConfig:
    return config.model_copy(update={"validation_share": share, "validation_seed": seed})


def check_apart(whole: ZeroShotData, part: ZeroShotData) -> None:
    """What a validation run sees is the training set, in two parts without a class or an image in common."""
    assert set(part.train.class_names) | set(part.test.class_names) == set(whole.train.class_names)
    assert set(part.train.class_names).isdisjoint(part.test.class_names)
    assert set(part.test.class_names).isdisjoint(whole.test.class_names)
    assert sorted(part.train.names + part.test.names) == sorted(whole.train.names)
    assert not (set(part.train.names) | set(part.test.names)) & set(whole.test.names)


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("kind", ["digits", "photographs"])
def test_a_validation_run_sees_no_test_class_and_its_two_sets_share_none(
    kind: str, share: float, tmp_path: Path
) -> None:
    config = DataConfig() if kind == "digits" else photographs(tmp_path)
    whole, part = load_dataset(config), load_dataset(with_share(config, share))

    check_apart(whole, part)
    assert type(part.train) is (LabelledImages if kind == "digits" else ShardImages)
    assert part.test.num_classes == max(2, round(share * whole.train.num_classes))
    for images in (part.train, part.test):
        chosen = [whole.train.names.index(name) for name in images.names]
        assert [images.class_names[label] for label in images.labels] == [
            whole.train.class_names[label] for label in whole.train.labels[chosen]
        ]
        everything = np.arange(len(images))
        assert torch.equal(images.batch(everything, "cpu").images, whole.train.batch(np.array(chosen), "cpu").images)
        assert torch.equal(images.stored(1), whole.train.stored(chosen[1]))
        assert torch.equal(images.sizes, whole.train.sizes[chosen])


def test_a_set_of_queries_and_a_gallery_is_validated_all_against_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = inshop(tmp_path / "inshop")
    whole, part = load_dataset(config), load_dataset(with_share(config, 0.4))

    check_apart(whole, part)
    assert whole.test.is_query is not None
    assert part.test.is_query is None


def test_no_test_image_of_a_small_set_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def digits_that_count(config: DataConfig) -> Source:
        source = DATASETS["digits"](config)

        def read(name: str) -> bytes:
            opened.add(name)
            return source.read(name)

        return Source(**{**source.__dict__, "read": read})

    monkeypatch.setattr(load, "DATASETS", {"digits": digits_that_count})
    opened: set[str] = set()
    test_names = set(load_dataset(DataConfig()).test.names)
    assert opened >= test_names, "a run without validation classes reads its test set"
    opened.clear()

    load_dataset(DataConfig(validation_share=0.4))

    assert opened
    assert opened.isdisjoint(test_names)


def test_every_process_holds_out_the_same_classes_and_the_seed_decides_which(tmp_path: Path) -> None:
    config = photographs(tmp_path, classes=8)
    here = [load_dataset(with_share(config, 0.5, seed)).test for seed in (0, 0, 1)]
    program = (
        "from eat_dist.config import DataConfig; from eat_dist.data.load import load_dataset; "
        f"print(load_dataset(DataConfig(dataset='folder', shards={str(tmp_path)!r}, image_size=6, resize=8, "
        "validation_share=0.5)).test.digest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()

    assert here[0].digest() == here[1].digest() == there
    assert here[0].class_names == here[1].class_names != here[2].class_names


def test_without_a_share_everything_is_as_it_was() -> None:
    config = DataConfig()

    assert config.validation_share == 0
    assert load_dataset(config).test.class_names == tuple("56789")
    assert load_dataset(config).train.digest() == load_dataset(with_share(config, 0.0, seed=7)).train.digest()
    assert load_dataset(config).train.digest() != load_dataset(with_share(config, 0.4)).train.digest()


def test_a_class_with_one_image_is_trained_on_but_never_validated(tmp_path: Path) -> None:
    images = LabelledImages(
        images=torch.zeros(9, 1, 2, 2, dtype=torch.uint8),
        labels=torch.tensor([0, 0, 1, 1, 2, 3, 3, 4, 4]),
        class_names=tuple("abcde"),
        names=tuple("012345678"),
    )
    for seed in range(20):
        train, validation = held_out(images, 0.4, seed=seed)
        assert "c" in train.class_names
        assert validation.num_classes == 2


def test_too_few_classes_are_an_error_with_the_counts() -> None:
    train = load_dataset(DataConfig()).train.of_classes([0, 1, 2])

    with pytest.raises(DataError, match="at least 2 must be left on each side") as error:
        held_out(train, 0.3, seed=0)

    assert "of 3 training classes" in one_line(error)


# Training in stretches


def test_weights_after_stretches_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    config = small_config("checkpoint.every=3")
    train_locally(config, tmp_path / "whole")

    for epoch, resumed_from in ((1, 0), (2, 5), (4, 10), (4, 20)):
        results = train_locally(config, tmp_path / "stretches", until_epoch=epoch)
        assert {result.iterations for result in results} == {5 * epoch}
        assert {result.resumed_from for result in results} == {resumed_from}
        current = weights(tmp_path / "stretches")
        if epoch < 4:
            assert largest_difference(weights(tmp_path / "whole"), current) > 0

    assert largest_difference(weights(tmp_path / "whole"), current) == 0
