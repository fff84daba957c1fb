"""Small runs that several tests train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import SHARED_DATA
from eat_dist.config import RunConfig, load_config
from eat_dist.data.load import load_dataset
from eat_dist.data.splits import make_splits
from eat_dist.in_process import train_in_process
from eat_dist.member import MemberResult, OnIteration
from eat_dist.storage import Folder

CUB_MINI = SHARED_DATA / "cub_mini"
# For small_config: three members on real photographs, three iterations in this process.
PHOTOGRAPHS = [
    "data.dataset=cub200",
    f"data.root={CUB_MINI}",
    "data.subset=true",
    "data.image_size=32",
    "data.augmentation=crop_flip",
    "data.batch_size=50",
    "data.images_per_class=10",
    "train.epochs=1",
    "cluster.backend=local",
    "evaluation.num_steps=2",
    "evaluation.members=false",
    "evaluation.kmeans_seeds=1",
]
needs_photographs = pytest.mark.skipif(not CUB_MINI.exists(), reason=f"the photographs are not at {CUB_MINI}")


def small_config(*assignments: str) -> RunConfig:
    """Three members, 20 iterations (4 epochs of 5) on the digits, a fraction of a second each."""
    return load_config(
        None,
        [
            "data.batch_size=200",
            "data.images_per_class=40",
            "model.widths=[8,16]",
            "model.embedding_dim=16",
            "attack.num_steps=2",
            "train.epochs=4",
            "checkpoint.every=1",
            "cluster.threads_per_member=1",
            "cluster.gather_timeout=60",
            "tracking.enabled=false",
            *assignments,
        ],
    )


def train_locally(
    config: RunConfig,
    folder: Path | Folder,
    on_iteration: OnIteration | None = None,
    until_epoch: int | None = None,
) -> list[MemberResult]:
    """Train in this process; final weights end up in ``folder/model``."""
    train = load_dataset(config.data).train
    splits = make_splits(train.labels, config.ensemble.split, members=config.ensemble.members, seed=config.seed)
    place = folder if isinstance(folder, Folder) else Folder.at(folder)
    return train_in_process(
        config, train, splits=splits, run_folder=place, on_iteration=on_iteration, until_epoch=until_epoch
    )


def weights(folder: Path, members: int = 3) -> list[dict[str, torch.Tensor]]:
    """Every member's final weights."""
    return [load_file(folder / "model" / f"member_{rank}.safetensors") for rank in range(members)]


def largest_difference(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> float:
    """Over all members and tensors."""
    return max(
        float((mine[name].double() - other[name].double()).abs().max())
        for mine, other in zip(first, second, strict=True)
        for name in mine
    )
