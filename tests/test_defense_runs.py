"""Short real runs on the digits under each defense, and the settings that a defense cannot work with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_defenses import CLASSES, Case

from eat_dist.config import LossConfig
from eat_dist.defenses import options_of
from eat_dist.errors import ConfigError
from eat_dist.losses import make_loss
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.seeding import generator
from small_runs import largest_difference, small_config, train_locally, weights

DEFENSES = ["trades", "mixup", "manifold_mixup", "iat", "adp", "dverge"]
PASSES = {"trades": 2 + 1 / 3 + 2, "mixup": 1, "manifold_mixup": 1, "iat": 4, "adp": 1, "dverge": 2 + 1 / 3 + 2}


def losses_of(folder: Path, *assignments: str) -> tuple[list[float], float]:
    """The sum of all the members' losses on record, in each of the 20 iterations; and the passes."""
    losses: list[float] = []

    def record(merged: EnsembleStatistics) -> None:
        if len(losses) < merged.iteration:  # every member reports
            losses.append(sum(sum(entry.losses().values()) for entry in merged.members))

    results = train_locally(small_config("cluster.backend=local", *assignments), folder, record)
    return losses, results[0].passes


@pytest.mark.parametrize("name", DEFENSES)
def test_the_loss_falls_in_a_short_run_and_passes_are_counted(name: str, tmp_path: Path) -> None:
    losses, passes = losses_of(tmp_path, f"defense.name={name}")
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert passes == pytest.approx(20 * PASSES[name])


@pytest.mark.parametrize("name", DEFENSES)
def test_a_pair_loss_falls_too_when_steps_are_repeated_on_the_same_batch(name: str) -> None:
    options = {"kl_weight": 1.0} if name == "trades" else {}  # 6 is for a loss of Proxy Anchor's size
    case = Case(2, name=name, **options)
    for learner in case.learners:
        config = LossConfig(name="contrastive")
        learner.loss = make_loss(config, num_classes=CLASSES, embedding_dim=5, generator=generator(0)).double()  # type: ignore[assignment]
    optimisers = [torch.optim.Adam(learner.model.parameters(), lr=0.03) for learner in case.learners]
    losses = []
    for _ in range(25):
        merged = case.step()[0].ensemble
        losses.append(sum(sum(entry.losses().values()) for entry in merged.members))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(learner.loss.centroids.any() for learner in case.learners)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DEFENSES)
def test_a_resumed_run_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    config = small_config("cluster.backend=local", f"defense.name={name}", "train.epochs=2")
    train_locally(config, tmp_path / "whole")
    train_locally(config, tmp_path / "parts", until_epoch=1)
    resumed = train_locally(config, tmp_path / "parts")
    assert resumed[0].resumed_from == 5
    assert resumed[0].passes == pytest.approx(10 * PASSES[name])
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


REFUSED = {
    "adp sets members apart": (["defense.name=adp", "ensemble.members=1"], "at least 2; got 1", "ensemble.members=2"),
    "dverge trains on peers' images": (
        ["defense.name=dverge", "ensemble.members=1"],
        "at least 2; got 1",
        "ensemble.members=2",
    ),
    "adp has one batch for all": (
        ["defense.name=adp", "ensemble.split.rule=disjoint"],
        "split.rule must be all; got disjoint",
        "ensemble.split.rule=all",
    ),
    "manifold mixup is not compiled": (
        ["defense.name=manifold_mixup", "train.compile=true"],
        "set train.compile to false",
        "train.compile=false",
    ),
    "manifold mixup needs the whole batch in the network": (
        ["defense.name=manifold_mixup", "train.micro_batch_size=8", "model.freeze_batch_norm=true"],
        "leave out train.micro_batch_size",
        "train.micro_batch_size=null",
    ),
    "manifold mixup needs it in one process": (
        ["defense.name=manifold_mixup", "cluster.replicas_per_member=2"],
        "cluster.replicas_per_member must be 1; got 2",
        "cluster.replicas_per_member=1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_defense_cannot_work_with_is_refused_in_one_line(case: str) -> None:
    assignments, message, mend = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        small_config(*assignments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    small_config(*assignments, mend)


def test_a_defense_takes_its_own_options_and_no_other() -> None:
    assert options_of(small_config("defense.name=iat", "defense.mix_alpha=0.4").defense) == {"mix_alpha": 0.4}
    assert options_of(small_config("defense.name=trades").defense) == {"kl_weight": 6.0, "softmax_scale": 32.0}
    with pytest.raises(
        ConfigError, match=r"'trades' takes the options kl_weight, softmax_scale; got defense.mix_alpha"
    ):
        options_of(small_config("defense.name=trades", "defense.mix_alpha=0.4").defense)
