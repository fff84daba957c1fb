"""Small datasets of generated pictures in the exact layouts in which the real ones are published."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

SMALL1, SMALL2 = "images_background_small1", "images_background_small2"
SMALL1_ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
SMALL2_ALPHABETS = ("Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog")


def photograph(seed: int = 0, size: tuple[int, int] = (48, 40)) -> bytes:
    """A JPEG of coarse coloured noise, ``size`` is (width, height)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize(size).save(stream, "JPEG")
    return stream.getvalue()


def drawing(seed: int = 0, size: int = 105) -> bytes:
    """A PNG of one black line on white, as Omniglot's are: 1 bit a pixel."""
    pixels = np.full((size, size), 255, np.uint8)
    pixels[20 + seed % 60, 10:90] = 0
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(stream, "PNG")
    return stream.getvalue()


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def class_folders(*class_names: str, per_class: int = 3) -> dict[str, bytes]:
    """The ``folder`` dataset: path → photograph."""
    paths = [f"{name}/{index}.jpg" for name in class_names for index in range(per_class)]
    return {path: photograph(seed) for seed, path in enumerate(paths)}


def omniglot_set(stem: str, alphabets: Sequence[str], *, characters: int = 1, drawings: int = 3) -> dict[str, bytes]:
    """One of Omniglot's sets: path below the root → drawing."""
    paths = [
        f"{stem}/{alphabet}/character{character:02}/{character:04}_{number:02}.png"
        for alphabet in alphabets
        for character in range(1, characters + 1)
        for number in range(1, drawings + 1)
    ]
    return {path: drawing(seed) for seed, path in enumerate(paths)}


def write_omniglot_small(root: Path) -> Path:
    """The two small archives, one character of three drawings an alphabet."""
    write_zip(root / f"{SMALL1}.zip", omniglot_set(SMALL1, SMALL1_ALPHABETS))
    write_zip(root / f"{SMALL2}.zip", omniglot_set(SMALL2, SMALL2_ALPHABETS))
    return root


def write_omniglot_whole(root: Path) -> Path:
    """Background and evaluation as folders, as torchvision unpacks them."""
    write_files(root, omniglot_set("images_background", ("Greek", "Latin"), characters=2))
    return write_files(root, omniglot_set("images_evaluation", ("Angelic", "Tibetan"), characters=2))


def write_cub200(root: Path, *, classes: int = 4, per_class: int = 3) -> Path:
    """``CUB_200_2011/`` in ``root``; returns that folder."""
    names = [f"{number:03}.Bird_{number}" for number in range(1, classes + 1)]
    paths = [f"{name}/Bird_{index:04}.jpg" for name in names for index in range(per_class)]
    labels = [number for number in range(1, classes + 1) for _ in range(per_class)]
    files = {f"images/{path}": photograph(seed) for seed, path in enumerate(paths)}
    files["images.txt"] = _lines(f"{index} {path}" for index, path in enumerate(paths, start=1))
    files["image_class_labels.txt"] = _lines(f"{index} {label}" for index, label in enumerate(labels, start=1))
    files["classes.txt"] = _lines(f"{number} {name}" for number, name in enumerate(names, start=1))
    files["train_test_split.txt"] = _lines(f"{index} {index % 2}" for index in range(1, len(paths) + 1))
    files["bounding_boxes.txt"] = _lines(f"{index} 1.0 1.0 20.0 20.0" for index in range(1, len(paths) + 1))
    return write_files(root / "CUB_200_2011", files)


def write_cars196(root: Path, *, classes: int = 4, per_class: int = 3) -> Path:
    """The layout of one list: ``cars_annos.mat`` and ``car_ims/``."""
    labels = [number for number in range(1, classes + 1) for _ in range(per_class)]
    paths = [f"car_ims/{index:06}.jpg" for index in range(1, len(labels) + 1)]
    records = [
        {"relative_im_path": path, **_BOX, "class": label, "test": index % 2}
        for index, (path, label) in enumerate(zip(paths, labels, strict=True))
    ]
    write_files(root, {path: photograph(seed) for seed, path in enumerate(paths)})
    write_mat(root / "cars_annos.mat", annotations=structs(records), class_names=_car_names(classes))
    return root


def write_cars196_devkit(root: Path, *, classes: int = 4, per_class: int = 4) -> Path:
    """The development kit's layout; every class has images of ``cars_train`` and of ``cars_test``."""
    for part, list_file in (
        ("cars_train", "devkit/cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        labels = [number for number in range(1, classes + 1) for _ in range(per_class // 2)]
        names = [f"{index:05}.jpg" for index in range(1, len(labels) + 1)]
        records = [{**_BOX, "class": label, "fname": name} for name, label in zip(names, labels, strict=True)]
        write_files(root / part, {name: photograph(seed) for seed, name in enumerate(names)})
        write_mat(root / list_file, annotations=structs(records))
    write_mat(root / "devkit/cars_meta.mat", class_names=_car_names(classes))
    write_mat(root / "devkit/cars_test_annos.mat", annotations=structs([{**_BOX, "fname": name} for name in names]))
    return root


def write_inshop(root: Path, *, classes: int = 2, per_class: int = 4) -> Path:
    """Eval/ and img/, ``classes`` items to train on and as many to test on; an item is in two category folders."""
    rows, files = [], {}
    for number in range(1, 2 * classes + 1):
        for index in range(per_class):
            category = "WOMEN/Dresses" if index % 2 else "MEN/Jackets_Vests"
            path = f"img/{category}/id_{number:08}/{index + 1:02}_1_front.jpg"
            status = "train" if number <= classes else "gallery" if index % 2 else "query"
            rows.append(f"{path:<75} id_{number:08} {status:<8}")
            files[path] = photograph(len(rows))
    files["Eval/list_eval_partition.txt"] = _lines([str(len(rows)), "image_name item_id evaluation_status", *rows])
    return write_files(root, files)


def write_sop(root: Path, *, classes: int = 2, per_class: int = 3) -> Path:
    """``Stanford_Online_Products/`` in ``root``; returns that folder."""
    files: dict[str, bytes] = {}
    for name, first in (("Ebay_train.txt", 1), ("Ebay_test.txt", classes + 1)):
        rows = ["image_id class_id super_class_id path"]
        for number in range(first, first + classes):
            for index in range(per_class):
                path = f"chair_final/{1110 + number}_{index}.JPG"
                files[path] = photograph(len(files))
                rows.append(f"{len(files)} {number} 3 {path}")
        files[name] = _lines(rows)
    return write_files(root / "Stanford_Online_Products", files)


_BOX = {"bbox_x1": 1, "bbox_y1": 1, "bbox_x2": 20, "bbox_y2": 20}


def structs(records: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    """MATLAB's struct array, 1×N."""
    array = np.empty((1, len(records)), dtype=[(field, object) for field in records[0]])
    for index, record in enumerate(records):
        array[0, index] = tuple(record.values())
    return array


def write_mat(path: Path, **variables: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables, do_compression=True)


def _car_names(classes: int) -> np.ndarray[Any, Any]:
    return np.array([[f"Maker C/V Model {number}" for number in range(1, classes + 1)]], dtype=object)


def _lines(lines: Any) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
