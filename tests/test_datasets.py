"""Datasets in their published layouts: what is listed, in which role and order, and every fault in one line."""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from object_store import ObjectStore
from PIL import Image
from sklearn.datasets import load_digits

from conftest import SHARED_DATA
from dataset_layouts import (
    SMALL1,
    SMALL1_ALPHABETS,
    SMALL2,
    SMALL2_ALPHABETS,
    omniglot_set,
    photograph,
    structs,
    write_cars196,
    write_cars196_devkit,
    write_cub200,
    write_inshop,
    write_mat,
    write_omniglot_small,
    write_omniglot_whole,
    write_sop,
    write_zip,
)
from dataset_listing import fault, needs, roles, source_of
from eat_dist.config import DataConfig
from eat_dist.data.datasets import DATASETS
from eat_dist.data.datasets.layout import Files
from eat_dist.errors import ConfigError, DataError, StorageError

WRITERS: dict[str, Callable[[Path], Path]] = {
    "omniglot": write_omniglot_small,
    "cub200": write_cub200,
    "cars196": write_cars196,
    "inshop": write_inshop,
    "sop": write_sop,
}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


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


# Omniglot


def test_the_small_sets_are_listed_by_path_and_tested_on_alphabets_that_are_not_trained_on(tmp_path: Path) -> None:
    source = source_of("omniglot", write_omniglot_small(tmp_path))
    new = [alphabet for alphabet in SMALL2_ALPHABETS if alphabet not in SMALL1_ALPHABETS]
    expected = sorted(omniglot_set(SMALL1, SMALL1_ALPHABETS)) + sorted(omniglot_set(SMALL2, new))
    assert [item.name for item in source.items] == expected
    assert source.class_names(train=True) == tuple(f"{alphabet}/character01" for alphabet in SMALL1_ALPHABETS)
    assert source.class_names(train=False) == tuple(f"{alphabet}/character01" for alphabet in new)
    assert (source.channels, source.image_size, source.resize) == (1, 28, 28)
    assert source.inverted
    assert source.small
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{SMALL1}.zip", f"{SMALL2}.zip"]


def test_other_entries_of_an_omniglot_archive_are_passed_over(tmp_path: Path) -> None:
    expected = source_of("omniglot", write_omniglot_small(tmp_path)).items
    others = [f"{SMALL1}/", f"{SMALL1}/readme.txt", f"__MACOSX/{SMALL1}/Korean/character01/._0001_01.png"]
    files = omniglot_set(SMALL1, SMALL1_ALPHABETS)
    write_zip(tmp_path / f"{SMALL1}.zip", {**dict(reversed(files.items())), **dict.fromkeys(others, b"")})
    assert source_of("omniglot", tmp_path).items == expected


@pytest.mark.parametrize("below", ["", "omniglot-py"])
def test_all_of_omniglot_is_read_as_torchvision_unpacks_it(tmp_path: Path, below: str) -> None:
    write_omniglot_whole(tmp_path / below)
    source = source_of("omniglot", tmp_path)
    assert roles(source) == {"train": 12, "test": 12}
    assert source.class_names(train=False)[0] == "Angelic/character01"
    assert source.items[0].name == "images_background/Greek/character01/0001_01.png"
    assert Image.open(io.BytesIO(source.read(source.items[-1].name))).size == (105, 105)
    assert not source.small


def test_all_of_omniglot_in_archives_lists_the_same_as_in_folders(tmp_path: Path) -> None:
    folders = source_of("omniglot", write_omniglot_whole(tmp_path / "folders"))
    contents = {item.name: folders.read(item.name) for item in folders.items}
    for stem in ("images_background", "images_evaluation"):
        part = {name: content for name, content in contents.items() if name.startswith(f"{stem}/")}
        write_zip(tmp_path / "archives" / f"{stem}.zip", part)
    archives = source_of("omniglot", tmp_path / "archives")
    assert archives.items == folders.items
    assert {item.name: archives.read(item.name) for item in archives.items} == contents


def test_the_small_sets_are_taken_where_all_of_omniglot_is_too(tmp_path: Path) -> None:
    expected = source_of("omniglot", write_omniglot_small(tmp_path)).items
    assert source_of("omniglot", write_omniglot_whole(tmp_path)).items == expected


