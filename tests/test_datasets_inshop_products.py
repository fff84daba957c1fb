"""In-Shop and Stanford Online Products: what is listed, in which role and order, and every fault in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dataset_layouts import replace, write_inshop, write_sop
from dataset_listing import fault, roles, source_of

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
