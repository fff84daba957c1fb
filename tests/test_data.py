"""Decoding, the labelled sets and the datasets, with damaged input built on the spot."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from eat_dist.config import DataConfig
from eat_dist.data.datasets import DATASETS, load_dataset
from eat_dist.data.datasets.omniglot import TEST_ALPHABETS, TRAIN_ALPHABETS
from eat_dist.data.decode import decode_image
from eat_dist.data.images import LabelledImages, ZeroShotData
from eat_dist.errors import ConfigError, DataError

OMNIGLOT = Path(__file__).resolve().parents[2] / "shared" / "data" / "omniglot"
needs_omniglot = pytest.mark.skipif(not OMNIGLOT.is_dir(), reason=f"Omniglot's archives are not at {OMNIGLOT}")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Decoding


def test_a_grey_png_decodes_to_its_own_pixels() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = decode_image(encoded(Image.fromarray(pixels)), name="a", size=None, channels=1)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(pixels)[None])


def test_colour_is_channels_first_and_grey_is_its_luma() -> None:
    red = encoded(Image.new("RGB", (4, 3), (255, 0, 0)))
    assert decode_image(red, name="a", size=None, channels=3)[:, 0, 0].tolist() == [255, 0, 0]
    # ITU-R 601: 0.299 of red.
    assert decode_image(red, name="a", size=None, channels=1)[0, 0, 0].item() == round(0.299 * 255)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(levels)), name="a", size=None, channels=1)
    assert image[0, 0].tolist() == [0, 1, 128, 255]


def test_transparent_pixels_become_white_and_half_transparent_ones_half_white() -> None:
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 127]]], dtype=np.uint8)
    image = decode_image(encoded(Image.fromarray(pixels)), name="a", size=None, channels=1)
    assert image[0, 0].tolist() == [255, 0, 128]


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    decoded = decode_image(encoded(image, transparency=0), name="a", size=None, channels=3)
    assert decoded[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LA", "PNG")])
def test_other_modes_keep_black_black(mode: str, kind: str) -> None:
    black: Any = {"1": 0, "CMYK": (0, 0, 0, 255), "LA": (0, 255)}[mode]
    content = encoded(Image.new(mode, (8, 8), black), kind)
    assert decode_image(content, name="a", size=None, channels=3).max().item() <= 2


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left by 90°: the left column is shown as the top row
    pixels = np.array([[0, 10], [20, 30], [40, 50]], dtype=np.uint8)
    image = decode_image(encoded(Image.fromarray(pixels), exif=exif), name="a", size=None, channels=1)
    assert image[0].tolist() == [[40, 20, 0], [50, 30, 10]]


def test_resizing_averages_rather_than_picking_pixels() -> None:
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = decode_image(encoded(Image.fromarray(checkers)), name="a", size=8, channels=1)
    assert image.shape == (1, 8, 8)
    assert (image.float() - 127.5).abs().max() < 3


def test_a_float_image_is_refused_because_its_white_is_unknown() -> None:
    with pytest.raises(DataError) as error:
        decode_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), name="f.tif", size=None, channels=1)
    assert "'f.tif'" in one_line(error)
    assert "no known white" in one_line(error)


def noise_png() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, not an image", "not a PNG"),
        (noise_png()[:200], "truncated"),
        (noise_png()[:30], ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG"),
    ],
    ids=["empty", "text", "truncated", "cut in the header", "a format that runs a program"],
)
def test_what_cannot_be_decoded_is_named_in_one_line(content: bytes, reason: str) -> None:
    with pytest.raises(DataError) as error:
        decode_image(content, name="x.png", size=None, channels=1)
    assert one_line(error).startswith("cannot decode image 'x.png': ")
    assert reason in one_line(error)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses from twice as many on
    with pytest.raises(DataError, match=r"'bomb\.png'.*decompression bomb"):
        decode_image(encoded(Image.new("L", (20, 20))), name="bomb.png", size=None, channels=1)


# Labelled sets


def labelled(*class_names: str, per_class: int = 2, shape: tuple[int, ...] = (1, 2, 2)) -> LabelledImages:
    names = [f"{name}/{index}" for name in class_names for index in range(per_class)]
    images = {name: torch.full(shape, index, dtype=torch.uint8) for index, name in enumerate(names)}
    return LabelledImages.stack(images, class_of=lambda name: name.split("/")[0], class_names=class_names)


def test_a_batch_is_float_in_0_1_with_labels_and_cpu_indices() -> None:
    images = LabelledImages(
        torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1),
        torch.tensor([0, 1, 1]),
        ("a", "b"),
        ("x", "y", "z"),
    )
    batch = images.batch(np.array([2, 1, 1]), "cpu")
    assert batch.images.dtype == torch.float32
    assert batch.images.flatten().tolist() == pytest.approx([1.0, 0.2, 0.2])
    assert batch.labels.tolist() == [1, 1, 1]
    assert batch.indices.tolist() == [2, 1, 1]
    assert (len(images), images.num_classes) == (3, 2)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("a", "b"), ("b", "c"), "must differ; 1 class in both, e.g. 'b'"),
        (("a", "b", "c"), ("b", "c"), "2 classes in both"),
        (("a",), ("b", "c"), "the training set needs at least two classes; it has 1"),
        (("a", "b"), ("c",), "the test set needs at least two classes; it has 1"),
    ],
)
def test_classes_must_be_two_and_unseen(train: tuple[str, ...], test: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as error:
        ZeroShotData(labelled(*train), labelled(*test))
    assert message in one_line(error)


def test_a_class_with_one_image_is_named() -> None:
    images = labelled("a", "b")
    lonely = LabelledImages(images.images[:3], images.labels[:3], ("a", "Balinese/character07"), images.names[:3])
    with pytest.raises(DataError) as error:
        ZeroShotData(lonely, labelled("c", "d"))
    assert one_line(error) == (
        "class 'Balinese/character07' has one image; a class needs at least two to be retrieved. "
        "Remove it or add images."
    )


def test_images_of_different_shape_are_refused_within_and_between_sets() -> None:
    with pytest.raises(DataError, match="1×2×2 and 3×2×2"):
        ZeroShotData(labelled("a", "b"), labelled("c", "d", shape=(3, 2, 2)))
    images = {"a/0": torch.zeros(1, 2, 2, dtype=torch.uint8), "a/1": torch.zeros(1, 2, 3, dtype=torch.uint8)}
    with pytest.raises(DataError, match="'a/0' is 1×2×2, 'a/1' is 1×2×3"):
        LabelledImages.stack(images, class_of=lambda _: "a", class_names=["a"])


# Digits


def test_digits_are_scikit_learns_scaled_to_bytes_and_split_by_class() -> None:
    data = load_dataset(DataConfig(dataset="digits"))
    source = load_digits()
    assert (len(data.train), len(data.test)) == (901, 896)
    assert data.train.class_names == ("0", "1", "2", "3", "4")
    assert data.test.class_names == ("5", "6", "7", "8", "9")
    assert data.train.images.shape[1:] == (1, 8, 8)
    # 0 → 0, 8 → 127.5 → 128 (to even), 16 → 255, in every image of both sets.
    scale = torch.tensor([round(value * 255 / 16) for value in range(17)], dtype=torch.uint8)
    assert scale[[0, 8, 16]].tolist() == [0, 128, 255]
    for images in (data.train, data.test):
        rows = [int(name.removeprefix("digits/")) for name in images.names]
        assert torch.equal(images.images[:, 0], scale[torch.from_numpy(source.images[rows]).long()])
        assert [images.class_names[label] for label in images.labels] == [str(t) for t in source.target[rows]]


def test_digits_resize_and_warn_that_root_has_no_effect() -> None:
    with pytest.warns(UserWarning, match=r"data\.root has no effect"):
        data = load_dataset(DataConfig(dataset="digits", root="somewhere", image_size=16))
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (1, 16, 16)


def test_an_unknown_dataset_lists_the_known_ones() -> None:
    assert {"digits", "omniglot"} <= set(DATASETS)
    with pytest.raises(ConfigError, match="omniglot"):
        load_dataset(DataConfig(dataset="omniglott"))


# Omniglot, from small archives in the published layout

SMALL1, SMALL2 = "images_background_small1", "images_background_small2"
CORNER_INK = encoded(Image.fromarray(np.pad(np.zeros((5, 5), np.uint8), ((0, 100), (0, 100)), constant_values=255)))
BAD = f"{SMALL1}/Korean/character01/0001_02.png"


def members(stem: str, alphabets: tuple[str, ...], drawings: int = 3) -> dict[str, bytes]:
    return {
        f"{stem}/{alphabet}/character01/0001_{drawing:02}.png": CORNER_INK
        for alphabet in alphabets
        for drawing in range(1, drawings + 1)
    }


def write(path: Path, contents: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Both archives, one character of three drawings an alphabet, with other files among them."""
    small1 = members(SMALL1, TRAIN_ALPHABETS)
    write(
        tmp_path / f"{SMALL1}.zip",
        {
            **dict(reversed(small1.items())),
            f"{SMALL1}/": b"",
            f"{SMALL1}/readme.txt": b"not an image",
            f"__MACOSX/{SMALL1}/Korean/character01/._0001_01.png": b"not an image",
            "../../outside.png": CORNER_INK,
        },
    )
    write(tmp_path / f"{SMALL2}.zip", members(SMALL2, ("Greek", "Latin", *TEST_ALPHABETS)))
    return tmp_path


