"""CUB-200-2011 (Wah et al. 2011, Caltech-UCSD Birds): photographs of 200 species of birds."""

from __future__ import annotations

from eat_dist.config import DataConfig
from eat_dist.data.datasets.layout import Files, data_root, first_half, make_source, need, rows
from eat_dist.data.datasets.table import DATASETS
from eat_dist.data.source import Item, Source, check_listed
from eat_dist.errors import DataError
from eat_dist.storage import Folder

EXPECTED = {"training images": 5_864, "training classes": 100, "test images": 5_924, "test classes": 100}

_WITHIN = "CUB_200_2011"
_GET = "Unpack CUB_200_2011.tgz from https://www.vision.caltech.edu/datasets/cub_200_2011/ there."


@DATASETS.register("cub200")
def cub200(config: DataConfig) -> Source:
    """Train on the species 1-100, test on 101-200, the usual zero-shot split (Song et al. 2016).

    Of fewer species (``data.subset``) the first half of those that are there, by number, is trained on. Whole
    photographs are used: ``bounding_boxes.txt`` is not read, nor is ``train_test_split.txt``, which splits images
    rather than classes.

    Raises:
        DataError: A list or a listed image is missing, a line is malformed, or the counts are not the published ones.
    """
    root = data_root(config, holds=f"the folder {_WITHIN} or the one that contains it. {_GET}")
    folder = need(root, "images.txt", within=(_WITHIN,), get=_GET)
    path_of = _by_id(folder, "images.txt", r"(\d+)\s+(\S+)", form="<image id> <path>")
    class_of = _by_id(folder, "image_class_labels.txt", r"(\d+)\s+(\d+)", form="<image id> <class id>")
    name_of = _by_id(folder, "classes.txt", r"(\d+)\s+(\S+)", form="<class id> <class name>")
    for image in path_of:
        if class_of.get(image) not in name_of:
            raise DataError(
                f"image {image} of '{folder.child('images.txt')}' has no class in image_class_labels.txt and "
                "classes.txt. Unpack the dataset again."
            )
    train = first_half(int(class_of[image]) for image in path_of)
    items = [
        Item(
            f"images/{path}",
            class_name=name_of[class_of[image]],
            role="train" if int(class_of[image]) in train else "test",
        )
        for image, path in path_of.items()
    ]
    files = Files.of_folder(folder.child("images")).under("images")
    check_listed([item.name for item in items], files.stamps, listed_in="images.txt", where=str(folder))
    return make_source(config, items, files, expected=EXPECTED)


def _by_id(folder: Folder, name: str, pattern: str, *, form: str) -> dict[str, str]:
    return {columns[0]: columns[1] for columns in rows(folder, name, pattern, form=form)}
