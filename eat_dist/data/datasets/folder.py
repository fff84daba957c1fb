"""Own images: a folder a class, in a folder or a zip archive."""

from __future__ import annotations

from dataclasses import replace

import torch

from eat_dist.config import DataConfig
from eat_dist.data.archive import Archive
from eat_dist.data.datasets.layout import Files, data_root, make_source
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.source import Item, Source
from eat_dist.errors import DataError
from eat_dist.seeding import generator
from eat_dist.storage import Folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


@DATASETS.register("folder")
def folder(config: DataConfig) -> Source:
    """Each folder that holds images is a class, named by its path below the root, at any depth.

    With ``data.test_root`` the classes of ``data.root`` are trained on and those of ``data.test_root`` tested on.
    Without, round(``data.train_share`` · classes) of ``data.root``'s are trained on, at least two and all but at most
    two: the first of a permutation drawn with ``data.class_seed``.

    A root is a folder or a zip archive (its name ends in ``.zip``). A top folder in an archive that contains all class
    folders is no part of the class names. Files without one of the known suffixes are passed over, as is whatever is
    hidden (``.…``) or in ``__MACOSX``.

    Raises:
        DataError: No images, an image outside any class folder, too few classes, a class in both roots, a damaged
            archive, an image that is a link to nowhere, or a link to a folder that it lies in.
    """
    root = data_root(config, holds="a folder (or a zip) with a folder of images for each class")
    files, class_of = _images(root)
    if config.test_root is None:
        train = _draw(sorted(set(class_of.values())), share=config.train_share, seed=config.class_seed, where=root)
        items = [Item(name, label, role="train" if label in train else "test") for name, label in class_of.items()]
        chosen_by = {"train_share": config.train_share, "class_seed": config.class_seed}
        return replace(make_source(config, items, files), chosen_by=chosen_by)
    test_files, test_class_of = _images(Folder.at(config.test_root))
    items = [
        *(Item(f"train/{name}", label, role="train") for name, label in class_of.items()),
        *(Item(f"test/{name}", label, role="test") for name, label in test_class_of.items()),
    ]
    return make_source(config, items, files.under("train") | test_files.under("test"))


def _draw(class_names: list[str], *, share: float, seed: int, where: Folder) -> set[str]:
    if len(class_names) < 4:
        raise DataError(
            f"'{where}' needs at least four classes, two to train on and two to test on; it has {len(class_names)}. "
            "Add folders of images, or give the test classes by data.test_root."
        )
    count = min(max(round(share * len(class_names)), 2), len(class_names) - 2)
    order = torch.randperm(len(class_names), generator=generator(seed, "folder", "classes"))
    return {class_names[index] for index in order[:count].tolist()}


def _images(root: Folder) -> tuple[Files, dict[str, str]]:
    """The files of a root, and the class of each that is an image, sorted by path."""
    in_archive = root.path.lower().endswith(".zip")
    if in_archive:
        archive = Archive(*Folder.of_file(str(root)))
        files = Files(archive.files(), archive.read)
    elif root.exists():
        files = Files.of_folder(root, is_wanted=_is_image)
    else:
        raise DataError(f"there is no folder '{root}'. Set data.root and data.test_root to where the images are.")
    paths = [name for name in files.stamps if _is_image(name)]
    if not paths:
        raise DataError(f"'{root}' has no images: expected a folder for each class, with {', '.join(SUFFIXES)} files")
    loose = next((path for path in paths if "/" not in path), None)
    if loose is not None:
        raise DataError(f"the image '{loose}' in '{root}' is in no class folder. Move it into one, or away.")
    class_of = {path: path.rpartition("/")[0] for path in paths}
    tops = {name.partition("/")[0] for name in class_of.values()}
    if in_archive and len(tops) == 1 and tops.isdisjoint(class_of.values()):
        class_of = {path: name.partition("/")[2] for path, name in class_of.items()}
    return files, class_of


def _is_image(path: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    return not hidden and path.lower().endswith(SUFFIXES)