def load_omniglot(root: Path | str, **options: Any) -> ZeroShotData:
    return load_dataset(DataConfig(dataset="omniglot", root=str(root), **options))


def replace_member(path: Path, name: str, content: bytes | None) -> None:
    """Rewrite an archive with one member changed, or (None) gone."""
    with zipfile.ZipFile(path) as archive:
        contents = {member: archive.read(member) for member in archive.namelist()}
    contents.pop(name)
    write(path, contents if content is None else {**contents, name: content})


def break_checksum(path: Path, name: str) -> None:
    """Change one byte of a stored member, so that its CRC no longer fits."""
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(name).header_offset
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT", offset) + 8] ^= 0xFF
    path.write_bytes(content)


def test_omniglot_reads_only_the_expected_characters_in_path_order(root: Path) -> None:
    data = load_omniglot(root)
    assert data.train.class_names == tuple(f"{alphabet}/character01" for alphabet in TRAIN_ALPHABETS)
    assert data.test.class_names == tuple(f"{alphabet}/character01" for alphabet in TEST_ALPHABETS)
    assert data.train.names == tuple(sorted(members(SMALL1, TRAIN_ALPHABETS)))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert data.skipped == ()
    assert sorted(path.name for path in root.iterdir()) == [f"{SMALL1}.zip", f"{SMALL2}.zip"]


