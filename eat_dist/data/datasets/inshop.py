"""In-Shop Clothes Retrieval (Liu et al. 2016, DeepFashion): shop photographs of 7,982 clothing items."""

from __future__ import annotations

from typing import cast

from eat_dist.config import DataConfig
from eat_dist.data.datasets.layout import Files, data_root, make_source, need, rows
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.source import Item, Role, Source, check_listed

LIST = "list_eval_partition.txt"
EXPECTED = {
    "training images": 25_882,
    "training classes": 3_997,
    "query images": 14_218,
    "gallery images": 12_612,
    "test classes": 3_985,
}

_GET = (
    "Get it from https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html (img.zip unpacked; "
    "img_highres is not read)."
)


@DATASETS.register("inshop")
def inshop(config: DataConfig) -> Source:
    """Train on the items marked ``train``; each ``query`` is searched among the ``gallery`` images, as published.

    A class is an item, by its id, whichever category folders its images are in. The images are those of ``img/``, at
    most 256 pixels wide and high, with which the benchmark's figures are published; ``img_highres/`` is another set of
    files of the same pictures and is not read.

    Raises:
        DataError: The list or a listed image is missing, a line is malformed, or the counts are not the published ones.
    """
    root = data_root(config, holds=f"the folder with {LIST} and img/. {_GET}")
    entries = rows(
        need(root, LIST, within=("Eval", "Anno"), get=_GET),
        LIST,
        r"(img/\S+)\s+(\S+)\s+(train|query|gallery)",
        form="img/<path> <item id> train|query|gallery",
        header=[r"\d+", r"image_name\s+item_id\s+evaluation_status"],
    )
    folder = need(root, "img", within=("Img",), get=_GET)
    files = Files.of_folder(folder.child("img")).under("img")
    items = [Item(path, class_name=item, role=cast(Role, status)) for path, item, status in entries]
    check_listed([item.name for item in items], files.stamps, listed_in=LIST, where=str(folder))
    return make_source(config, items, files, expected=EXPECTED)
