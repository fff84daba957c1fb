"""From the config to a training and a test set: decoded into memory, or prepared into shards once and opened."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from eat_dist.config import DataConfig
from eat_dist.data.datasets import DATASETS
from eat_dist.data.decode import decode_image
from eat_dist.data.images import ImageSet, LabelledImages, ZeroShotData
from eat_dist.data.memory import fits_in_memory, in_memory
from eat_dist.data.prepare import OnProgress, bad_image, prepare
from eat_dist.data.shard_format import SCHEMA
from eat_dist.data.shards import ShardImages, in_inference_form, inference_form, open_shards, query_mask
from eat_dist.data.source import Source
from eat_dist.data.validation import held_out
from eat_dist.errors import DataError, StorageError
from eat_dist.storage import Folder


def load_dataset(config: DataConfig, *, on_progress: OnProgress | None = None) -> ZeroShotData:
    """Load the configured dataset: what is trained on, and what is measured on.

    ``data.shards`` is opened. Without it a small dataset is decoded into memory; any other is prepared into the user's
    cache, unless it is there already, and opened.

    Args:
        config: The data section.
        on_progress: Called with ``(done, total)`` images while shards are prepared.

    Raises:
        ConfigError: No dataset has that name, or ``data.resize`` is too small.
        DataError: Something is missing, damaged or not usable for retrieval on unseen classes.
        StorageError: Something cannot be read, or the cache cannot be written.
    """
    if config.shards is not None:
        return _without_test_classes(open_shards(Folder.at(config.shards), config), config)
    source = DATASETS[config.dataset](config)
    if source.small:
        return _decode(source, config)
    return _without_test_classes(open_shards(_cached_shards(source, config, on_progress), config), config)


def _without_test_classes(data: ZeroShotData, config: DataConfig) -> ZeroShotData:
    """With ``data.validation_share`` the validation classes take the place of the test classes, in every process."""
    if config.validation_share == 0:
        return data
    train, validation = held_out(data.train, config.validation_share, seed=config.validation_seed)
    return replace(data, train=train, test=validation)


def load_test_set(config: DataConfig, *, on_progress: OnProgress | None = None) -> ZeroShotData:
    """As :func:`load_dataset`, with the test set in memory where it fits: every attack goes through all of it."""
    data = load_dataset(config, on_progress=on_progress)
    test = data.test
    if isinstance(test, ShardImages) and fits_in_memory(len(test) * math.prod(test.image_shape)):
        return replace(data, test=in_memory(test))
    return data


def with_shards(config: DataConfig, on_progress: OnProgress | None = None) -> DataConfig:
    """The config that all workers get: with the absolute path of the shards, which are prepared where that is due.

    So no worker lists or prepares a dataset. A small one, which every process decodes for itself, has no shards.

    Raises:
        EatError: As :func:`load_dataset`.
    """
    if config.shards is not None:
        folder = Folder.at(config.shards)
        return config.model_copy(update={"shards": folder.path}) if folder.is_local else config
    source = DATASETS[config.dataset](config)
    if source.small:
        return config
    return config.model_copy(update={"shards": _cached_shards(source, config, on_progress).path})


def _cached_shards(source: Source, config: DataConfig, on_progress: OnProgress | None) -> Folder:
    """The user's own shards of a dataset; changed files have another stamp, so they get another folder."""
    roots = [root and str(Folder.at(root)) for root in (config.root, config.test_root)]
    key = hashlib.sha256(json.dumps([SCHEMA, *roots, source.stamp]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Folder.at(cache / "eat_dist" / "shards" / f"{source.dataset}-{key}")
    try:
        prepare(source, folder, on_bad_image=config.on_bad_image, on_progress=on_progress)
    except StorageError as error:
        raise StorageError(
            f"{error} (Shards are prepared in '{folder}'. To have them elsewhere set XDG_CACHE_HOME, or make them with "
            "eat-dist data prepare and set data.shards.)"
        ) from error
    return folder


def _decode(source: Source, config: DataConfig) -> ZeroShotData:
    form = inference_form(config, image_size=source.image_size, resize=source.resize)
    images: dict[str, torch.Tensor] = {}
    skipped = []
    for item in source.items:
        if config.validation_share > 0 and item.role != "train":
            continue  # what is not measured on is not even decoded
        try:
            image = decode_image(source.read(item.name), name=item.name, channels=source.channels)
        except DataError as error:
            if config.on_bad_image == "error":
                raise bad_image(str(error), checked=len(images)) from error
            skipped.append(item.name)
        else:
            images[item.name] = in_inference_form(image, form, inverted=source.inverted)

    def of_set(*, train: bool) -> LabelledImages:
        class_names = source.class_names(train=train)  # of all images: a class that lost its last one is missed
        items = [item for item in source.items if item.name in images and (item.role == "train") == train]
        pixels = [images[item.name] for item in items]
        return LabelledImages(
            images=torch.stack(pixels) if pixels else torch.empty(0, source.channels, form.size, form.size).byte(),
            labels=torch.tensor([class_names.index(item.class_name) for item in items], dtype=torch.int64),
            class_names=class_names,
            names=tuple(item.name for item in items),
            is_query=query_mask([item.role for item in items]),
        )

    train: ImageSet = of_set(train=True)
    if config.validation_share > 0:
        train, test = held_out(train, config.validation_share, seed=config.validation_seed)
    else:
        test = of_set(train=False)
    return ZeroShotData(
        train=train,
        test=test,
        resize=form.resize,
        skipped=tuple(skipped),
        inverted=source.inverted,
    )
