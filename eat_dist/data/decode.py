"""Bytes of an image file → one picture of known form, or one line that says which file is bad and why."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from eat_dist.errors import DataError

# A closed list: Pillow knows formats that start other programs (EPS) or that no image dataset uses.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SIGNED = 2  # of TIFF's sample formats
_WHITE_IS_ZERO = 0  # of TIFF's photometric interpretations


def decode_image(content: bytes, *, name: str, channels: Literal[1, 3]) -> Image.Image:
    """Decode one image.

    The EXIF orientation is applied. Transparent pixels are laid over white. 12- and 16-bit grey levels are scaled
    to 8 bits (4095 or 65535 → 255). CMYK and palette images become RGB or grey by Pillow's conversion. Of an
    animation the first frame counts.

    Args:
        content: The file's bytes: PNG, JPEG, WebP, BMP, GIF, TIFF or PPM.
        name: What the error message calls the image.
        channels: 1 for grey, 3 for RGB.

    Returns:
        An image of mode L or RGB, in its own size.

    Raises:
        DataError: It is not an image, is truncated or damaged, holds more pixels than Pillow's limit against
            decompression bombs, or has pixel values without a known white (float, signed, beyond 16 bits).
    """
    try:
        opened = Image.open(io.BytesIO(content), formats=_FORMATS)
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        reason = f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file" if content else "the file is empty"
        raise DataError(f"cannot decode image '{name}': {reason}") from error
    # Pillow's decoders raise nearly anything on damaged bytes: OSError, SyntaxError, IndexError, …
    except Exception as error:
        raise DataError(f"cannot decode image '{name}': {_one_line(error)}") from error
    try:
        return _over_white(_to_8_bits(image, opened)).convert("L" if channels == 1 else "RGB")
    except ValueError as error:
        raise DataError(f"cannot decode image '{name}': {_one_line(error)}") from error


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turn an L or RGB image into [C, H, W] uint8; the channels of a pixel stay side by side in memory."""
    assert image.mode in {"L", "RGB"}, image.mode
    pixels = np.array(image)  # a copy, which torch may own; asarray's is read-only
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _to_8_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Scale grey levels of more than 8 bits, which Pillow's own conversion clips at 255.

    Args:
        image: The image, upright.
        opened: As it came from the file: it alone knows the format, and TIFF's tags.
    """
    tags = opened.tag_v2 if isinstance(opened, TiffImageFile) else {}
    # Mode I (32 bits) is also what Pillow makes of some 16-bit PNG and PPM files, always on the scale 0 … 65535.
    of_32_bits = image.mode == "I" and opened.format not in {"PNG", "PPM"}
    if image.mode == "F" or of_32_bits or _SIGNED in tags.get(SAMPLEFORMAT, ()):
        raise ValueError("its pixel values have no known white; save it with 8 or 16 bits, unsigned")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    transparency = image.info.get("transparency")
    opaque = None if transparency is None else Image.fromarray((levels != transparency).astype(np.uint8) * 255)
    white = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1
    if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:  # which Pillow honours up to 8 bits alone
        levels = white - levels
    image = Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8))
    if opaque is not None:
        image.putalpha(opaque)
    return image


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
