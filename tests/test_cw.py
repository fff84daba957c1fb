"""Carlini & Wagner in L2: that what it finds is the smallest perturbation that succeeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attacked import Watched, per_image, undefended
from eat_dist.attacks import ATTACKS, Ball, WhiteBox
from eat_dist.attacks.cw import CarliniWagner
from eat_dist.attacks.objectives import displacement, nearest_wrong_centroid
from eat_dist.config import AttackConfig, ModelConfig
from eat_dist.errors import ConfigError
from eat_dist.models import build_embedder
from eat_dist.seeding import generator

EVERYWHERE = Ball("l2", 10.0)
NORMAL = torch.tensor([0.6, 0.8], dtype=torch.float64)


def two_pixels(*points: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.float64).view(-1, 1, 1, 2)


def beyond_the_line() -> Watched:
    """Success is 0.6·x₁ + 0.8·x₂ > 1.1; the value is the signed distance from that line."""
    return Watched(lambda pixels: pixels @ NORMAL - 1.1)


def lengths(perturbed: torch.Tensor, images: torch.Tensor) -> list[float]:
    return (perturbed - images).flatten(1).norm(dim=1).tolist()


def test_it_finds_the_nearest_point_across_a_line() -> None:
    """Distances by hand: 1.1 − 0.7 = 0.4, 1.1 − 0.34 = 0.76, 1.1 − 1.02 = 0.08, along (0.6, 0.8).

    From (0.2, 0.9) the foot of the perpendicular is (0.356, 1.108), outside the pixel range. There x₂ = 1 and so
    x₁ = (1.1 − 0.8) / 0.6 = 0.5: √(0.3² + 0.1²) = 0.316. From (0, 0.8), black, 1.1 − 0.64 = 0.46 leads to
    (0.276, 1.168), again outside; (0.5, 1) is √(0.5² + 0.2²) = 0.539 away.
    """
    images = two_pixels((0.5, 0.5), (0.3, 0.2), (0.9, 0.6), (0.2, 0.9), (0.0, 0.8))
    attack = CarliniWagner(EVERYWHERE, num_steps=300, learning_rate=0.05)
    found = attack(beyond_the_line(), images, generators=per_image(5))
    assert bool((beyond_the_line().values(found) > 0).all())
    expected = [0.4, 0.76, 0.08, 0.1**0.5, 0.29**0.5]
    assert lengths(found, images)[:3] == pytest.approx(expected[:3], rel=0.01)
    assert lengths(found, images)[3:] == pytest.approx(expected[3:], rel=0.03)  # tanh takes for ever to get to 1
    feet = torch.tensor([[0.74, 0.82], [0.756, 0.808], [0.948, 0.664], [0.5, 1], [0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(found.flatten(1), feet, rtol=0, atol=0.02)


def test_it_turns_an_embedding_just_over_the_angle_between_two_classes() -> None:
    """Embedding (x₁, x₂) of length 1, classes on the axes: the border is x₁ = x₂, √½ · 0.5 from (0.8, 0.3)."""
    images = two_pixels((0.8, 0.3))
    margin = nearest_wrong_centroid(torch.eye(2, dtype=torch.float64), torch.tensor([0]))
    found = CarliniWagner(EVERYWHERE, num_steps=100, learning_rate=0.03)(
        WhiteBox(nn.Flatten(), margin), images, generators=per_image(1)
    )
    assert lengths(found, images) == pytest.approx([0.5 * 0.5**0.5], rel=0.02)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.55, 0.55], dtype=torch.float64), rtol=0, atol=0.01)


def test_a_threshold_moves_the_border() -> None:
    """The value is a distance, so κ = 0.05 is 0.05 more."""
    images = two_pixels((0.5, 0.5))
    attack = CarliniWagner(EVERYWHERE, num_steps=100, learning_rate=0.03, threshold=0.05)
    assert lengths(attack(beyond_the_line(), images, generators=per_image(1)), images) == pytest.approx(
        [0.45], rel=0.01
    )


def test_an_image_that_is_lost_already_stays_as_it_is() -> None:
    images = two_pixels((0.9, 0.8), (0.5, 0.5))
    found = CarliniWagner(EVERYWHERE, num_steps=100)(beyond_the_line(), images, generators=per_image(2))
    assert torch.equal(found[0], images[0])
    assert not torch.equal(found[1], images[1])


def test_where_nothing_succeeds_in_the_ball_the_largest_value_in_it_is_the_result() -> None:
    """The line is 0.4 away and ε = 0.25: the best point of the ball is 0.25 along (0.6, 0.8), its value −0.15."""
    images = two_pixels((0.5, 0.5))
    found = CarliniWagner(Ball("l2", 0.25), num_steps=100)(beyond_the_line(), images, generators=per_image(1))
    assert lengths(found, images) == pytest.approx([0.25])
    assert float(beyond_the_line().values(found)) == pytest.approx(-0.15, abs=0.002)


def test_of_all_that_was_read_the_smallest_success_is_the_result_and_the_cost_is_as_stated() -> None:
    images = two_pixels((0.5, 0.5), (0.3, 0.2))
    surface, attack = beyond_the_line(), CarliniWagner(EVERYWHERE, num_steps=60, learning_rate=0.1)
    found = attack(surface, images, generators=per_image(2))
    assert len(surface.read_at) == 9 * 60
    assert attack.passes == pytest.approx(9 * 60 + 9 / 3)
    read = torch.stack(surface.read_at)
    succeeded = torch.stack([surface.values(seen) > 0 for seen in surface.read_at])
    distances = (read - images).flatten(2).norm(dim=2).masked_fill(~succeeded, float("inf"))
    assert 0 < int(succeeded.sum()) < succeeded.numel()
    assert bool((torch.tensor(lengths(found, images), dtype=torch.float64) <= distances.amin(dim=0) + 1e-12).all())
    assert bool((surface.values(found) > 0).all())


def test_the_search_finds_the_weight_that_the_first_one_is_too_small_for() -> None:
    """With c = 0.001 alone leaving the image costs more than it gains; a search of nine values gets across."""
    images = two_pixels((0.5, 0.5))
    alone, searched = (
        CarliniWagner(EVERYWHERE, num_steps=100, search_steps=count)(beyond_the_line(), images, generators=per_image(1))
        for count in (1, 9)
    )
    assert float(beyond_the_line().values(alone)) < -0.39
    assert float(beyond_the_line().values(searched)) > 0


def test_where_the_gradient_vanishes_a_random_direction_is_the_beginning() -> None:
    """``displacement`` of the pixels themselves, from the middle: ‖δ‖² > 0.09 is reached at a distance of 0.3."""
    images = two_pixels((0.5, 0.5), (0.5, 0.5))
    surface = WhiteBox(nn.Flatten(), displacement(images.flatten(1)))
    found = CarliniWagner(EVERYWHERE, num_steps=100, learning_rate=0.03, threshold=0.09)(
        surface, images, generators=per_image(2)
    )
    assert lengths(found, images) == pytest.approx([0.3, 0.3], rel=0.01)
    assert not torch.equal(found[0], found[1])  # a direction each


def test_images_are_attacked_each_by_itself_within_the_ball_and_the_model_is_restored() -> None:
    model = build_embedder(ModelConfig(widths=(4, 8)), in_channels=3, generator=generator(0)).double().train()
    images = torch.rand(6, 3, 8, 8, generator=generator(0), dtype=torch.float64)
    model.head.eval()
    images[:, :, 0], images[:, :, 1] = 0, 1
    modes = [module.training for module in model.modules()]
    aims = torch.randn(6, 64, generator=generator(1), dtype=torch.float64)
    attack = CarliniWagner(Ball("l2", 0.3), num_steps=10, learning_rate=0.2, threshold=0.05)

    def attacked(rows: list[int]) -> torch.Tensor:
        surface = WhiteBox(model, lambda embeddings: (embeddings * aims[rows]).sum(dim=1))
        return attack(surface, images[rows], generators=[generator(0, "image", row) for row in rows])

    together = attacked([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(torch.cat([attacked([row]) for row in range(6)]), together, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([attacked([0, 1]), attacked([2, 3, 4, 5])]), together, rtol=0, atol=1e-9)
    assert torch.equal(attacked([0, 1, 2, 3, 4, 5]), together)
    assert 0.1 < max(lengths(together, images)) <= 0.3 + 1e-9
    assert float(together.min()) >= 0
    assert float(together.max()) <= 1
    assert not together.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_radius_zero_is_the_identity() -> None:
    images = two_pixels((0.5, 0.5), (0.0, 1.0)).float()
    surface = WhiteBox(nn.Flatten(), lambda pixels: pixels.sum(dim=1) - 5)
    found = CarliniWagner(Ball("l2", 0), num_steps=5)(surface, images, generators=generator(0))
    assert torch.equal(found, images)


def test_the_settings_are_steps_a_weight_and_the_radius_in_l2_alone() -> None:
    """With few steps the learning rate grows: 100 of 0.1 go as far as 1,000 of the public code's 0.01."""

    def made(**settings: float) -> object:
        return ATTACKS["cw"](AttackConfig(name="cw", norm="l2", epsilon=0.5, **settings))

    assert made(num_steps=1000) == CarliniWagner(Ball("l2", 0.5), num_steps=1000, learning_rate=0.01)
    assert made(num_steps=5000) == CarliniWagner(Ball("l2", 0.5), num_steps=5000, learning_rate=0.01)
    assert made(num_steps=100) == CarliniWagner(Ball("l2", 0.5), num_steps=100, learning_rate=0.1)
    assert made(num_steps=100, step_size=0.02) == CarliniWagner(Ball("l2", 0.5), num_steps=100, learning_rate=0.02)
    for norm in ("linf", "l0"):
        with pytest.raises(ConfigError, match=f"the attack 'cw' is defined for the norm l2; got {norm}"):
            ATTACKS["cw"](AttackConfig(name="cw", norm=norm, epsilon=0.5))


