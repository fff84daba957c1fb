"""The saliency map attack: which pixels it changes, and how few."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import nn

from attacked import Watched, per_image, undefended
from eat_dist.attacks import ATTACKS, Ball, WhiteBox
from eat_dist.attacks.jsma import SaliencyMap
from eat_dist.attacks.objectives import displacement, nearest_wrong_centroid
from eat_dist.config import AttackConfig, ModelConfig
from eat_dist.errors import ConfigError
from eat_dist.models import build_embedder
from eat_dist.seeding import generator


def linear(*slopes: float) -> Watched:
    return Watched(lambda pixels: pixels @ torch.tensor(slopes, dtype=pixels.dtype))


def changed_pixels(perturbed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """[B], how many positions differ in any channel."""
    return (perturbed != images).any(dim=1).flatten(1).sum(dim=1)


@pytest.mark.parametrize(
    ("pixels", "slopes", "expected"),
    [
        # Gains of the better move: pixel 0 to white 1 · 0.1, pixel 1 to white 3 · 0.8.
        ((0.9, 0.2), (1.0, 3.0), (0.9, 1.0)),
        # The steeper pixel has nowhere to go: 3 · 0.1 against 2 · 0.9.
        ((0.9, 0.1), (3.0, 2.0), (0.9, 1.0)),
        # Falling slope: to black, 3 · 0.9 against 2 · 0.5.
        ((0.9, 0.5), (-3.0, 2.0), (0.0, 0.5)),
        # Already at their best ends: nothing changes.
        ((1.0, 0.0), (3.0, -2.0), (1.0, 0.0)),
    ],
)
def test_it_changes_the_one_pixel_that_gains_most(
    pixels: tuple[float, ...], slopes: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    """Two pixels, of which one may change (ε = 1/2); the embedding is the pixels, the objective linear."""
    images = torch.tensor(pixels).view(1, 1, 1, 2)
    found = SaliencyMap(Ball("l0", 0.5), num_steps=5)(linear(*slopes), images, generators=generator(0))
    assert torch.equal(found.flatten(), torch.tensor(expected))


def test_that_one_pixel_turns_the_embedding_to_the_other_class() -> None:
    """Embedding (x₁, x₂) of length 1, classes on the axes: of (0.8, 0.6), blackening x₁ alone leaves class 2's axis.

    From (0.8, 0.6) the margin 'cos to axis 2 minus cos to axis 1' is −0.2, at (0, 0.6) it is 1.
    """
    images = torch.tensor((0.8, 0.6), dtype=torch.float64).view(1, 1, 1, 2)
    margin = nearest_wrong_centroid(torch.eye(2, dtype=torch.float64), torch.tensor([0]))
    surface = WhiteBox(nn.Flatten(), margin)
    found = SaliencyMap(Ball("l0", 0.5), num_steps=5)(surface, images, generators=generator(0))
    assert float(surface.values(images)) == pytest.approx(-0.2)
    assert torch.equal(found.flatten(), torch.tensor((0.0, 0.6), dtype=torch.float64))
    assert float(surface.values(found)) == pytest.approx(1.0)


def test_a_pixel_s_channels_count_together_and_each_goes_to_its_own_end() -> None:
    """Two channels of two pixels. Gains: pixel 0: 2 · 0.5 + 0; pixel 1: 1 · 0.6 (to white) + 1 · 0.7 (to black)."""
    images = torch.tensor([[0.5, 0.4], [0.5, 0.7]]).view(1, 2, 1, 2)
    surface = linear(2.0, 1.0, 0.0, -1.0)
    found = SaliencyMap(Ball("l0", 0.5), num_steps=1)(surface, images, generators=generator(0))
    torch.testing.assert_close(found.view(2, 2), torch.tensor([[0.5, 1.0], [0.5, 0.0]]))


def test_on_a_linear_objective_no_choice_of_as_many_pixels_is_better() -> None:
    images = torch.rand(4, 1, 2, 3, generator=generator(0), dtype=torch.float64)
    slopes = torch.randn(6, generator=generator(1), dtype=torch.float64)
    surface = linear(*slopes.tolist())
    found = SaliencyMap(Ball("l0", 0.5), num_steps=3)(surface, images, generators=per_image(4))
    best = torch.full((4,), float("-inf"), dtype=torch.float64)
    for places in combinations(range(6), 3):
        for ends in product((0.0, 1.0), repeat=3):
            tried = images.flatten(1).clone()
            tried[:, places] = torch.tensor(ends, dtype=torch.float64)
            best = torch.maximum(best, surface.values(tried))
    torch.testing.assert_close(surface.values(found), best)
    assert changed_pixels(found, images).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("epsilon", "num_steps", "counts"),
    [
        (5 / 9, 100, [0, 1, 2, 3, 4]),  # one pixel a step, and no step without a pixel
        (5 / 9, 2, [0, 3]),  # ⌈5/2⌉ a step; the second changes the remaining two
        (5 / 9, 1, [0]),
        (0.99, 4, [0, 2, 4, 6]),  # ⌊8.91⌋ = 8
        (0.1, 4, []),  # not one whole pixel
    ],
)
def test_the_budget_is_spent_evenly_and_never_passed(epsilon: float, num_steps: int, counts: list[int]) -> None:
    images = 0.1 + 0.8 * torch.rand(2, 3, 3, 3, generator=generator(0))
    surface = linear(*torch.randn(27, generator=generator(1)).tolist())
    found = SaliencyMap(Ball("l0", epsilon), num_steps=num_steps)(surface, images, generators=generator(0))
    assert [changed_pixels(seen, images).tolist() for seen in surface.read_at] == [[count] * 2 for count in counts]
    assert changed_pixels(found, images).tolist() == [int(epsilon * 9 + 1e-9)] * 2


def test_a_changed_pixel_is_final_and_the_best_iterate_is_kept() -> None:
    """−(x₁ + x₂ + x₃ − 1)² from (0.2, 0.3, 0.1): up to 1 in the first step (0.1 → 1 gains most: 0.9), value −0.25, then
    only down: 0.3 → 0 leaves −0.04, 0.2 → 0 leaves 0. Of the four, the last is best; with a budget of 1, the first.
    """
    images = torch.tensor((0.2, 0.3, 0.1), dtype=torch.float64).view(1, 1, 1, 3)
    surface = Watched(lambda pixels: -(pixels.sum(dim=1) - 1).square())
    found = SaliencyMap(Ball("l0", 1.0), num_steps=3)(surface, images, generators=generator(0))
    path = [seen.flatten().tolist() for seen in surface.read_at] + [found.flatten().tolist()]
    assert path == [[0.2, 0.3, 0.1], [0.2, 0.3, 1.0], [0.2, 0.0, 1.0], [0.0, 0.0, 1.0]]
    # From a sum of 0.99, what the slope promises is a step too far (both to white: −1 after −0.0001); none is kept.
    near = torch.tensor((0.05, 0.94), dtype=torch.float64).view(1, 1, 1, 2)
    assert torch.equal(SaliencyMap(Ball("l0", 1.0), num_steps=1)(surface, near, generators=generator(0)), near)


def test_where_the_gradient_vanishes_a_random_pixel_is_the_beginning() -> None:
    """``displacement`` has no slope at the image itself. A pixel without slope elsewhere is left alone."""
    images = torch.full((50, 1, 1, 4), 0.5)
    surface = WhiteBox(nn.Flatten(), displacement(images.flatten(1)))
    found = SaliencyMap(Ball("l0", 0.25), num_steps=1)(surface, images, generators=per_image(50))
    assert changed_pixels(found, images).tolist() == [1] * 50
    assert bool(((found == images) | (found == 0) | (found == 1)).all())
    assert bool((found != images).any(dim=0).all())  # every one of the four, in some image
    partly = SaliencyMap(Ball("l0", 1.0), num_steps=1)(linear(0, 0, 1, 0), images, generators=per_image(50))
    assert bool((partly[..., 2] == 1).all())
    assert changed_pixels(partly, images).tolist() == [1] * 50


def small_model() -> nn.Module:
    return build_embedder(ModelConfig(widths=(4, 8)), in_channels=3, generator=generator(0)).double()


def test_images_are_attacked_each_by_itself_within_the_ball_and_the_model_is_restored() -> None:
    model, images = small_model().train(), torch.rand(6, 3, 8, 8, generator=generator(0), dtype=torch.float64)
    model.head.eval()
    images[:, :, 0], images[:, :, 1] = 0, 1
    modes = [module.training for module in model.modules()]
    aims = torch.randn(6, 64, generator=generator(1), dtype=torch.float64)
    attack = SaliencyMap(Ball("l0", 0.2), num_steps=6)

    def attacked(rows: list[int]) -> torch.Tensor:
        surface = WhiteBox(model, lambda embeddings: (embeddings * aims[rows]).sum(dim=1))
        return attack(surface, images[rows], generators=[generator(0, "image", row) for row in rows])

    together = attacked([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(torch.cat([attacked([row]) for row in range(6)]), together, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([attacked([0, 1]), attacked([2, 3, 4, 5])]), together, rtol=0, atol=1e-12)
    assert torch.equal(attacked([0, 1, 2, 3, 4, 5]), together)
    assert changed_pixels(together, images).min() > 0
    assert changed_pixels(together, images).max() <= 12
    assert float(together.min()) == 0
    assert float(together.max()) == 1
    assert not together.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_radius_zero_is_the_identity() -> None:
    images = torch.rand(2, 3, 4, 4, generator=generator(0))
    surface = linear(*[1.0] * 48)
    assert torch.equal(SaliencyMap(Ball("l0", 0), num_steps=3)(surface, images, generators=generator(0)), images)


def test_the_settings_are_steps_and_the_share_of_pixels_in_l0_alone() -> None:
    attack = ATTACKS["jsma"](AttackConfig(name="jsma", norm="l0", epsilon=0.1, num_steps=7))
    assert attack == SaliencyMap(Ball("l0", 0.1), num_steps=7)
    assert attack.passes == pytest.approx(7 + 1 / 3)
    for norm in ("linf", "l2"):
        with pytest.raises(ConfigError, match=f"the attack 'jsma' is defined for the norm l0; got {norm}"):
            ATTACKS["jsma"](AttackConfig(name="jsma", norm=norm, epsilon=0.1))


def test_an_undefended_model_is_broken_by_a_tenth_of_the_pixels(tmp_path: Path) -> None:
    """Controls: the clean images are all right, as are nearly all with as many random pixels at random values."""
    model, images, objective = undefended(tmp_path)
    surface, ball = WhiteBox(model, objective), Ball("l0", 0.1)  # 6 of 64 pixels

    def broken(perturbed: torch.Tensor) -> float:
        return float((surface.values(perturbed) > 0).double().mean())

    assert broken(images) == 0
    assert broken(SaliencyMap(ball, num_steps=10)(surface, images, generators=per_image(64))) >= 0.95
    assert broken(ball.random_point(images, per_image(64))) < 0.1
