"""One picture of a few images of some classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_THUMBNAIL = 96  # pixels, the longer side
_LABEL_WIDTH = 240
_GAP = 8
_LINE = 20


@dataclass(frozen=True)
class SheetRow:
    """A class: its name, a line about it, and some of its images, as :func:`thumbnail` makes them."""

    name: str
    about: str
    images: tuple[Image.Image, ...]


def thumbnail(image: Image.Image) -> Image.Image:
    """Scale an image up or down to the size of the sheet's cells."""
    scale = _THUMBNAIL / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def contact_sheet(rows: Sequence[SheetRow]) -> bytes:
    """Draw a row of images for each class, its name on the left.

    Returns:
        A PNG file.
    """
    step = _THUMBNAIL + _GAP
    columns = max((len(row.images) for row in rows), default=0)
    sheet = Image.new("RGB", (_LABEL_WIDTH + columns * step + _GAP, len(rows) * step + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for number, row in enumerate(rows):
        top = _GAP + number * step
        middle = top + _THUMBNAIL // 2
        draw.text((_GAP, middle - _LINE), _fitting(row.name, draw, font), fill="black", font=font)
        draw.text((_GAP, middle), row.about, fill="dimgray", font=font)
        for column, image in enumerate(row.images):
            left = _LABEL_WIDTH + column * step
            sheet.paste(image, (left + (_THUMBNAIL - image.width) // 2, top + (_THUMBNAIL - image.height) // 2))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _fitting(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a name as there is room for; its end says more than its beginning (``alphabet/character07``)."""
    room = _LABEL_WIDTH - 2 * _GAP
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(f"…{text}", font=font) > room:
        text = text[1:]
    return f"…{text}"
