"""Decoding and the labelled sets, with damaged input built on the spot."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eat_dist.data.decode import decode_image
from eat_dist.data.images import LabelledImages, ZeroShotData
from eat_dist.errors import DataError


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
