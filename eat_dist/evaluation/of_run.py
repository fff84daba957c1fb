"""Evaluating what a run folder holds."""

from __future__ import annotations

import math
from typing import Any

import torch

from eat_dist.config import DataConfig, RunConfig
from eat_dist.data.images import ImageSet
from eat_dist.data.load import load_dataset
from eat_dist.data.memory import fits_in_memory, in_memory
from eat_dist.data.shards import ShardImages
from eat_dist.evaluation.protocol import Progress, evaluate
from eat_dist.models.ensemble import load_ensemble
from eat_dist.storage import Folder


def evaluate_run(
    run_folder: Folder, config: RunConfig, *, device: torch.device, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Evaluate a run's ensemble on its test classes; see :func:`eat_dist.evaluation.protocol.evaluate`."""
    epsilon = config.evaluation.epsilon
    return evaluate(
        load_ensemble(run_folder.child("model")),
        _test_set(config.data),
        config=config.evaluation,
        norm=config.attack.norm,
        epsilon=config.attack.epsilon if epsilon is None else epsilon,
        seed=config.seed,
        folder=run_folder.child("evaluation").child(config.evaluation.protocol),
        device=device,
        on_progress=on_progress,
    )


def _test_set(config: DataConfig) -> ImageSet:
    """The test set, in memory where it fits: every attack goes through all of it."""
    test = load_dataset(config).test
    if isinstance(test, ShardImages) and fits_in_memory(len(test) * math.prod(test.image_shape)):
        return in_memory(test)
    return test
