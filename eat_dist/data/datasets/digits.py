"""Handwritten digits, 8×8, that come with scikit-learn: nothing to download, for tests and first runs."""

from __future__ import annotations

import hashlib
import io
import warnings

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from eat_dist.config import DataConfig
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.source import Item, Source

SOURCE_SIZE = 8
TRAIN_CLASSES = range(5)


@DATASETS.register("digits")
def digits(config: DataConfig) -> Source:
    """The 1,797 digits of ``sklearn.datasets.load_digits`` (UCI Optical Recognition of Handwritten Digits).

    0-4 are trained on (901 images), 5-9 tested on (896). Pixel values 0 … 16 become round(v·255/16), ink bright. The
    pictures have no files: ``read`` encodes them as PNG.
    """
    if config.root is not None:
        warnings.warn("data.root has no effect on the dataset 'digits': it comes with scikit-learn", stacklevel=2)
    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)
    items = [
        Item(f"digits/{index:04d}", class_name=str(digit), role="train" if digit in TRAIN_CLASSES else "test")
        for index, digit in enumerate(source.target)
    ]

    def read(name: str) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(pixels[int(name.removeprefix("digits/"))]).save(stream, "PNG")
        return stream.getvalue()

    return Source(
        dataset="digits",
        items=tuple(sorted(items, key=lambda item: item.role == "test")),  # a stable sort: all to train on first
        read=read,
        stamp=hashlib.sha256(pixels.tobytes() + source.target.astype(np.uint8).tobytes()).hexdigest(),
        channels=1,
        image_size=SOURCE_SIZE,
        resize=SOURCE_SIZE,
        small=True,
    )
