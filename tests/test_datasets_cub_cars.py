"""CUB-200-2011 and Cars-196: what is listed, in which role and order, and every fault in one line."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import SHARED_DATA
from dataset_layouts import photograph, replace, structs, write_cars196, write_cars196_devkit, write_cub200, write_mat
from dataset_listing import fault, needs, roles, source_of
from eat_dist.config import DataConfig
from eat_dist.data.datasets import DATASETS
from eat_dist.errors import DataError

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
