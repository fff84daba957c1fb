"""What holds for every dataset in its published layout, faults in one line among it; and the digits."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from object_store import ObjectStore
from PIL import Image
from sklearn.datasets import load_digits

from dataset_layouts import (
    photograph,
    replace,
    write_cars196,
    write_cub200,
    write_inshop,
    write_omniglot_small,
    write_sop,
)
from dataset_listing import fault, roles, source_of
from eat_dist.config import DataConfig
from eat_dist.data.datasets import DATASETS
from eat_dist.data.datasets.layout import Files
from eat_dist.errors import ConfigError, StorageError

WRITERS: dict[str, Callable[[Path], Path]] = {
    "omniglot": write_omniglot_small,
    "cub200": write_cub200,
    "cars196": write_cars196,
    "inshop": write_inshop,
    "sop": write_sop,
}

# All datasets


def test_all_datasets_are_registered_and_an_unknown_one_lists_them() -> None:
    assert {"digits", "folder", *WRITERS} == set(DATASETS)
    with pytest.raises(ConfigError, match=r"known: cars196, cub200, .*Did you mean 'omniglot'"):
        DATASETS["omniglott"]


@pytest.mark.parametrize("dataset", WRITERS)
def test_listing_is_the_same_every_time_and_every_image_can_be_read(tmp_path: Path, dataset: str) -> None:
    root = WRITERS[dataset](tmp_path)
    source = source_of(dataset, root)
    assert source.dataset == dataset
    for item in source.items:
        Image.open(io.BytesIO(source.read(item.name))).load()
    again = source_of(dataset, root)
    assert (again.items, again.stamp) == (source.items, source.stamp)


@pytest.mark.parametrize("dataset", WRITERS)
def test_the_root_may_be_a_url(tmp_path: Path, dataset: str) -> None:
    root = WRITERS[dataset](tmp_path)
    source = source_of(dataset, root.as_uri())
    assert (source.items, source.stamp) == ((local := source_of(dataset, root)).items, local.stamp)


@pytest.mark.parametrize("dataset", WRITERS)
def test_the_stamp_changes_with_an_image(tmp_path: Path, dataset: str) -> None:
    root = WRITERS[dataset](tmp_path)
    before = source_of(dataset, root).stamp
    changed = next(path for path in root.rglob("*") if path.suffix.lower() in {".jpg", ".zip"})
    os.utime(changed, ns=(0, 1_000_000_000))
    assert source_of(dataset, root).stamp != before


@pytest.mark.parametrize("dataset", WRITERS)
def test_without_root_the_message_says_what_to_set(dataset: str) -> None:
    assert f"the dataset '{dataset}' needs data.root: the folder" in fault(dataset)


@pytest.mark.parametrize("dataset", WRITERS)
def test_an_empty_or_missing_root_is_named(tmp_path: Path, dataset: str) -> None:
    assert f"'{tmp_path}'" in fault(dataset, tmp_path)
    assert "not-there" in fault(dataset, tmp_path / "not-there")


@pytest.mark.parametrize(
    ("dataset", "published"),
    [
        ("omniglot", ("2,720", "2,120", "136", "106")),
        ("cub200", ("5,864", "5,924", "100")),
        ("cars196", ("8,054", "8,131", "98")),
        ("inshop", ("25,882", "3,997", "14,218", "12,612", "3,985")),
        ("sop", ("59,551", "11,318", "60,502", "11,316")),
    ],
)
def test_other_counts_than_the_published_are_an_error_and_of_a_subset_a_warning(
    tmp_path: Path, dataset: str, published: tuple[str, ...]
) -> None:
    root = WRITERS[dataset](tmp_path)
    message = fault(dataset, root, subset=False)
    assert all(f" instead of {count}" in message for count in published), message
    assert "data.subset" in message
    with pytest.warns(UserWarning, match=f"the dataset '{dataset}' has .* taken as a subset"):
        DATASETS[dataset](DataConfig(dataset=dataset, root=str(root), subset=True))


@pytest.mark.parametrize("dataset", ["cub200", "cars196", "inshop", "sop"])
def test_listed_images_that_do_not_exist_are_named(tmp_path: Path, dataset: str) -> None:
    root = WRITERS[dataset](tmp_path)
    name = source_of(dataset, root).items[1].name
    (root / name).unlink()
    assert f"'{name}'" in fault(dataset, root)


@pytest.mark.parametrize("dataset", ["cub200", "sop"])
def test_an_image_listed_twice_is_named(tmp_path: Path, dataset: str) -> None:
    root = WRITERS[dataset](tmp_path)
    first, second = (item.name.removeprefix("images/") for item in source_of(dataset, root).items[:2])
    replace(root / {"cub200": "images.txt", "sop": "Ebay_train.txt"}[dataset], second, first)
    assert f"{first}' more than once" in fault(dataset, root)


@pytest.mark.parametrize(
    ("dataset", "file", "line", "form"),
    [
        ("cub200", "images.txt", 2, "<image id> <path>"),
        ("cub200", "image_class_labels.txt", 3, "<image id> <class id>"),
        ("cub200", "classes.txt", 1, "<class id> <class name>"),
        ("inshop", "Eval/list_eval_partition.txt", 4, "img/<path> <item id> train|query|gallery"),
        ("sop", "Ebay_test.txt", 3, "<image id> <class id> <super class id> <path>"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(
    tmp_path: Path, dataset: str, file: str, line: int, form: str
) -> None:
    path = WRITERS[dataset](tmp_path) / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[: line - 1], "nonsense", *lines[line:]]))
    assert fault(dataset, tmp_path) == f"line {line} of '{path}' is 'nonsense'; expected '{form}'"


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = write_cub200(tmp_path) / "images.txt"
    path.write_bytes(photograph())
    assert f"'{path}' is not a text file" in fault("cub200", tmp_path)


@pytest.mark.parametrize("edit", ["\ufeff{}", "{}\n\n", "crlf"])
def test_a_byte_order_mark_empty_lines_and_windows_line_ends_do_not_matter(tmp_path: Path, edit: str) -> None:
    root = write_sop(tmp_path)
    expected = source_of("sop", root).items
    for path in root.glob("*.txt"):
        text = path.read_text()
        content = text.replace("\n", "\r\n") if edit == "crlf" else edit.format(text)
        path.write_bytes(content.encode())
    assert source_of("sop", root).items == expected


def test_a_folder_in_a_bucket_is_listed_and_read(s3: ObjectStore, bucket: str) -> None:
    remote = s3.folder(f"{bucket}/data")
    remote.write("a/1.jpg", b"one")
    files = Files.of_folder(remote).under("images")
    assert list(files.stamps) == ["images/a/1.jpg"]
    assert files.read("images/a/1.jpg") == b"one"
    remote.delete("a/1.jpg")
    with pytest.raises(StorageError, match=r"cannot read .*a/1\.jpg.*: No such file"):
        files.read("images/a/1.jpg")


# Digits


def test_digits_are_scikit_learns_scaled_to_bytes_and_split_by_class() -> None:
    source, original = source_of("digits"), load_digits()
    assert roles(source) == {"train": 901, "test": 896}
    assert source.class_names(train=True) == ("0", "1", "2", "3", "4")
    assert source.class_names(train=False) == ("5", "6", "7", "8", "9")
    assert (source.channels, source.image_size, source.inverted, source.small) == (1, 8, False, True)
    rows = [int(item.name.removeprefix("digits/")) for item in source.items]
    assert rows == [*np.flatnonzero(original.target < 5), *np.flatnonzero(original.target >= 5)]
    # 0 → 0, 8 → 127.5 → 128 (to even), 16 → 255.
    scale = np.array([round(value * 255 / 16) for value in range(17)])
    assert scale[[0, 8, 16]].tolist() == [0, 128, 255]
    for row, item in zip(rows, source.items, strict=True):
        assert item.class_name == str(original.target[row])
        pixels = np.asarray(Image.open(io.BytesIO(source.read(item.name))))
        assert np.array_equal(pixels, scale[original.images[row].astype(int)])


def test_digits_warn_that_root_has_no_effect() -> None:
    with pytest.warns(UserWarning, match=r"data\.root has no effect"):
        source_of("digits", "somewhere")
