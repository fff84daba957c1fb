"""Stanford Online Products (Song et al. 2016): photographs of products from an online market."""

from __future__ import annotations

from eat_dist.config import DataConfig
from eat_dist.data.datasets.layout import Files, data_root, make_source, need, rows
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.source import Item, Role, Source, check_listed
from eat_dist.storage import Folder

EXPECTED = {"training images": 59_551, "training classes": 11_318, "test images": 60_502, "test classes": 11_316}

_WITHIN = "Stanford_Online_Products"
_GET = "Unpack Stanford_Online_Products.zip from https://cvgl.stanford.edu/projects/lifted_struct/ there."


@DATASETS.register("sop")
def sop(config: DataConfig) -> Source:
    """Train on the 11,318 products of ``Ebay_train.txt``, test on the 11,316 of ``Ebay_test.txt``.

    A class is a product, by its number (``class_id``); the twelve kinds of products (``super_class_id``) are not used.

    Raises:
        DataError: A list or a listed image is missing, a line is malformed, or the counts are not the published ones.
    """
    root = data_root(config, holds=f"the folder {_WITHIN} or the one that contains it. {_GET}")
    folder = need(root, "Ebay_train.txt", within=(_WITHIN,), get=_GET)
    files = Files.of_folder(folder)
    train = _products(folder, "Ebay_train.txt", files, role="train")
    test = _products(folder, "Ebay_test.txt", files, role="test")
    return make_source(config, [*train, *test], files, expected=EXPECTED)


def _products(folder: Folder, name: str, files: Files, *, role: Role) -> list[Item]:
    entries = rows(
        folder,
        name,
        r"\d+\s+(\d+)\s+\d+\s+(\S+)",
        form="<image id> <class id> <super class id> <path>",
        header=[r"image_id\s+class_id\s+super_class_id\s+path"],
    )
    check_listed([path for _, path in entries], files.stamps, listed_in=name, where=str(folder))
    return [Item(path, class_name=product, role=role) for product, path in entries]
