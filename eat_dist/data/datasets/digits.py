"""Handwritten digits, 8×8, that come with scikit-learn: nothing to download, for tests and first runs."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from eat_dist.config import DataConfig
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.decode import to_tensor
from eat_dist.data.images import LabelledImages, ZeroShotData

SOURCE_SIZE = 8
TRAIN_CLASSES = tuple("01234")
TEST_CLASSES = tuple("56789")


@DATASETS.register("digits")
def digits(config: DataConfig) -> ZeroShotData:
    """The 1,797 digits of ``sklearn.datasets.load_digits`` (UCI Optical Recognition of Handwritten Digits).

    0-4 are trained on (901 images), 5-9 tested on (896). Pixel values 0 … 16 become round(v·255/16), ink
    bright.
    """
    if config.root is not None:
        warnings.warn("data.root has no effect on the dataset 'digits': it comes with scikit-learn", stacklevel=2)
    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)
    size = config.image_size or SOURCE_SIZE
    class_of = {f"digits/{index:04d}": str(digit) for index, digit in enumerate(source.target)}
    images = {name: to_tensor(Image.fromarray(image), size=size) for name, image in zip(class_of, pixels, strict=True)}
    return ZeroShotData(
        train=_with_classes(images, class_of, TRAIN_CLASSES),
        test=_with_classes(images, class_of, TEST_CLASSES),
    )


def _with_classes(
    images: dict[str, torch.Tensor], class_of: dict[str, str], class_names: tuple[str, ...]
) -> LabelledImages:
    chosen = {name: image for name, image in images.items() if class_of[name] in class_names}
    return LabelledImages.stack(chosen, class_of=class_of.__getitem__, class_names=class_names)