def test_an_undefended_model_is_broken_from_no_farther_than_pgd_breaks_it(tmp_path: Path) -> None:
    """Every image is; half of them within a radius in which PGD of as many steps breaks no more.

    Controls: the clean images are all right, a tiny ball holds hardly a success, nor do 30 steps find one at the
    learning rate that is meant for 1,000.
    """
    model, images, objective = undefended(tmp_path)
    surface = WhiteBox(model, objective)

    def cw(epsilon: float, step_size: float | None = None) -> torch.Tensor:
        config = AttackConfig(name="cw", norm="l2", epsilon=epsilon, num_steps=30, step_size=step_size)
        return ATTACKS["cw"](config)(surface, images, generators=per_image(64))

    def broken(perturbed: torch.Tensor) -> float:
        return float((surface.values(perturbed) > 0).double().mean())

    smallest = cw(8.0)  # √64: no perturbation is longer
    assert broken(images) == 0
    assert broken(smallest) == 1
    assert broken(cw(0.02)) < 0.1
    assert broken(cw(8.0, step_size=0.01)) < 0.1

    median = float(torch.tensor(lengths(smallest, images)).median())
    pgd = ATTACKS["pgd"](AttackConfig(norm="l2", epsilon=median, num_steps=30))
    assert 0.2 < broken(pgd(surface, images, generators=per_image(64))) <= 0.5