def test_omniglot_ink_is_bright_and_paper_is_zero(root: Path) -> None:
    image = load_omniglot(root, image_size=105).train.images[0, 0]
    expected = torch.zeros(105, 105, dtype=torch.uint8)
    expected[:5, :5] = 255
    assert torch.equal(image, expected)
    assert load_omniglot(root).train.images.shape[1:] == (1, 28, 28)


def test_omniglot_root_may_be_a_url(root: Path) -> None:
    assert torch.equal(load_omniglot(root.as_uri()).train.images, load_omniglot(root).train.images)


def test_omniglot_without_root_says_what_to_set_and_where_to_get_it() -> None:
    with pytest.raises(DataError) as error:
        load_dataset(DataConfig(dataset="omniglot"))
    assert "data.root" in one_line(error)
    assert "brendenlake/omniglot" in one_line(error)


@pytest.mark.parametrize("missing", [SMALL1, SMALL2])
def test_a_missing_archive_is_named_with_its_folder_and_source(root: Path, missing: str) -> None:
    (root / f"{missing}.zip").unlink()
    with pytest.raises(DataError) as error:
        load_omniglot(root)
    assert f"{root}/{missing}.zip" in one_line(error)
    assert "brendenlake/omniglot" in one_line(error)


def test_a_missing_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not-there"):
        load_omniglot(tmp_path / "not-there")


