"""Every registered defense, whole: train, checkpoint, resume, evaluate; and the passes it reports are those it took.

The table is the registry itself, so a new defense is tested by being registered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_defenses import Case
from torch import nn

from eat_dist.config import RunConfig
from eat_dist.console import Console
from eat_dist.data.images import ZeroShotData
from eat_dist.data.load import load_dataset
from eat_dist.defenses import DEFENSES
from eat_dist.in_process import train_in_process
from eat_dist.member import MemberResult
from eat_dist.runs import start_run
from eat_dist.runs.checks import splits_of
from eat_dist.runs.run import complete_ensemble
from eat_dist.storage import Folder
from small_runs import small_config

EVERY = sorted(DEFENSES)
# Random triplets keep HM's loss below its margin, where the next iteration depends on it.
SETTINGS = {"hm": ["defense.mining=random"]}


def tiny_config(defense: str, *assignments: str) -> RunConfig:
    """Two members, two epochs of two iterations on the digits."""
    return small_config(
        f"defense.name={defense}",
        "ensemble.members=2",
        "data.batch_size=450",
        "data.images_per_class=90",
        "model.widths=[4,8]",
        "train.epochs=2",
        "cluster.backend=local",
        "evaluation.protocol=quick",
        "evaluation.num_steps=2",
        "evaluation.members=false",
        "evaluation.kmeans_seeds=1",
        'evaluation.objectives=["random_wrong_centroid"]',
        *SETTINGS.get(defense, []),
        *assignments,
    )


@pytest.fixture(scope="module")
def data() -> ZeroShotData:
    """The digits, decoded once."""
    return load_dataset(tiny_config("natural").data)


def train(config: RunConfig, data: ZeroShotData, folder: Path, until_epoch: int | None = None) -> MemberResult:
    """Train both members in this process; what the first one reports."""
    place, splits = Folder.at(folder), splits_of(config, data)
    return train_in_process(config, data.train, splits=splits, run_folder=place, until_epoch=until_epoch)[0]


def digest(config: RunConfig, data: ZeroShotData, folder: Path) -> str:
    """Of the weights that training left."""
    return complete_ensemble(Folder.at(folder), config, data)[1]


def figures(value: Any) -> list[float]:
    """Every number somewhere in a summary."""
    if isinstance(value, dict):
        return [number for entry in value.values() for number in figures(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in figures(entry)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("defense", EVERY)
def test_a_run_stopped_after_an_epoch_ends_with_the_weights_of_an_undisturbed_one_and_is_evaluated(
    defense: str, data: ZeroShotData, tmp_path: Path
) -> None:
    """Two runs with one seed, of which the second is stopped and continued from its checkpoint by new members."""
    config = tiny_config(defense)
    whole = start_run(config, run_dir=str(tmp_path / "whole"), overwrite=False, console=Console()).summary

    train(config, data, tmp_path / "stopped", until_epoch=1)
    at_half = digest(config, data, tmp_path / "stopped")
    result = train(config, data, tmp_path / "stopped")

    assert (result.resumed_from, result.iterations) == (result.iterations // 2, whole["iterations"])
    assert result.passes == pytest.approx(whole["passes"], abs=0.01)
    assert digest(config, data, tmp_path / "stopped") == whole["weights_sha256"] != at_half
    (attacked,) = whole["attacked"].values()
    for measured in (whole["clean"], attacked, whole["worst"]):
        assert all(map(math.isfinite, figures(measured)))
        assert all(0 <= measured[name] <= 1 for name in ("r_at_1", "nmi", "f1"))
    assert whole["clean"]["r_at_1"] > 0.4  # the network tells unseen digits apart; by chance it would be 0.2


def test_another_seed_gives_other_weights(data: ZeroShotData, tmp_path: Path) -> None:
    """The negative control."""
    found = set()
    for seed in (0, 1):
        config = tiny_config("natural", f"seed={seed}")
        train(config, data, tmp_path / str(seed))
        found.add(digest(config, data, tmp_path / str(seed)))
    assert len(found) == 2


def counting(model: nn.Module) -> Callable[[], float]:
    """Images that enter the network's first convolution, those without a backward pass as a third."""
    counted = [0.0]

    def count(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        differentiated = given[0].requires_grad or any(parameter.requires_grad for parameter in module.parameters())
        counted[0] += len(given[0]) * (1 if torch.is_grad_enabled() and differentiated else 1 / 3)

    next(module for module in model.modules() if isinstance(module, nn.Conv2d)).register_forward_pre_hook(count)
    return lambda: counted[0]


@pytest.mark.parametrize("defense", EVERY)
def test_the_passes_that_a_step_reports_are_those_that_went_through_the_networks(defense: str) -> None:
    case = Case(2, name=defense)
    entered = [counting(learner.model) for learner in case.learners]
    results = case.step()
    reported = sum(result.passes for result in results) * len(case.batches[0].labels)
    assert sum(images() for images in entered) == pytest.approx(reported)
