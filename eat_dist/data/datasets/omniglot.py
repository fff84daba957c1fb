"""Omniglot's two small background sets (Lake et al. 2015), read from the archives as they are published."""

from __future__ import annotations

import io
import re
import zipfile
import zlib

from eat_dist.config import DataConfig
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.decode import decode_images
from eat_dist.data.images import LabelledImages, ZeroShotData
from eat_dist.errors import DataError, StorageError
from eat_dist.storage import Folder

DEFAULT_SIZE = 28
TRAIN_ARCHIVE = "images_background_small1.zip"
TRAIN_ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
TEST_ARCHIVE = "images_background_small2.zip"
# Greek and Latin are in both archives, so they are left out of the test set.
TEST_ALPHABETS = ("Japanese_(katakana)", "Sanskrit", "Tagalog")

_SOURCE = "The official archives are in the GitHub repository brendenlake/omniglot, folder python/"


@DATASETS.register("omniglot")
def omniglot(config: DataConfig) -> ZeroShotData:
    """Train on the 136 characters of small1, test on the 106 characters of small2 that are not in small1.

    A class is a character (``Korean/character07``) with 20 drawings by different people. Images are grey,
    28×28 unless ``data.image_size`` says otherwise (published: 105×105 black on white), and **inverted**: ink
    is 1, paper 0. The zero padding of a convolution is then more paper; uninverted it would draw a black
    frame around every character. ``data.root`` is the folder or URL that holds the two archives; nothing is
    unpacked there.

    Raises:
        DataError: ``data.root`` is not set; an archive is missing, damaged or without one of the expected
            alphabets; an image is bad and ``data.on_bad_image`` is ``error``; or so many are that a class is
            left with one.
    """
    if config.root is None:
        raise DataError(
            f"the dataset 'omniglot' needs data.root, the folder with {TRAIN_ARCHIVE} and {TEST_ARCHIVE}. {_SOURCE}."
        )
    folder = Folder.at(config.root)
    train, skipped_train = _read(folder, TRAIN_ARCHIVE, alphabets=TRAIN_ALPHABETS, config=config)
    test, skipped_test = _read(folder, TEST_ARCHIVE, alphabets=TEST_ALPHABETS, config=config)
    return ZeroShotData(train=train, test=test, skipped=skipped_train + skipped_test, inverted=True)


def _read(
    folder: Folder, archive_name: str, *, alphabets: tuple[str, ...], config: DataConfig
) -> tuple[LabelledImages, tuple[str, ...]]:
    with _open(folder, archive_name) as archive:
        class_of = _classes(archive, alphabets, stem=archive_name.removesuffix(".zip"))
        missing = sorted(set(alphabets) - {name.split("/")[0] for name in class_of.values()})
        if missing:
            raise DataError(
                f"'{folder}/{archive_name}' holds no image of {', '.join(missing)}; expected files such as "
                f"{archive_name.removesuffix('.zip')}/{missing[0]}/character01/0001_01.png. {_SOURCE}."
            )

        def read(member: str) -> bytes:
            try:
                return archive.read(member)
            # A wrong checksum, a broken or cut stream, a compression or encryption zipfile cannot undo.
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"cannot read image '{member}' in '{folder}/{archive_name}': {reason}") from error

        images, skipped = decode_images(
            class_of,
            read,
            size=config.image_size or DEFAULT_SIZE,
            channels=1,
            on_bad_image=config.on_bad_image,
        )
    inverted = {name: 255 - image for name, image in images.items()}
    class_names = sorted(set(class_of.values()))
    return LabelledImages.stack(inverted, class_of=class_of.__getitem__, class_names=class_names), skipped


def _open(folder: Folder, archive_name: str) -> zipfile.ZipFile:
    try:
        content = folder.read(archive_name)
    except StorageError as error:
        raise DataError(
            f"{error}. The dataset 'omniglot' needs {TRAIN_ARCHIVE} and {TEST_ARCHIVE} in data.root. {_SOURCE}."
        ) from error
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise DataError(
            f"'{folder}/{archive_name}' is not a whole zip archive ({error}). Download it again. {_SOURCE}."
        ) from error


def _classes(archive: zipfile.ZipFile, alphabets: tuple[str, ...], *, stem: str) -> dict[str, str]:
    """Image member → class name, sorted by path; whatever else the archive holds is passed over."""
    of_alphabets = "|".join(re.escape(alphabet) for alphabet in alphabets)
    pattern = re.compile(rf"{re.escape(stem)}/((?:{of_alphabets})/character\d+)/[^/]+\.png")
    matches = (pattern.fullmatch(member) for member in sorted(set(archive.namelist())))
    return {match.group(0): match.group(1) for match in matches if match}
