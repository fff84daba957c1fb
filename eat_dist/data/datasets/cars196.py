"""Cars-196 (Krause et al. 2013, Stanford Cars): photographs of 196 models of cars, in either published layout."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from scipy.io import loadmat

from eat_dist.config import DataConfig
from eat_dist.data.datasets.layout import Files, data_root, find, first_half, make_source, need
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.source import Item, Source, check_listed
from eat_dist.errors import DataError, StorageError
from eat_dist.storage import Folder

EXPECTED = {"training images": 8_054, "training classes": 98, "test images": 8_131, "test classes": 98}
ONE_LIST = "cars_annos.mat"
TRAIN_LIST = "cars_train_annos.mat"
TEST_LIST = "cars_test_annos_withlabels.mat"
CLASS_LIST = "cars_meta.mat"

_WITHIN = "stanford_cars"  # where torchvision looks for it
_GET = "Where to get it is in docs/datasets.md."


@DATASETS.register("cars196")
def cars196(config: DataConfig) -> Source:
    """Train on the models 1-98, test on 99-196, the usual zero-shot split (Song et al. 2016).

    The images are all 16,185: the archive's own training and test parts together, which split images rather than
    classes. ``cars_annos.mat`` with ``car_ims/`` is taken where it is there, else the development kit's lists with
    ``cars_train/`` and ``cars_test/``. Of fewer models (``data.subset``) the first half of those that are there, by
    number, is trained on. Whole photographs are used, not the bounding boxes.

    Raises:
        DataError: A list or a listed image is missing, a list is damaged or without classes, or the counts are not the
            published ones.
    """
    root = data_root(config, holds=f"the folder with {ONE_LIST} and car_ims/, or with devkit/. {_GET}")
    folder = find(root, ONE_LIST, within=(_WITHIN,))
    if folder is not None:
        class_of = _annotations(folder, ONE_LIST, path="relative_im_path")
        class_names = _load(folder, ONE_LIST, "class_names")
        parts = ["car_ims"]
    else:
        folder = need(root, f"devkit/{TRAIN_LIST}", within=(_WITHIN,), get=f"Nor is there {ONE_LIST}. {_GET}")
        test_list = need(folder, TEST_LIST, within=("devkit",), get=f"cars_test_annos.mat has no classes. {_GET}")
        class_of = {
            **_annotations(folder.child("devkit"), TRAIN_LIST, path="fname", below="cars_train/"),
            **_annotations(test_list, TEST_LIST, path="fname", below="cars_test/"),
        }
        class_names = _load(folder.child("devkit"), CLASS_LIST, "class_names")
        parts = ["cars_train", "cars_test"]
    files = Files({}, folder.read)
    for part in parts:
        files |= Files.of_folder(folder.child(part)).under(part)
    check_listed(list(class_of), files.stamps, listed_in="the .mat files", where=str(folder))
    name_of = {number: f"{number:03d}.{name}" for number, name in enumerate(class_names, start=1)}
    unnamed = sorted(set(class_of.values()) - set(name_of))
    if unnamed:
        raise DataError(f"class {unnamed[0]} in '{folder}' is not among the {len(name_of)} class_names. {_GET}")
    train = first_half(class_of.values())
    items = [
        Item(path, class_name=name_of[number], role="train" if number in train else "test")
        for path, number in class_of.items()
    ]
    return make_source(config, items, files, expected=EXPECTED)


def _annotations(folder: Folder, name: str, *, path: str, below: str = "") -> dict[str, int]:
    """Image path → class number, in the list's order."""
    try:
        return {f"{below}{record[path]}": int(record["class"]) for record in _load(folder, name, "annotations")}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"'{folder.child(name)}' is not a list of images: each of its annotations must have {path} and "
            f"class. {_GET}"
        ) from error


def _load(folder: Folder, name: str, variable: str) -> list[Any]:
    """One array of a MATLAB file; structs are dicts. scipy reads data only, it runs and unpickles nothing."""
    try:
        content = loadmat(io.BytesIO(folder.read(name)), variable_names=[variable], simplify_cells=True)
        return list(np.atleast_1d(content[variable]))
    except StorageError as error:
        raise DataError(f"{error}. {_GET}") from error
    except KeyError as error:
        raise DataError(f"'{folder.child(name)}' has no {variable}. {_GET}") from error
    # On damaged bytes scipy raises nearly anything: ValueError, TypeError, zlib.error, MatReadError, …
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"'{folder.child(name)}' is not a whole MATLAB file ({reason}). {_GET}") from error