def test_all_of_omniglot_has_the_published_counts(tmp_path: Path) -> None:
    characters = [f"Alphabet/character{number:03}" for number in range(964)]
    others = [f"Other/character{number:03}" for number in range(659)]
    for stem, classes in (("images_background", characters), ("images_evaluation", others)):
        drawings = [f"{stem}/{name}/{number:02}.png" for name in classes for number in range(20)]
        write_zip(tmp_path / f"{stem}.zip", dict.fromkeys(drawings, b""))
    assert roles(source_of("omniglot", tmp_path, subset=False)) == {"train": 19_280, "test": 13_180}


@pytest.mark.parametrize("missing", [SMALL1, SMALL2])
def test_a_missing_set_is_named_with_where_to_get_it(tmp_path: Path, missing: str) -> None:
    (write_omniglot_small(tmp_path) / f"{missing}.zip").unlink()
    message = fault("omniglot", tmp_path)
    assert f"'{tmp_path}/{missing}.zip'" in message
    assert "brendenlake/omniglot" in message


def test_an_archive_that_points_out_of_itself_is_refused(tmp_path: Path) -> None:
    write_omniglot_small(tmp_path)
    write_zip(tmp_path / f"{SMALL2}.zip", {"../../outside.png": photograph()})
    assert "'../../outside.png'" in fault("omniglot", tmp_path)


@needs("omniglot")
def test_the_published_small_sets_give_136_and_106_characters_of_20_drawings() -> None:
    source = source_of("omniglot", SHARED_DATA / "omniglot", subset=False)
    assert roles(source) == {"train": 2720, "test": 2120}
    assert set(Counter(item.class_name for item in source.items).values()) == {20}
    assert source.class_names(train=True)[0] == "Balinese/character01"
    alphabets = {name.split("/")[0] for name in source.class_names(train=False)}
    assert alphabets == {"Japanese_(katakana)", "Sanskrit", "Tagalog"}


# CUB-200-2011


def test_cub_trains_on_the_lower_half_of_the_classes_by_number(tmp_path: Path) -> None:
    source = source_of("cub200", write_cub200(tmp_path, classes=5))
    assert source.class_names(train=True) == ("001.Bird_1", "002.Bird_2")
    assert source.class_names(train=False) == ("003.Bird_3", "004.Bird_4", "005.Bird_5")
    assert source.items[0].name == "images/001.Bird_1/Bird_0000.jpg"
    assert (source.channels, source.image_size, source.resize) == (3, 224, 256)
    assert not source.inverted
    assert not source.small


def test_cub_may_be_given_by_the_folder_that_contains_it(tmp_path: Path) -> None:
    inside = source_of("cub200", write_cub200(tmp_path))
    outside = source_of("cub200", tmp_path)
    assert (inside.items, inside.stamp) == (outside.items, outside.stamp)


