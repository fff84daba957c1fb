"""The dataset ``folder``: the user's own images, in folders and archives."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from conftest import SHARED_DATA
from dataset_layouts import (
    class_folders,
    photograph,
    write_files,
    write_zip,
)
from dataset_listing import fault, needs, roles, source_of


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Eight classes of three photographs, one of them two folders deep."""
    return write_files(tmp_path / "own", class_folders(*"abcdefg", "birds/robin"))


def test_a_class_is_the_path_of_the_folder_that_holds_its_images(own: Path) -> None:
    source = source_of("folder", own)
    assert {item.name: item.class_name for item in source.items} == {
        name: name.rpartition("/")[0] for name in class_folders(*"abcdefg", "birds/robin")
    }
    assert [item.name for item in source.items] == sorted(item.name for item in source.items)
    assert (source.channels, source.image_size, source.resize, source.small) == (3, 224, 256, False)


def test_class_seed_draws_the_training_classes_and_the_same_every_time(own: Path) -> None:
    drawn = {seed: source_of("folder", own, class_seed=seed).class_names(train=True) for seed in range(5)}
    assert len(set(drawn.values())) > 1
    assert drawn[0] == source_of("folder", own).class_names(train=True)
    assert drawn[0] == ("a", "b", "e", "f")  # and in every version: old runs must stay comparable


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.25, 2), (0.01, 2), (0.7, 6), (0.99, 6)])
def test_train_share_is_rounded_and_leaves_two_classes_to_each_set(own: Path, share: float, count: int) -> None:
    source = source_of("folder", own, train_share=share)
    assert len(source.class_names(train=True)) == count
    assert len(source.class_names(train=False)) == 8 - count


def test_two_roots_are_the_two_sets_whatever_the_share_and_seed(tmp_path: Path) -> None:
    write_files(tmp_path / "first", class_folders("a", "b"))
    write_zip(tmp_path / "second.zip", class_folders("c", "d"))
    roots = {"root": tmp_path / "first", "test_root": str(tmp_path / "second.zip")}
    source = source_of("folder", **roots)
    assert {(item.role, item.name.split("/")[0], item.class_name) for item in source.items} == {
        ("train", "train", "a"),
        ("train", "train", "b"),
        ("test", "test", "c"),
        ("test", "test", "d"),
    }
    assert source.read("train/a/0.jpg") == source.read("test/c/0.jpg") == photograph(0)
    assert source_of("folder", **roots, train_share=0.9, class_seed=7).items == source.items


def test_a_class_in_both_roots_is_named(tmp_path: Path) -> None:
    write_files(tmp_path / "first", class_folders("a", "b"))
    write_files(tmp_path / "second", class_folders("b", "c"))
    message = fault("folder", tmp_path / "first", test_root=str(tmp_path / "second"))
    assert "1 is in both, e.g. 'b'" in message


def test_a_class_in_both_roots_is_found_in_whichever_form_its_accents_are_written(tmp_path: Path) -> None:
    write_files(tmp_path / "first", class_folders("a", "\N{LATIN SMALL LETTER E WITH ACUTE}1"))
    write_files(tmp_path / "second", class_folders("e\N{COMBINING ACUTE ACCENT}1", "c"))
    message = fault("folder", tmp_path / "first", test_root=str(tmp_path / "second"))
    assert "1 is in both, e.g. '\N{LATIN SMALL LETTER E WITH ACUTE}1'" in message


def test_other_files_hidden_ones_and_leftovers_of_systems_are_passed_over(own: Path) -> None:
    expected = source_of("folder", own).items
    others = ["notes.txt", "a/Thumbs.db", "a/.x.jpg", ".git/x/1.png", "__MACOSX/a/1.jpg", "b/1.npy", "b/.DS_Store"]
    write_files(own, dict.fromkeys(others, b""))
    assert source_of("folder", own).items == expected


@pytest.mark.parametrize("way", ["up", "two links", "itself"])
def test_a_link_to_a_folder_that_it_lies_in_is_named_and_not_followed(own: Path, way: str) -> None:
    loop = own / "a/loop"
    if way == "two links":
        (own.parent / "beside").mkdir()
        loop.symlink_to("../../beside")
        loop /= "back"
    loop.symlink_to({"up": "..", "two links": "../own", "itself": "."}[way])
    assert f"'{loop}' is a link to a folder that it lies in" in fault("folder", own)


