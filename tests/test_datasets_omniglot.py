"""Omniglot, in small archives and whole: what is listed, in which role and order, and every fault in one line."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from conftest import SHARED_DATA
from dataset_layouts import (
    SMALL1,
    SMALL1_ALPHABETS,
    SMALL2,
    SMALL2_ALPHABETS,
    omniglot_set,
    photograph,
    write_omniglot_small,
    write_omniglot_whole,
    write_zip,
)
from dataset_listing import fault, needs, roles, source_of


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
