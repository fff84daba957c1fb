"""Decoding image files and the form that a model sees, with damaged input built on the spot."""

from __future__ import annotations

import io
import struct
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from eat_dist.data.decode import decode_image, to_tensor
from eat_dist.data.transforms import InferenceForm
from eat_dist.errors import ConfigError, DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(content: bytes, channels: Literal[1, 3]) -> torch.Tensor:
    image = decode_image(content, name="a", channels=channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    return to_tensor(image)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Decoding


def test_a_grey_png_decodes_to_its_own_pixels() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = decoded(encoded(Image.fromarray(pixels)), 1)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(pixels)[None])


def test_colour_is_channels_first_and_grey_is_its_luma() -> None:
    red = encoded(Image.new("RGB", (4, 3), (255, 0, 0)))
    assert decoded(red, 3).shape == (3, 3, 4)
    assert decoded(red, 3)[:, 0, 0].tolist() == [255, 0, 0]
    # ITU-R 601: 0.299 of red.
    assert decoded(red, 1)[0, 0, 0].item() == round(0.299 * 255)


def test_a_tensor_owns_its_pixels() -> None:
    image = Image.new("L", (2, 2), 7)
    to_tensor(image).zero_()
    assert image.getpixel((0, 0)) == 7


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert decoded(encoded(Image.fromarray(levels)), 1)[0, 0].tolist() == [0, 1, 128, 255]


def test_transparent_pixels_become_white_and_half_transparent_ones_half_white() -> None:
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 127]]], dtype=np.uint8)
    assert decoded(encoded(Image.fromarray(pixels)), 1)[0, 0].tolist() == [255, 0, 128]


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decoded(encoded(image, transparency=0), 3)[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LA", "PNG")])
def test_other_modes_keep_black_black(mode: str, kind: str) -> None:
    black: Any = {"1": 0, "CMYK": (0, 0, 0, 255), "LA": (0, 255)}[mode]
    assert decoded(encoded(Image.new(mode, (8, 8), black), kind), 3).max().item() <= 2


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left by 90°: the left column is shown as the top row
    pixels = np.array([[0, 10], [20, 30], [40, 50]], dtype=np.uint8)
    assert decoded(encoded(Image.fromarray(pixels), exif=exif), 1)[0].tolist() == [[40, 20, 0], [50, 30, 10]]


def test_a_float_image_is_refused_because_its_white_is_unknown() -> None:
    with pytest.raises(DataError) as error:
        decode_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), name="f.tif", channels=1)
    assert "'f.tif'" in one_line(error)
    assert "no known white" in one_line(error)


def tiff(content: bytes, *, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """One row of two grey pixels, little-endian, with tags that Pillow cannot write."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(content)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    padded = content + b"\0" * (len(content) % 2)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    )


@pytest.mark.parametrize(
    ("content", "grey"),
    [
        (tiff(b"\xff\xf0\x00", bits=12), [255, 0]),
        (tiff(b"\x80\x08\x00", bits=12), [128, 128]),
        (tiff(b"\x00\x00\xff\xff", bits=16, photometric=0), [255, 0]),
        (tiff(b"\x00\x40\xff\xff", bits=16, photometric=0), [191, 0]),
    ],
    ids=["12 bits", "12 bits, half", "zero is white", "zero is white, a quarter"],
)
def test_grey_levels_of_a_tiff_are_on_the_scale_that_its_tags_say(content: bytes, grey: list[int]) -> None:
    assert decoded(content, 1)[0, 0].tolist() == grey


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(np.array([[0, 255]], dtype=np.int32)), "TIFF"),
        tiff(struct.pack("<II", 0, 255), bits=32),
        tiff(b"\x00\x00\xff\x7f", bits=16, sample_format=2),
        tiff(b"\x00\x7f", bits=8, sample_format=2),
    ],
    ids=["32 bits by Pillow", "32 bits", "16 bits, signed", "8 bits, signed"],
)
def test_a_tiff_of_32_bits_or_signed_is_refused_because_its_white_is_unknown(content: bytes) -> None:
    with pytest.raises(DataError, match=r"'g\.tif': its pixel values have no known white") as error:
        decode_image(content, name="g.tif", channels=1)
    assert "with 8 or 16 bits, unsigned" in one_line(error)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_level_of_16_bits_becomes_white_and_its_neighbours_do_not(channels: Literal[1, 3]) -> None:
    levels = np.array([[1000, 1001, 0]], dtype=np.uint16)  # 1000 and 1001 are one level of 8 bits
    content = encoded(Image.fromarray(levels), transparency=1000)
    assert decoded(content, channels)[:, 0].tolist() == [[255, 4, 0]] * channels


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
        decode_image(content, name="x.png", channels=1)
    assert one_line(error).startswith("cannot decode image 'x.png': ")
    assert reason in one_line(error)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses from twice as many on
    with pytest.raises(DataError, match=r"'bomb\.png'.*decompression bomb"):
        decode_image(encoded(Image.new("L", (20, 20))), name="bomb.png", channels=1)


# What a model sees


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_scaling_averages_rather_than_picking_pixels() -> None:
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = InferenceForm(resize=8, size=8)(Image.fromarray(checkers))
    assert image.shape == (1, 8, 8)
    assert (image.float() - 127.5).abs().max() < 3


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (33, 33), (17, 120), (8, 8)])
def test_the_form_is_torchvisions_resize_and_centre_crop(width: int, height: int) -> None:
    image = noise(width, height)
    torchvisions = v2.Compose([v2.Resize(32), v2.CenterCrop(28)])
    assert torch.equal(InferenceForm(resize=32, size=28)(image), to_tensor(torchvisions(image)))


def test_an_image_of_the_models_size_is_left_as_it_is() -> None:
    image = noise(28, 28)
    assert torch.equal(InferenceForm(resize=28, size=28)(image), to_tensor(image))


@pytest.mark.parametrize("along", [0, 1])
def test_of_a_long_strip_the_middle_is_seen_and_the_whole_is_never_scaled_up(along: int) -> None:
    """A strip of 2 × 40,000 pixels scaled to 32 would be 640,000 pixels long."""
    pixels = np.zeros((2, 40_000), np.uint8)
    pixels[:, 19_990:20_010] = 200
    image = InferenceForm(resize=32, size=28)(Image.fromarray(pixels if along else np.ascontiguousarray(pixels.T)))
    assert image.shape == (1, 28, 28)
    assert set(image.flatten().tolist()) == {200}


def test_a_resize_below_the_image_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be at least data\.image_size = 28; got 27"):
        InferenceForm(resize=27, size=28)
