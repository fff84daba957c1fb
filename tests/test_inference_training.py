"""Training through a defense at inference: one step by hand, and a run of three members."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_defenses import ATTACK, Case

from eat_dist.attacks import Generators, WhiteBox
from eat_dist.attacks.objectives import batch_loss
from eat_dist.attacks.randomness import uniform
from eat_dist.config import InferenceConfig
from eat_dist.errors import ConfigError
from eat_dist.history import read_history
from eat_dist.inference import Defended, randomisation
from eat_dist.inference.table import make_transform
from eat_dist.seeding import generator
from eat_dist.storage import Folder
from small_runs import largest_difference, small_config, train_locally, weights

THROUGH = ["inference.name=randomisation", "inference.training=true"]


def step_through(case: Case, config: InferenceConfig) -> None:
    """A step of the only learner behind a defense; its bare network is put back to be looked at."""
    drawn, [learner] = generator("drawn"), case.learners
    bare = learner.model
    learner.model = Defended(bare, config, generators=lambda: drawn).train()
    case.step()
    learner.model = bare


def test_a_natural_step_learns_from_the_transformed_images() -> None:
    """PAL of the images as the transform leaves them, with the generator's own numbers."""
    case, config = Case(1, name="natural"), InferenceConfig(name="randomisation")
    step_through(case, config)
    model, loss = case.twins[0]
    images = make_transform(config, pool=None)(case.batches[0].images, generator("drawn"))
    assert images.shape == (8, 1, 9, 9)
    case.assert_left_by_step(0, loss(model(images), case.batches[0].labels))


def test_adversarial_training_attacks_and_learns_through_the_transform() -> None:
    """Every pass has the next numbers: four attack steps one after the other, then clean and adversarial at once."""
    case, config = Case(1, name="pgd_at", adversarial_share=0.5), InferenceConfig(name="randomisation")
    step_through(case, config)
    model, loss = case.twins[0]
    drawn, transform = generator("drawn"), make_transform(config, pool=None)
    attacker, batch = case.attackers[0][0], case.batches[0]

    class Through(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            embeddings: torch.Tensor = attacker(transform(images, drawn))
            return embeddings

    surface = WhiteBox(Through(), batch_loss(loss, batch.labels))
    start = case.random_start(0)
    adversarial = ATTACK.advance(surface, batch.images, start, num_steps=ATTACK.num_steps).images
    both = model(transform(torch.cat([batch.images, adversarial]), drawn))
    total = 0.5 * loss(both[:8], batch.labels) + 0.5 * loss(both[8:], batch.labels)
    case.assert_left_by_step(0, total)


@pytest.mark.parametrize("defense", ["natural", "pgd_at"])
def test_the_loss_falls_in_training_through_a_random_transform(defense: str, tmp_path: Path) -> None:
    config = small_config(*THROUGH, f"defense.name={defense}", "cluster.backend=local")
    train_locally(config, tmp_path)
    losses = read_history(Folder.at(tmp_path / "statistics"))["clean_loss"].to_pylist()
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_two_runs_of_one_seed_are_the_same_also_when_one_of_them_is_interrupted(tmp_path: Path) -> None:
    config = small_config(*THROUGH, "defense.name=natural", "cluster.backend=local")
    train_locally(config, tmp_path / "one")
    train_locally(config, tmp_path / "other", until_epoch=2)
    train_locally(config, tmp_path / "other")
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "other")) == 0
    for changed in (["inference.training=false"], ["seed=1"]):
        train_locally(
            small_config(*THROUGH, "defense.name=natural", "cluster.backend=local", *changed), tmp_path / changed[0]
        )
        assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / changed[0])) > 0


def test_every_pass_has_numbers_of_its_own_and_they_repeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two attack steps and an update in each of five iterations: an attack has not seen what is learnt from."""
    drawn: list[list[float]] = []

    def recorded(like: torch.Tensor, generators: Generators | None) -> torch.Tensor:
        found = uniform(like, generators)
        drawn.append(found.flatten().tolist())
        return found

    monkeypatch.setattr(randomisation, "uniform", recorded)
    config = small_config(*THROUGH, "defense.name=pgd_at", "ensemble.members=1", "cluster.backend=local")
    for name in ("one", "again"):
        train_locally(config, tmp_path / name, until_epoch=1)
    assert len(drawn) == 2 * 5 * 3
    assert drawn[:15] == drawn[15:]
    assert len({tuple(numbers[:9]) for numbers in drawn[:15]}) == 15


def test_a_defense_that_is_not_trained_through_changes_neither_weights_nor_checkpoints(tmp_path: Path) -> None:
    """So that an ensemble may be finished behind another one than it was begun with."""
    plain = small_config("defense.name=natural", "cluster.backend=local")
    behind = small_config("defense.name=natural", "cluster.backend=local", "inference.name=bart")
    train_locally(plain, tmp_path / "plain")
    train_locally(plain, tmp_path / "behind", until_epoch=2)
    train_locally(behind, tmp_path / "behind")
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "behind")) == 0


def test_the_rule_joint_cannot_be_trained_through_a_defense() -> None:
    with pytest.raises(ConfigError, match=r"the rule 'joint'.*set inference.training to false"):
        small_config(*THROUGH, "defense.transfer_rule=joint", "cluster.backend=local")
