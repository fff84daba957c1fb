"""Looking at a dataset: counts, duplicates and damage as they are, and a picture."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eat_dist.data.contact_sheet import contact_sheet
from eat_dist.data.inspection import Inspection, inspect_shards, inspect_source
from eat_dist.data.prepare import prepare
from eat_dist.storage import Folder
from small_sources import encoded, few_files, flip_byte, picture, source_of, write_files


def section(inspection: Inspection, name: str) -> str:
    """The report's lines under a heading."""
    lines = inspection.report()
    first = next(number for number, line in enumerate(lines) if line.startswith(name))
    found = [lines[first].removeprefix(name).strip()]
    for line in lines[first + 1 :]:
        if not line.startswith((" ", name)):
            break
        found.append(line.removeprefix(name).strip())
    return "\n".join(found)


def mixed_files() -> dict[str, bytes]:
    """One bad image, a copy within and a copy across the sets, one grey and one larger one."""
    files = few_files(4)
    return files | {
        "train/ant/0.png": b"bad",
        "train/ant/1.png": encoded(picture(50, mode="L")),
        "train/ant/2.png": encoded(picture(51, height=30, width=7), "JPEG"),
        "train/wasp/0.png": files["train/wasp/1.png"],
        "test/cat/0.png": files["train/wasp/2.png"],
    }


def test_the_original_layout_is_counted_and_its_faults_named() -> None:
    found = inspect_source(source_of(mixed_files()), threads=2)
    assert section(found, "images") == "7 train, 8 test"
    assert section(found, "classes") == "2 training, of 3 to 4 (median 4) images\n2 test, of 4 images"
    assert section(found, "height") == "9 to 30 (median 9) pixels"
    assert section(found, "width") == "7 to 12 (median 12) pixels"
    assert section(found, "sizes") == "2 different, of height×width most often 9×12 (14), 30×7 (1)"
    assert section(found, "kinds") == "13 PNG RGB, 1 PNG L, 1 JPEG RGB"
    assert section(found, "duplicates").splitlines() == [
        "in both sets: 1: test/cat/0.png = train/wasp/2.png",
        "within training: 1: train/wasp/0.png = train/wasp/1.png",
        "within test: none",
    ]
    assert found.faults == ["cannot decode image 'train/ant/0.png': not a PNG, JPEG, WEBP, BMP, GIF, TIFF or PPM file"]


def test_shards_say_the_same_and_list_what_was_skipped(tmp_path: Path) -> None:
    source = source_of(mixed_files())
    prepare(source, Folder.at(tmp_path), on_bad_image="skip")
    progress: list[tuple[int, int]] = []
    found = inspect_shards(Folder.at(tmp_path), on_progress=lambda *done: progress.append(done))
    original = inspect_source(source)
    for name in ("images", "classes", "height", "width", "sizes", "kinds"):
        assert section(found, name) == section(original, name)
    assert section(found, "skipped").startswith("1: train/ant/0.png (cannot decode")
    assert section(found, "damaged") == "none"
    assert progress == [(15, 15)]


def test_a_class_without_an_image_left_is_counted() -> None:
    found = inspect_source(source_of(few_files(1) | {"train/ant/0.png": b"bad"}))
    assert section(found, "classes").startswith("2 training, of 0 to 1 (median 0) images")


@pytest.mark.parametrize("harm", ["image", "label", "missing", "cut"])
def test_all_damage_is_found_and_the_rest_still_counted(tmp_path: Path, harm: str) -> None:
    prepare(source_of(few_files(75)), Folder.at(tmp_path))
    part = tmp_path / "part-00001.parquet"
    row = pq.read_table(part).to_pylist()[3]
    if harm == "image":
        flip_byte(part, part.read_bytes().index(row["image"]) + 60)
    elif harm == "label":
        flip_byte(part, part.read_bytes().index(b"\x01\x00\x00\x00\x01\x00\x00\x00"))
    elif harm == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1])
    found = inspect_shards(Folder.at(tmp_path))
    assert found.faults
    assert all("part-00001.parquet" in fault and "\n" not in fault for fault in found.faults)
    if harm == "image":
        assert any(f"'{row['name']}'" in fault for fault in found.faults)
    assert len(found.seen) >= 256


# The picture


def test_the_contact_sheet_shows_the_same_images_every_time_and_few_of_each_class() -> None:
    files = few_files(20)
    rows = inspect_source(source_of(files), threads=4).sheet()
    assert [(row.name, row.about, len(row.images)) for row in rows] == [
        ("ant", "training, 20 images", 8),
        ("wasp", "training, 20 images", 8),
        ("cat", "test, 20 images", 8),
        ("dog", "test, 20 images", 8),
    ]
    assert contact_sheet(rows) == contact_sheet(inspect_source(source_of(files), threads=1).sheet())


def test_the_contact_sheet_is_a_png_with_labels_left_of_the_images() -> None:
    files = {name.replace("/ant/", "/" + "long" * 40 + "/"): content for name, content in few_files(2).items()}
    files["train/wasp/0.png"] = encoded(picture(1, height=1, width=900))
    sheet = Image.open(io.BytesIO(contact_sheet(inspect_source(source_of(files)).sheet())))
    assert sheet.format == "PNG"
    pixels = np.asarray(sheet.convert("L"))
    label, gap, images = pixels[:, :200], pixels[:, 232:240], pixels[:, 240:]
    assert label.min() < 128
    assert gap.min() == 255
    assert images.min() < 128


# The commands


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """``eat-dist data``."""
    return partial(run, "data")


def test_the_commands_prepare_and_inspect_a_folder(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    write_files(tmp_path / "files", few_files())
    roots = ("--root", tmp_path / "files" / "train", "--test-root", tmp_path / "files" / "test")
    code, out, err = run("prepare", "--dataset", "folder", *roots, "--out", tmp_path / "shards")
    assert (code, err) == (0, "")
    assert "6 train, 6 test images in 1 parts" in out
    assert f"--set data.shards={tmp_path / 'shards'}" in out

    code, out, err = run("inspect", tmp_path / "shards", "--output", tmp_path / "sheet.png")
    assert (code, err) == (0, "")
    assert "images      6 train, 6 test" in out
    assert Image.open(tmp_path / "sheet.png").width > 500


def test_damage_is_one_line_and_exit_code_2(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    write_files(tmp_path, few_files())
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"bad")
    roots = ("--dataset", "folder", "--test-root", tmp_path / "test")
    code, out, err = run("inspect", tmp_path / "train", *roots)
    assert code == 2
    assert "images      5 train, 6 test" in out
    assert err.startswith(f"error: '{tmp_path}/train' is damaged in 1 places")
    assert err.count("\n") == 1

    code, _, err = run("prepare", *roots, "--root", tmp_path / "train", "--out", tmp_path / "shards")
    assert code == 2
    assert "train/ant/0.png" in err
    skip = ("--on-bad-image", "skip")
    code, _, err = run("prepare", *roots, "--root", tmp_path / "train", "--out", tmp_path / "shards", *skip)
    assert code == 0
    assert "1 undecodable images are left out, e.g. train/ant/0.png" in err


def test_an_option_that_is_not_valid_is_one_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = run("prepare", "--dataset", "digits", "--out", tmp_path, "--train-share", "2")
    assert code == 2
    assert "train_share" in err
    assert err.count("\n") == 1
