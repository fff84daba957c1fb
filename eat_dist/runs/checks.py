"""What is found out before a run writes anything: names, paths, data, cluster."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from eat_dist.attacks import ATTACKS, training_attack
from eat_dist.config import DataConfig, RunConfig
from eat_dist.console import Console
from eat_dist.data.datasets import DATASETS
from eat_dist.data.images import ImageSet, ZeroShotData
from eat_dist.data.load import load_dataset, with_shards
from eat_dist.data.splits import Splits, make_splits
from eat_dist.defenses import DEFENSES, options_of
from eat_dist.errors import CheckpointError, ConfigError, StorageError
from eat_dist.in_process import choose_device
from eat_dist.inference import INFERENCE_DEFENSES, check_inference
from eat_dist.losses import LOSSES, check_loss, supports_weights
from eat_dist.models import BACKBONES, build_embedder
from eat_dist.robustness.transfer import TRANSFER_RULES
from eat_dist.runs.defended import check_pool
from eat_dist.runs.lease import LEASE
from eat_dist.seeding import generator
from eat_dist.storage import Folder


def check_names(config: RunConfig) -> None:
    """Find every component that the config names.

    Raises:
        ConfigError: All unknown names in one message.
    """
    tables = (
        (DATASETS, config.data.dataset),
        (BACKBONES, config.model.backbone),
        (LOSSES, config.loss.name),
        (ATTACKS, config.attack.name),
        (DEFENSES, config.defense.name),
        (TRANSFER_RULES, config.defense.transfer_rule),
        (INFERENCE_DEFENSES, config.inference.name),
    )
    faults = []
    for table, name in tables:
        try:
            table[name]
        except ConfigError as error:
            faults.append(str(error))
    if not faults:
        check_loss(config.loss)
        options_of(config.defense)
        check_inference(config.inference)
        training_attack(config.attack)
        by_class = config.defense.name == "eat" and TRANSFER_RULES[config.defense.transfer_rule].by_class
        if by_class and not supports_weights(config.loss.name):
            faults.append(
                f"the rule '{config.defense.transfer_rule}' weights images, which the loss '{config.loss.name}' "
                f"cannot; choose another defense.transfer_rule or a proxy loss"
            )
    if faults:
        raise ConfigError("; ".join(faults))


def check_unseen(run: Folder, trained: DataConfig, measured: DataConfig, test: ImageSet) -> None:
    """Check that a run is not measured on classes that it was trained on, however its data are named this time.

    An image is known by its path below the dataset's root. So the same files under another root are found out; other
    files of a class that was trained on are not.

    Args:
        run: Its folder, whose ``splits.parquet`` lists the training images.
        trained: Its data.
        measured: Those to be measured; of another dataset, equal paths mean nothing.
        test: Their test set.

    Raises:
        ConfigError: An image of the test set was trained on.
    """
    if measured.dataset != trained.dataset or not run.exists("splits.parquet"):
        return
    table = pq.read_table(pa.BufferReader(run.read("splits.parquet")), columns=["name"])
    seen = set(table["name"].to_pylist())
    known = [name for name in test.names if name in seen]
    if known:
        raise ConfigError(
            f"{len(known)} of the {len(test)} images that this would measure were trained on, e.g. '{known[0]}': the "
            "figures would not be of unseen classes. Leave out what chooses other data, or classes, than the run's"
        )


def check_free(folder: Folder, *, overwrite: bool) -> None:
    """Check that a new run may have this folder.

    A bucket is tried by a write, since what else is checked may take minutes; it may keep the folder's empty marker.

    Raises:
        StorageError: It holds something, and ``overwrite`` is false or it is no run folder; or the bucket cannot be
            written.
    """
    if not folder.is_local:
        folder.create()
    if not _content(folder):
        return
    if not overwrite:
        raise StorageError(
            f"'{folder}' exists; choose another --run-dir, continue it with --resume {folder.argument}, or replace it "
            f"with --overwrite"
        )
    if not folder.exists("config.yaml"):
        raise StorageError(f"'{folder}' is not a run folder (no config.yaml), so --overwrite leaves it alone")


def clear(folder: Folder) -> None:
    """Delete an earlier run, but not the lease that this process holds on its folder."""
    for name in _content(folder):
        folder.delete(name)


def _content(folder: Folder) -> list[str]:
    return [name for name in folder.names() if name != LEASE]


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Paths as every worker must see them, whatever folder it starts in."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).expanduser().absolute())

    data = config.data.model_copy(
        update={name: absolute(getattr(config.data, name)) for name in ("root", "test_root", "shards")}
    )
    named = config.model.weights in ("none", "imagenet")
    weights = config.model.weights if named else absolute(config.model.weights)
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"weights": weights})})


def with_data_prepared(config: RunConfig, console: Console) -> RunConfig:
    """The config as workers get it, with the shards that they read; preparing them first where that is due."""
    with console.preparing() as progress:
        return config.model_copy(update={"data": with_shards(config.data, on_progress=progress)})


def load_data(config: RunConfig, console: Console) -> tuple[RunConfig, ZeroShotData]:
    """The dataset, prepared where that is due, and the config that names its shards.

    Raises:
        DataError: Something is missing, damaged or not usable for retrieval on unseen classes.
    """
    config = with_data_prepared(config, console)
    data = load_dataset(config.data)
    console.say(
        f"{config.data.dataset}: {len(data.train)} images of {data.train.num_classes} classes to train, "
        f"{len(data.test)} of {data.test.num_classes} other classes to "
        + ("test" if config.data.validation_share == 0 else "validate, held out of the training classes")
    )
    if data.skipped:
        console.warn(f"{len(data.skipped)} undecodable images are left out, e.g. {data.skipped[0]}")
    if config.model.freeze_batch_norm and config.model.weights == "none":
        console.warn(
            "model.freeze_batch_norm without pretrained weights leaves BatchNorm at mean 0 and variance 1, so it "
            "normalises nothing; set model.weights, or freeze_batch_norm to false"
        )
    return config, data


def digests(data: ZeroShotData) -> dict[str, str]:
    """What identifies the images of a run."""
    return {"train": data.train.digest(), "test": data.test.digest()}


def check_same_data(folder: Folder, data: ZeroShotData) -> None:
    """A checkpoint goes on with the images it began with."""
    before = folder.read_json("run.json").get("data")
    if before != digests(data):
        raise CheckpointError(
            f"the images are not those that '{folder}' was trained on (their SHA-256 differs); bring them back, or "
            f"train anew"
        )


def splits_of(config: RunConfig, data: ZeroShotData) -> Splits:
    """What each member sees."""
    return make_splits(data.train.labels, config.ensemble.split, members=config.ensemble.members, seed=config.seed)


def check_model(config: RunConfig, data: ZeroShotData) -> None:
    """Whether the network can be built and takes the images, its pretrained weights and its defense at inference too.

    Downloaded weights are then in torch's cache, once for all members.

    Raises:
        EatError: Weights are missing, of another architecture, or cannot be downloaded; the images are too small for
            the backbone; the normalisation has other channels; the defense mixes with more images than there are.
    """
    channels = data.train.image_shape[0]
    model = build_embedder(config.model, in_channels=channels, generator=generator(config.seed)).eval()
    with torch.no_grad():
        model(torch.zeros(1, *data.train.image_shape))
    check_pool(config, data.train)


def check_cluster(config: RunConfig) -> None:
    """Whether the members can be placed, before anything is written."""
    if config.cluster.backend == "local":
        choose_device(config.cluster)
        return
    from eat_dist.cluster.train import plan_placement  # noqa: PLC0415  (an in-process run needs no Ray)

    plan_placement(config)
