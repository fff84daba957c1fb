"""Omniglot (Lake et al. 2015), handwritten characters of 50 alphabets: its two small sets, or all of it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from eat_dist.config import DataConfig
from eat_dist.data.archive import Archive
from eat_dist.data.datasets.layout import Files, data_root, make_source
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.source import Item, Role, Source
from eat_dist.errors import DataError
from eat_dist.storage import Folder

SIZE = 28
SMALL = ("images_background_small1", "images_background_small2")
WHOLE = ("images_background", "images_evaluation")
EXPECTED = {
    SMALL: {"training images": 2_720, "training classes": 136, "test images": 2_120, "test classes": 106},
    WHOLE: {"training images": 19_280, "training classes": 964, "test images": 13_180, "test classes": 659},
}

_WITHIN = "omniglot-py"  # where torchvision puts it
_GET = "The archives are in the GitHub repository brendenlake/omniglot, folder python/."


@DATASETS.register("omniglot")
def omniglot(config: DataConfig) -> Source:
    """Train on one of two published sets, test on the other's characters of alphabets that the first does not have.

    The small sets (136 characters against 106; Greek and Latin are in both, so they are not tested on) are taken where
    they are there, else the whole dataset as torchvision lays it out (background 964, evaluation 659), whose alphabets
    differ. Each set is the zip archive, read without being unpacked, or the folder of that name; the archive first.

    A class is a character (``Korean/character07``) with 20 drawings by different people. Images are grey, 28×28 unless
    ``data.image_size`` says otherwise (published: 105×105 black on white), and **inverted**: ink is 1, paper 0. The
    zero padding of a convolution is then more paper; uninverted it would draw a black frame around every character.

    Deviation: Lake et al. test one-shot classification within an alphabet; here all test characters are one gallery.

    Raises:
        DataError: ``data.root`` is not set, a set is missing or damaged, or the counts are not the published ones.
    """
    root = data_root(config, holds=f"the folder with {SMALL[0]}.zip and {SMALL[1]}.zip. {_GET}")
    folder, sets = _find(root)
    train_files, test_files = (_files(folder, name) for name in sets)
    train = _characters(train_files.stamps, sets[0], role="train")
    alphabets = {_alphabet(item) for item in train}
    test = [item for item in _characters(test_files.stamps, sets[1], role="test") if _alphabet(item) not in alphabets]
    return make_source(
        config,
        [*train, *test],
        train_files | test_files,
        expected=EXPECTED[sets],
        channels=1,
        image_size=SIZE,
        resize=SIZE,
        inverted=True,
        small=sets == SMALL,
    )


def _find(root: Folder) -> tuple[Folder, tuple[str, str]]:
    """Where the sets are and which they are; one of the two is enough, :func:`_files` asks for the other."""
    for sets in (SMALL, WHOLE):
        for folder in (root, root.child(_WITHIN)):
            if any(folder.exists(name) or folder.exists(f"{name}.zip") for name in sets):
                return folder, sets
    raise DataError(
        f"the dataset 'omniglot' needs {SMALL[0]}.zip and {SMALL[1]}.zip, or {WHOLE[0]} and {WHOLE[1]}, in data.root; "
        f"'{root}' has none of them. {_GET}"
    )


def _files(folder: Folder, name: str) -> Files:
    if folder.exists(f"{name}.zip"):
        archive = Archive(folder, f"{name}.zip")
        return Files(archive.files(), archive.read)
    if folder.exists(name):
        return Files.of_folder(folder.child(name)).under(name)
    raise DataError(f"there is no '{folder.child(f'{name}.zip')}' and no folder of that name. {_GET}")


def _characters(names: Iterable[str], stem: str, *, role: Role) -> list[Item]:
    """The drawings of a set, sorted by path; whatever else is there is passed over."""
    pattern = re.compile(rf"{re.escape(stem)}/([^/]+/character\d+)/[^/]+\.png")
    matches = (pattern.fullmatch(name) for name in sorted(names))
    return [Item(match.group(0), class_name=match.group(1), role=role) for match in matches if match]


def _alphabet(item: Item) -> str:
    return item.class_name.partition("/")[0]