@pytest.mark.parametrize("kept", [0, 100, -40], ids=["empty", "only the start", "without the end"])
def test_a_truncated_archive_is_named(root: Path, kept: int) -> None:
    path = root / f"{SMALL2}.zip"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError) as error:
        load_omniglot(root)
    assert f"'{path}' is not a whole zip archive" in one_line(error)


def test_an_archive_without_an_expected_alphabet_is_named(root: Path) -> None:
    write(root / f"{SMALL2}.zip", members(SMALL2, ("Greek", "Latin", "Tagalog")))
    with pytest.raises(DataError) as error:
        load_omniglot(root)
    assert "holds no image of Japanese_(katakana), Sanskrit" in one_line(error)
    assert f"{SMALL2}/Japanese_(katakana)/character01/0001_01.png" in one_line(error)


@pytest.mark.parametrize("fault", ["checksum", "text", "truncated"])
def test_a_bad_image_stops_loading_or_is_skipped_and_recorded(root: Path, fault: str) -> None:
    path = root / f"{SMALL1}.zip"
    if fault == "checksum":
        break_checksum(path, BAD)
    else:
        replace_member(path, BAD, b"not an image" if fault == "text" else CORNER_INK[:80])
    with pytest.raises(DataError) as error:
        load_omniglot(root)
    assert f"'{BAD}'" in one_line(error)
    assert "data.on_bad_image" in one_line(error)
    data = load_omniglot(root, on_bad_image="skip")
    assert data.skipped == (BAD,)
    assert BAD not in data.train.names
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]


def test_skipping_down_to_one_image_or_none_is_an_error_naming_the_class(root: Path) -> None:
    path = root / f"{SMALL1}.zip"
    replace_member(path, BAD, b"bad")
    replace_member(path, BAD.replace("_02", "_03"), b"bad")
    with pytest.raises(DataError, match=r"class 'Korean/character01' has one image \(2 undecodable images"):
        load_omniglot(root, on_bad_image="skip")
    replace_member(path, BAD.replace("_02", "_01"), b"bad")
    with pytest.raises(DataError, match="class 'Korean/character01' has no image"):
        load_omniglot(root, on_bad_image="skip")


def test_a_class_with_one_image_in_the_archive_is_an_error(root: Path) -> None:
    path = root / f"{SMALL2}.zip"
    for drawing in ("02", "03"):
        replace_member(path, f"{SMALL2}/Sanskrit/character01/0001_{drawing}.png", None)
    with pytest.raises(DataError, match="class 'Sanskrit/character01' has one image; a class needs"):
        load_omniglot(root)


@needs_omniglot
def test_the_published_archives_give_136_and_106_characters_of_20_drawings() -> None:
    data = load_omniglot(OMNIGLOT)
    assert (len(data.train), data.train.num_classes) == (2720, 136)
    assert (len(data.test), data.test.num_classes) == (2120, 106)
    for images in (data.train, data.test):
        assert set(torch.bincount(images.labels).tolist()) == {20}
        assert images.images.shape[1:] == (1, 28, 28)
        assert list(images.names) == sorted(images.names)
        # Thin strokes on an empty page: little ink, and nearly none along the border.
        assert 0.02 < images.images.float().mean().item() / 255 < 0.2
        assert images.images[:, :, 0].float().mean().item() / 255 < 0.02
    assert data.skipped == ()
    assert data.train.class_names[0] == "Balinese/character01"
    assert {name.split("/")[0] for name in data.test.class_names} == set(TEST_ALPHABETS)
