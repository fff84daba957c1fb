"""Equal compute: how many epochs each row gets so that all take the same forward-backward passes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import yaml

from eat_dist.config import (
    ClusterConfig,
    DataConfig,
    EnsembleConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    dump_config,
    parse_config,
)
from eat_dist.data.images import LabelledImages
from eat_dist.data.splits import make_splits
from eat_dist.in_process import train_in_process
from eat_dist.schedule import Schedule
from eat_dist.storage import Folder
from eat_dist.studies.plan import StudyRun, kinds

# The toy that passes are counted on: whole epochs of it are so short that the count is what takes the time.
_CLASSES, _IMAGES_OF_A_CLASS, _SIZE = 4, 8, 8


def passes_an_iteration(config: RunConfig) -> float:
    """Forward-backward passes over a batch that a member takes an iteration, as its defense counts them.

    They are counted, not worked out: the defense trains on a few noise images with a tiny network, with the attack, the
    rule and the number of members that the config has. What network and data there are changes no count.
    """
    tiny = config.model_copy(
        update={
            "name": "count",
            "seed": 0,
            "data": DataConfig(batch_size=16, images_per_class=4),
            "model": ModelConfig(widths=(4, 4), embedding_dim=8),
            "ensemble": EnsembleConfig(members=config.ensemble.members),
            "optimiser": OptimiserConfig(learning_rate=1e-6),
            "train": TrainConfig(epochs=1),
            "tracking": TrackingConfig(enabled=False),
            "cluster": ClusterConfig(backend="local", device="cpu", threads_per_member=1),
        }
    )
    return _counted(dump_config(tiny))


@dataclass(frozen=True)
class Allotment:
    """What a kind of run gets.

    Attributes:
        epochs: Whole ones.
        share: Of the reference's passes that it takes with them, over all members: 1.0 is all of them.
    """

    epochs: int
    share: float


def equal_passes(
    runs: Sequence[StudyRun],
    *,
    reference: str,
    own_epochs: Collection[str],
    iterations_per_epoch: Callable[[StudyRun], int],
) -> dict[tuple[str, str], Allotment]:
    """The epochs of each kind of run with which it takes the reference row's passes, as nearly as whole epochs allow.

    An epoch takes M · p · ⌈largest split / B⌉ passes, over all members, with p passes an iteration.

    Args:
        runs: Of the study.
        reference: The row whose epochs stay.
        own_epochs: Other rows whose epochs stay, because they set them.
        iterations_per_epoch: Of a run.

    Returns:
        (dataset, row) → epochs.
    """
    first = kinds(runs)
    cost = {
        kind: run.config.ensemble.members * passes_an_iteration(run.config) * iterations_per_epoch(run)
        for kind, run in first.items()
    }
    found = {}
    for (dataset, row), run in first.items():
        budget = cost[dataset, reference] * first[dataset, reference].config.train.epochs
        epochs = run.config.train.epochs
        if row != reference and row not in own_epochs:
            # Warm-up epochs are below the epochs, or there would be nothing else.
            epochs = max(run.config.train.warmup_epochs + 1, round(budget / cost[dataset, row]))
        found[dataset, row] = Allotment(epochs, epochs * cost[dataset, row] / budget)
    return found


@cache
def _counted(dumped: str) -> float:
    config = parse_config(yaml.safe_load(dumped))
    count = _CLASSES * _IMAGES_OF_A_CLASS
    noise = torch.randint(256, (count, 1, _SIZE, _SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = LabelledImages(
        images=noise,
        labels=torch.arange(count) % _CLASSES,
        class_names=tuple(f"class {label}" for label in range(_CLASSES)),
        names=tuple(f"image {index}" for index in range(count)),
    )
    splits = make_splits(images.labels, config.ensemble.split, members=config.ensemble.members, seed=config.seed)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = train_in_process(config, images, splits=splits, run_folder=Folder.at(folder))
        finally:
            torch.set_num_threads(threads)
    assert results[0].iterations == Schedule.of(config, splits).iterations
    return results[0].passes / results[0].iterations
