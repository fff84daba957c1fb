"""The disagreement as a detector of attacked images: figures by hand, and attackers who do and do not know it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eat_dist.attacks import Ball, GradientAttack, Objective, WhiteBox
from eat_dist.data.images import ImageSet
from eat_dist.data.load import load_dataset
from eat_dist.evaluation.detector import aware, choose_attacked, detection, undetected
from eat_dist.evaluation.embed import embed_batch
from eat_dist.evaluation.references import OBJECTIVES, Aimed, References
from eat_dist.models.disagreement import disagreement
from eat_dist.models.ensemble import EmbeddingEnsemble, EnsembleSpec, fuse
from eat_dist.seeding import generator
from small_runs import small_config, train_locally, weights


def angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1).float()


def test_images_that_only_one_member_sees_move_are_found() -> None:
    """20 images at 0° and 20 at 90°; the attack takes 4 of the 40 to the other side, in the second member alone.

    Such an image has no neighbour in common: divergence 1. A clean one shares nearly all of its side: divergence near
    0. So every threshold between the two finds all attacked images and accuses no clean one.
    """
    clean = [angles(*[0.0] * 20, *[90.0] * 20)] * 2
    attacked = [clean[0], angles(*[90.0] * 20, *[0.0] * 20)]
    found = detection(clean, attacked, fraction=0.1, seed=0)
    assert (found["auroc"], found["tpr_at_5_fpr"], found["fraction"]) == (1.0, 1.0, 0.1)
    assert found["mean_attacked"] > 0.8
    assert found["mean_clean"] < 0.2


def test_an_attack_that_changes_nothing_is_not_found() -> None:
    """The scores of both halves are of one distribution; equal embeddings tie, and a tie is half a pair."""
    members = [torch.randn(400, 8, generator=generator("test detector", m)) for m in range(2)]
    assert detection(members, members, seed=0)["auroc"] == pytest.approx(0.5, abs=0.1)
    equal = [torch.ones(10, 3)] * 2
    found = detection(equal, equal, seed=0)
    assert (found["auroc"], found["tpr_at_5_fpr"], found["mean_clean"]) == (0.5, 0.0, 0.0)


def test_figures_equal_loops_over_pairs_and_thresholds() -> None:
    clean, attacked = ([torch.randn(30, 4, generator=generator("test detector", k, m)) for m in range(3)] for k in "ca")
    found = detection(clean, attacked, fraction=0.3, seed=1)
    chosen = choose_attacked(30, fraction=0.3, seed=1)
    mixed = [torch.where(chosen[:, None], after, before) for before, after in zip(clean, attacked, strict=True)]
    scores = disagreement(mixed, mixed, own=torch.eye(30, dtype=torch.bool))
    high, low = scores[chosen], scores[~chosen]
    assert (len(high), len(low)) == (9, 21)
    wins = [(float(a) > float(c)) + (float(a) == float(c)) / 2 for a in high for c in low]
    assert found["auroc"] == pytest.approx(sum(wins) / len(wins))
    # 5 % of 21 is one: the threshold lies at the second highest clean score.
    assert found["tpr_at_5_fpr"] == pytest.approx(float((high > low.sort().values[-2]).float().mean()))
    assert found["mean_attacked"] == pytest.approx(float(high.mean()))
    assert found["mean_clean"] == pytest.approx(float(low.mean()))
    blocks = detection(clean, attacked, fraction=0.3, seed=1, block_size=7)
    assert blocks == pytest.approx(found, abs=1e-6)


def test_which_images_are_attacked_depends_on_the_seed() -> None:
    assert choose_attacked(100, fraction=0.1, seed=0).sum() == 10
    assert torch.equal(choose_attacked(100, fraction=0.1, seed=0), choose_attacked(100, fraction=0.1, seed=0))
    assert not torch.equal(choose_attacked(100, fraction=0.1, seed=0), choose_attacked(100, fraction=0.1, seed=1))


def test_sets_without_two_sides_and_a_single_member_are_refused() -> None:
    members = [torch.ones(4, 3)] * 2
    with pytest.raises(ValueError, match=r"a fraction of 0\.1 attacks 0 of 4"):
        detection(members, members, fraction=0.1, seed=0)
    with pytest.raises(ValueError, match="a fraction of 1 attacks 4 of 4"):
        detection(members, members, fraction=1.0, seed=0)
    with pytest.raises(ValueError, match="two or more"):
        detection(members[:1], members[:1], seed=0)


def test_the_aware_objective_takes_the_fused_embedding_apart() -> None:
    members, references = (
        [torch.nn.functional.normalize(torch.randn(5, 4, generator=generator(k, m)), dim=1) for m in range(3)]
        for k in ("image", "reference")
    )

    def base(embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings[:, 0]

    own = torch.eye(5, dtype=torch.bool)
    fused = fuse(members)
    value = aware(base, references=references, own=own, weight=2.0)(fused)
    assert torch.allclose(value, fused[:, 0] - 2.0 * disagreement(members, references, own=own))
    assert torch.equal(aware(base, references=references, weight=0.0)(fused), fused[:, 0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingEnsemble, ImageSet]:
    """An undefended ensemble of three, and the digits that it was not trained on."""
    folder: Path = tmp_path_factory.mktemp("detector")
    config = small_config("defense.name=natural", "train.epochs=20")
    train_locally(config, folder)
    ensemble = EnsembleSpec(config.model, (1, 8, 8), 3).build()
    for member, state in zip(ensemble.members, weights(folder), strict=True):
        member.load_state_dict(state)
    return ensemble.eval(), load_dataset(config.data).test


def test_an_attacker_who_knows_the_detector_is_found_less_often(trained: tuple[EmbeddingEnsemble, ImageSet]) -> None:
    """At ε = 0.2 the attack scatters the members' neighbourhoods; with a little of the detector in its objective it
    does so less, and loses no query by that."""
    ensemble, test = trained
    everything = torch.arange(len(test))
    images = test.batch(everything, "cpu").images
    clean = [embed_batch(member, images) for member in ensemble.members]
    known = References.of(fuse(clean), test, seed=0)
    attack = GradientAttack(Ball("linf", 0.2), num_steps=10, step_size=0.05, random_start=True)

    def figures(objective: Objective) -> tuple[float, float]:
        generators = [generator("test detector", index) for index in range(len(test))]
        adversarial = attack(WhiteBox(ensemble, objective), images, generators=generators)
        attacked = [embed_batch(member, adversarial) for member in ensemble.members]
        lost = (OBJECTIVES["nearest_negative"](Aimed(known, everything))(fuse(attacked)) >= 0).float().mean()
        return detection(clean, attacked, seed=0)["auroc"], float(lost)

    batch = Aimed(known, everything)
    unaware, lost = figures(OBJECTIVES["nearest_negative"](batch))
    evading, lost_evading = figures(undetected(batch, members=3, weight=0.03))
    assert unaware > 0.75
    assert 0.3 < evading < unaware - 0.1
    assert min(lost, lost_evading) > 0.9