def test_links_to_folders_and_files_elsewhere_are_followed_and_one_to_nowhere_is_named(own: Path) -> None:
    write_files(own.parent / "elsewhere", class_folders("wren"))
    (own / "linked").symlink_to("../elsewhere/wren")
    (own / "a/more.JPG").symlink_to("../../elsewhere/wren/0.jpg")
    (own / "a/notes.txt").symlink_to("nowhere.txt")
    (own / "a/.hidden.jpg").symlink_to("nowhere.jpg")
    items = {item.name: item.class_name for item in source_of("folder", own).items}
    assert len(items) == 8 * 3 + 3 + 1
    assert (items["linked/0.jpg"], items["a/more.JPG"]) == ("linked", "a")
    for target in ("nowhere.jpg", "gone.jpg"):  # there is no such file; a link to itself
        (own / "b/gone.jpg").symlink_to(target)
        assert f"'{own}/b/gone.jpg' is a link that leads nowhere" in fault("folder", own)
        (own / "b/gone.jpg").unlink()


def test_suffixes_are_known_in_any_case(tmp_path: Path) -> None:
    suffixes = ("png", "JPG", "Jpeg", "webp", "bmp", "gif", "tif", "TIFF", "ppm", "pgm", "pbm")
    write_files(tmp_path, {f"{name}/1.{suffix}": b"" for name in "abcd" for suffix in suffixes})
    assert len(source_of("folder", tmp_path).items) == 4 * len(suffixes)


def test_a_top_folder_of_an_archive_is_no_part_of_the_class_names_only_if_it_holds_all(tmp_path: Path) -> None:
    below = {f"top/{name}": content for name, content in class_folders(*"abcd").items()}
    wrapped = source_of("folder", write_zip(tmp_path / "wrapped.ZIP", {**below, "readme.txt": b""}))
    assert {(item.name, item.class_name) for item in wrapped.items} >= {("top/a/0.jpg", "a")}
    mixed = source_of("folder", write_zip(tmp_path / "mixed.zip", {**below, "e/0.jpg": b""}))
    assert {item.class_name for item in mixed.items} == {"top/a", "top/b", "top/c", "top/d", "e"}
    # In "birds" itself there are images: it is a class, with four more below.
    nested = write_zip(tmp_path / "nested.zip", class_folders("birds", *(f"birds/{name}" for name in "abcd")))
    assert "birds/a" in {item.class_name for item in source_of("folder", nested).items}
    assert "top/a" in {item.class_name for item in source_of("folder", write_files(tmp_path / "x", below)).items}


def test_an_archive_may_be_given_by_url(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "own.zip", class_folders(*"abcd"))
    assert source_of("folder", path.as_uri()).stamp == source_of("folder", path).stamp


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_four_classes_cannot_be_split(tmp_path: Path, count: int) -> None:
    write_files(tmp_path, class_folders(*"abc"[:count]))
    assert f"needs at least four classes, two to train on and two to test on; it has {count}" in fault(
        "folder", tmp_path
    )


def test_one_class_in_a_root_of_its_own_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path / "first", class_folders("a", "b"))
    write_files(tmp_path / "second", class_folders("c"))
    message = fault("folder", tmp_path / "first", test_root=str(tmp_path / "second"))
    assert "the test set of 'folder' needs at least two classes; it has 1" in message


def test_a_root_without_images_or_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "needs data.root: a folder (or a zip)" in fault("folder")
    assert f"'{tmp_path}' has no images" in fault("folder", tmp_path)
    assert f"there is no folder '{tmp_path / 'none'}'" in fault("folder", tmp_path / "none")
    assert "none.zip" in fault("folder", tmp_path / "none.zip")


def test_an_image_outside_any_class_folder_is_named(own: Path) -> None:
    write_files(own, {"cover.jpg": photograph()})
    assert "the image 'cover.jpg' in" in fault("folder", own)


@needs("cifar10")
def test_an_archive_of_25_000_images_is_listed_and_read_in_place() -> None:
    source = source_of("folder", SHARED_DATA / "cifar10/cifar10_2500_per_class.zip", image_size=32, resize=32)
    assert roles(source) == {"train": 12_500, "test": 12_500}
    assert "airplane" in {*source.class_names(train=True), *source.class_names(train=False)}
    assert Image.open(io.BytesIO(source.read(source.items[-1].name))).size == (32, 32)