def test_cub_with_the_published_counts_is_split_at_class_100_without_a_warning(tmp_path: Path) -> None:
    # 5,864 images of the first hundred classes, 5,924 of the others; empty files, for listing opens none.
    root = tmp_path / "CUB_200_2011"
    per_class = [58 + (number < 64) for number in range(100)] + [59 + (number < 24) for number in range(100)]
    names = [f"{number:03}.Bird" for number in range(1, 201)]
    paths = [f"{name}/{index}.jpg" for name, count in zip(names, per_class, strict=True) for index in range(count)]
    for name in names:
        (root / "images" / name).mkdir(parents=True)
    for path in paths:
        (root / "images" / path).touch()
    for file, values in (
        ("images.txt", paths),
        ("image_class_labels.txt", [int(path[:3]) for path in paths]),
        ("classes.txt", names),
    ):
        (root / file).write_text("".join(f"{index} {value}\n" for index, value in enumerate(values, start=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = DATASETS["cub200"](DataConfig(dataset="cub200", root=str(root)))
    assert roles(source) == {"train": 5864, "test": 5924}
    assert source.class_names(train=False)[0] == "101.Bird"


@pytest.mark.parametrize("missing", ["images.txt", "image_class_labels.txt", "classes.txt"])
def test_a_missing_list_of_cub_is_named(tmp_path: Path, missing: str) -> None:
    (write_cub200(tmp_path) / missing).unlink()
    assert missing in fault("cub200", tmp_path)


def test_a_cub_image_without_a_class_is_named(tmp_path: Path) -> None:
    replace(write_cub200(tmp_path) / "image_class_labels.txt", "2 1\n", "")
    assert "image 2 of" in fault("cub200", tmp_path)


@needs("cub_mini")
def test_a_part_of_cub_with_ten_classes_trains_on_five() -> None:
    source = source_of("cub200", SHARED_DATA / "cub_mini")
    assert len(source.items) == 294
    assert [name[:3] for name in source.class_names(train=True)] == ["001", "002", "003", "004", "005"]
    assert [name[:3] for name in source.class_names(train=False)] == ["006", "007", "008", "009", "010"]


# Cars-196


def test_cars_are_split_by_class_over_both_of_the_archives_own_parts(tmp_path: Path) -> None:
    source = source_of("cars196", write_cars196(tmp_path))
    assert source.class_names(train=True) == ("001.Maker C/V Model 1", "002.Maker C/V Model 2")
    assert source.class_names(train=False) == ("003.Maker C/V Model 3", "004.Maker C/V Model 4")
    assert [item.name for item in source.items] == [f"car_ims/{number:06}.jpg" for number in range(1, 13)]


@pytest.mark.parametrize("below", ["", "stanford_cars"])
@pytest.mark.parametrize("labels_in", ["", "devkit"])
def test_the_development_kit_of_cars_has_the_same_split(tmp_path: Path, below: str, labels_in: str) -> None:
    root = write_cars196_devkit(tmp_path / below)
    (root / "cars_test_annos_withlabels.mat").rename(root / labels_in / "cars_test_annos_withlabels.mat")
    source = source_of("cars196", tmp_path)
    assert source.class_names(train=True) == ("001.Maker C/V Model 1", "002.Maker C/V Model 2")
    assert Counter(item.name.split("/")[0] for item in source.items) == {"cars_train": 8, "cars_test": 8}
    assert roles(source) == {"train": 8, "test": 8}


def test_the_development_kit_without_test_labels_says_which_file_to_get(tmp_path: Path) -> None:
    labelled = write_cars196_devkit(tmp_path) / "cars_test_annos_withlabels.mat"
    labelled.unlink()
    assert "there is no cars_test_annos_withlabels.mat" in fault("cars196", tmp_path)
    shutil.copy(tmp_path / "devkit/cars_test_annos.mat", labelled)
    assert f"'{labelled}' is not a list of images: each of its annotations must have fname and class" in fault(
        "cars196", tmp_path
    )


@pytest.mark.parametrize("content", [b"", b"no matrix", photograph()], ids=["empty", "text", "image"])
def test_what_is_no_matlab_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = write_cars196(tmp_path) / "cars_annos.mat"
    path.write_bytes(content)
    assert f"'{path}' is not a whole MATLAB file" in fault("cars196", tmp_path)


def test_a_damaged_matlab_file_is_one_data_error_or_none(tmp_path: Path) -> None:
    path = write_cars196(tmp_path) / "cars_annos.mat"
    whole, numbers, faults = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        content = bytearray(whole)
        content[numbers.integers(len(whole))] ^= int(numbers.integers(1, 256))
        path.write_bytes(content[: numbers.integers(len(whole)) if numbers.integers(2) else None])
        try:
            source_of("cars196", tmp_path)
        except DataError:
            faults += 1
    assert faults > 50


@pytest.mark.parametrize("missing", ["annotations", "class_names"])
def test_a_matlab_file_without_a_variable_is_named(tmp_path: Path, missing: str) -> None:
    variables = {
        "annotations": structs([{"relative_im_path": "car_ims/000001.jpg", "class": 1}]),
        "class_names": np.array([["a"]], dtype=object),
    }
    write_mat(tmp_path / "cars_annos.mat", **{name: value for name, value in variables.items() if name != missing})
    assert f"cars_annos.mat' has no {missing}" in fault("cars196", tmp_path)


def test_a_car_of_a_class_without_a_name_is_an_error(tmp_path: Path) -> None:
    names = np.array([["a", "b"]], dtype=object)
    write_mat(write_cars196_devkit(tmp_path) / "devkit/cars_meta.mat", class_names=names)
    assert "class 3 in" in fault("cars196", tmp_path)


# In-Shop


def test_inshop_has_queries_and_a_gallery_and_an_item_is_one_class_in_all_category_folders(tmp_path: Path) -> None:
    source = source_of("inshop", write_inshop(tmp_path))
    assert roles(source) == {"train": 8, "query": 4, "gallery": 4}
    assert source.class_names(train=True) == ("id_00000001", "id_00000002")
    assert source.class_names(train=False) == ("id_00000003", "id_00000004")
    of_first = [item.name for item in source.items if item.class_name == "id_00000001"]
    assert {name.split("/")[1] for name in of_first} == {"MEN", "WOMEN"}
    assert all(name.startswith("img/") for name in of_first)


@pytest.mark.parametrize("list_in", ["", "Eval", "Anno"])
@pytest.mark.parametrize("images_in", ["", "Img"])
def test_inshop_is_found_where_the_download_puts_its_parts(tmp_path: Path, list_in: str, images_in: str) -> None:
    expected = source_of("inshop", write_inshop(tmp_path / "a")).items
    other = tmp_path / "b"
    for part in (list_in, images_in):
        (other / part).mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "a/Eval/list_eval_partition.txt", other / list_in)
    shutil.move(tmp_path / "a/img", other / images_in)
    source = source_of("inshop", other)
    assert source.items == expected
    assert source.read(expected[0].name)


@pytest.mark.parametrize(("line", "number"), [("16\n", 1), ("image_name item_id evaluation_status\n", 2)])
def test_inshop_without_one_of_its_two_header_lines_does_not_lose_an_image(
    tmp_path: Path, line: str, number: int
) -> None:
    path = write_inshop(tmp_path) / "Eval/list_eval_partition.txt"
    replace(path, line, "")
    message = fault("inshop", tmp_path)
    assert f"line {number} of '{path}'" in message
    assert "expected the header" in message


def test_inshop_in_high_resolution_only_is_told_which_images_are_read(tmp_path: Path) -> None:
    root = write_inshop(tmp_path)
    (root / "img").rename(root / "img_highres")
    message = fault("inshop", root)
    assert f"there is no img in '{root}'" in message
    assert "img_highres is not read" in message


def test_inshop_without_a_gallery_is_an_error(tmp_path: Path) -> None:
    path = write_inshop(tmp_path) / "Eval/list_eval_partition.txt"
    path.write_text(path.read_text().replace("gallery", "query  "))
    assert "needs queries and a gallery" in fault("inshop", tmp_path)


def test_an_item_to_train_on_and_to_test_on_is_named(tmp_path: Path) -> None:
    replace(write_inshop(tmp_path) / "Eval/list_eval_partition.txt", "id_00000003 query", "id_00000001 query")
    assert "training and test classes must differ; 1 is in both, e.g. 'id_00000001'" in fault("inshop", tmp_path)


# Stanford Online Products


def test_products_are_split_as_the_two_lists_say(tmp_path: Path) -> None:
    source = source_of("sop", write_sop(tmp_path))
    assert roles(source) == {"train": 6, "test": 6}
    assert source.class_names(train=True) == ("1", "2")
    assert source.class_names(train=False) == ("3", "4")
    assert source.items[0].name == "chair_final/1111_0.JPG"
    assert source_of("sop", tmp_path).stamp == source.stamp


def test_a_product_in_both_lists_is_named(tmp_path: Path) -> None:
    replace(write_sop(tmp_path) / "Ebay_test.txt", " 3 3 chair", " 2 3 chair")
    assert "1 is in both, e.g. '2'" in fault("sop", tmp_path)


def test_a_list_of_products_without_its_header_is_an_error(tmp_path: Path) -> None:
    path = write_sop(tmp_path) / "Ebay_test.txt"
    replace(path, "image_id class_id super_class_id path\n", "")
    assert f"line 1 of '{path}'" in fault("sop", tmp_path)


def test_a_missing_test_list_of_products_is_named(tmp_path: Path) -> None:
    (write_sop(tmp_path) / "Ebay_test.txt").unlink()
    assert "Ebay_test.txt" in fault("sop", tmp_path)
