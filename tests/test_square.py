"""Square Attack: its schedule, its proposals, and what it can do without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from attacked import per_image, undefended
from eat_dist.attacks import ATTACKS, Ball, Reading, WhiteBox
from eat_dist.attacks.square import Square, pixel_share
from eat_dist.config import AttackConfig, ModelConfig
from eat_dist.errors import ConfigError
from eat_dist.models import build_embedder
from eat_dist.seeding import generator


@dataclass
class Scores:
    """A black box: a function of the images. It remembers what it was asked, and has no gradient to give."""

    score: Callable[[torch.Tensor], torch.Tensor]
    asked: list[torch.Tensor] = field(default_factory=list)
    draws: int = 1

    @contextmanager
    def held(self) -> Iterator[None]:
        yield

    def read(self, images: torch.Tensor) -> Reading:
        raise AssertionError("a black-box attack asked for a gradient")

    def values(self, images: torch.Tensor) -> torch.Tensor:
        self.asked.append(images.clone())
        return self.score(images)


def bumpy(images: torch.Tensor) -> torch.Tensor:
    """One value an image, with many local maxima."""
    weights = torch.randn(images[0].numel(), generator=generator(0, "bumps"), dtype=torch.float64).to(images.dtype)
    return (7 * images.flatten(1)).sin() @ weights


def test_the_squares_shrink_as_the_paper_says() -> None:
    """p is halved at iterations 10, 50, 200, 500, 1,000, 2,000, 4,000, 6,000 and 8,000 of 10,000 (the last ones still
    with the larger p, as the public code counts), at a tenth of that for 1,000 queries.
    """
    first_with = {1: 0, 2: 11, 4: 51, 8: 201, 16: 501, 32: 1001, 64: 2001, 128: 4001, 256: 6001, 512: 8001}
    for divisor, iteration in first_with.items():
        assert pixel_share(iteration, num_queries=10_000, initial=0.8) == 0.8 / divisor
        if iteration:
            assert pixel_share(iteration - 1, num_queries=10_000, initial=0.8) == 2 * 0.8 / divisor
    rescaled = [pixel_share(iteration, num_queries=1000, initial=0.8) for iteration in range(999)]
    falls = [index for index in range(1, 999) if rescaled[index] != rescaled[index - 1]]
    assert falls == [2, 6, 21, 51, 101, 201, 401, 601, 801]
    assert rescaled[-1] == 0.8 / 512


def test_sides_are_the_rounded_roots_of_the_shares() -> None:
    """On 224 × 224 pixels: √0.8 · 224 = 200.35, √0.4 · 224 = 141.67, …, √(0.8/512) · 224 = 8.85."""
    sides = Square(Ball("linf", 0.1), num_queries=10_000).sides(224, 224)
    assert len(sides) == 9999
    assert list(dict.fromkeys(sides)) == [200, 142, 100, 71, 50, 35, 25, 18, 13, 9]
    assert set(Square(Ball("linf", 0.1), num_queries=10_000).sides(4, 4)) == {4, 3, 2, 1}  # 3.58 rounds up; never 0
    assert max(Square(Ball("linf", 0.1), num_queries=10).sides(2, 50)) == 2  # √80 = 9 pixels do not fit


def test_every_query_changes_one_square_of_one_sign_a_channel_and_keeps_what_raises_the_value() -> None:
    """Replayed from what the black box was asked: stripes, then squares of the scheduled size that differ from the best
    so far, everywhere at ±ε. The result is the best of all that was asked, and its value never fell.
    """
    images = 0.2 + 0.6 * torch.rand(3, 2, 6, 7, generator=generator(0), dtype=torch.float64)
    surface, attack = Scores(bumpy), Square(Ball("linf", 0.1), num_queries=150)
    result = attack(surface, images, generators=per_image(3))
    assert len(surface.asked) == 150

    stripes = surface.asked[0]
    assert bool((stripes - images).isclose((stripes - images)[:, :, :1, :]).all())  # each column of one colour
    offsets = torch.stack(surface.asked) - images
    torch.testing.assert_close(offsets.abs(), torch.full_like(offsets, 0.1))

    best, history, taken = stripes.clone(), [bumpy(stripes)], 0
    for asked, side in zip(surface.asked[1:], attack.sides(6, 7), strict=True):
        for row in range(3):
            changed = asked[row] != best[row]
            assert bool(changed.any()), "a query was wasted"
            places = changed.any(dim=0).nonzero()
            assert int((places.amax(dim=0) - places.amin(dim=0)).max()) < side
            for channel in range(2):
                signs = (asked - images)[row, channel][changed[channel]].sign()
                assert len(signs.unique()) <= 1
            if float(bumpy(asked[row : row + 1])) > float(bumpy(best[row : row + 1])):
                best[row], taken = asked[row], taken + 1
        history.append(bumpy(best))
    assert torch.equal(result, best)
    values = torch.stack(history)
    assert bool((values.diff(dim=0) >= 0).all())
    assert 20 < taken < 3 * 149  # some are taken, not all
    torch.testing.assert_close(values[-1], torch.stack([bumpy(asked) for asked in surface.asked]).amax(dim=0))


def test_squares_lie_everywhere_within_the_image_with_equal_chance() -> None:
    """Never taken (the value does not rise), so every query shows its square against the stripes; side 1 of 4 × 4.

    4,000 images, one square each: each of the 16 places expects 250, standard deviation 15.3.
    """
    images = torch.full((4000, 1, 4, 4), 0.5)
    surface = Scores(lambda asked: torch.zeros(len(asked)))
    Square(Ball("linf", 0.1), num_queries=2, initial_share=1 / 16)(surface, images, generators=generator(0))
    changed = surface.asked[1] != surface.asked[0]
    assert bool((changed.flatten(1).sum(dim=1) == 1).all())
    counts = changed.sum(dim=(0, 1))
    assert int((counts - 250).abs().max()) < 5 * 15.3


def test_it_reaches_the_best_corner_of_the_ball() -> None:
    """Two pixels, embedding (x₁, x₂), objective x₁ − 2x₂: the best point of the ball is (x₁ + ε, x₂ − ε), cut at 0."""
    images = torch.tensor([[0.5, 0.5], [0.3, 0.05]]).view(2, 1, 1, 2)
    surface = Scores(lambda asked: asked.flatten(1) @ torch.tensor([1.0, -2.0]))
    corner = Square(Ball("linf", 0.2), num_queries=30)(surface, images, generators=per_image(2))
    torch.testing.assert_close(corner.flatten(1), torch.tensor([[0.7, 0.3], [0.5, 0.0]]))


def test_on_pixels_that_count_alone_it_reaches_the_corner_that_enumeration_finds() -> None:
    """A separable objective has its best corner pixel by pixel: each of the 36 is tried at x + ε and x − ε."""
    images = torch.rand(5, 1, 6, 6, generator=generator(0), dtype=torch.float64)
    low, high = (images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1)
    weights = torch.randn(36, generator=generator(0, "bumps"), dtype=torch.float64).view(1, 6, 6)
    best = torch.where((7 * high).sin() * weights > (7 * low).sin() * weights, high, low)
    found = Square(Ball("linf", 0.1), num_queries=1500)(Scores(bumpy), images, generators=per_image(5))
    torch.testing.assert_close(found, best)


def test_images_are_attacked_each_by_itself() -> None:
    images = torch.rand(6, 3, 5, 5, generator=generator(0), dtype=torch.float64)

    def attacked(rows: list[int], order: list[int] | None = None) -> torch.Tensor:
        generators = [generator(0, "image", row) for row in order or rows]
        return Square(Ball("linf", 0.1), num_queries=60)(Scores(bumpy), images[rows], generators=generators)

    together = attacked([0, 1, 2, 3, 4, 5])
    assert torch.equal(torch.cat([attacked([row]) for row in range(6)]), together)
    assert torch.equal(torch.cat([attacked([0, 1]), attacked([2, 3, 4, 5])]), together)
    assert torch.equal(attacked([0, 1, 2, 3, 4, 5]), together)  # the same seeds, the same numbers
    assert not torch.equal(attacked([0, 1, 2, 3, 4, 5], order=[1, 2, 3, 4, 5, 0]), together)


def test_it_draws_the_same_in_single_and_double_precision() -> None:
    images = torch.rand(2, 1, 5, 5, generator=generator(0))
    single, double = Scores(bumpy), Scores(bumpy)
    attack = Square(Ball("linf", 0.1), num_queries=5)
    attack(single, images, generators=per_image(2))
    attack(double, images.double(), generators=per_image(2))
    torch.testing.assert_close(single.asked[0], double.asked[0].float())


def test_it_stays_in_the_ball_and_the_pixel_range_and_radius_zero_is_the_identity() -> None:
    images = torch.rand(4, 3, 5, 5, generator=generator(0))
    images[:, :, 0], images[:, :, 1] = 0, 1
    ball = Ball("linf", 0.3)
    found = Square(ball, num_queries=40)(Scores(bumpy), images, generators=generator(0))
    assert float(ball.distances(found, images).max()) <= 0.3 + 1e-6
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    assert torch.equal(Square(Ball("linf", 0), num_queries=5)(Scores(bumpy), images, generators=generator(0)), images)


def test_the_settings_are_queries_and_radius_in_linf_alone() -> None:
    attack = ATTACKS["square"](AttackConfig(name="square", epsilon=0.1, num_steps=300))
    assert attack == Square(Ball("linf", 0.1), num_queries=300, initial_share=0.8)
    assert attack.passes == 100  # a forward pass is a third of a forward-backward pass
    for norm in ("l2", "l0"):
        with pytest.raises(ConfigError, match=f"the attack 'square' is defined for the norm linf; got {norm}"):
            ATTACKS["square"](AttackConfig(name="square", epsilon=0.1, norm=norm))


def test_the_model_is_left_as_it_was() -> None:
    model = build_embedder(ModelConfig(widths=(4, 8)), in_channels=1, generator=generator(0)).train()
    model.head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    images = torch.rand(3, 1, 8, 8, generator=generator(0))
    surface = WhiteBox(model, lambda embeddings: embeddings[:, 0])
    found = Square(Ball("linf", 0.1), num_queries=5)(surface, images, generators=generator(0))
    assert not found.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_undefended_model_is_broken_without_its_gradient(tmp_path: Path) -> None:
    """Controls: the clean images are all right, and so are most with the stripes alone, and all with a tiny radius."""
    model, images, objective = undefended(tmp_path)
    surface = WhiteBox(model, objective)

    def broken(epsilon: float, num_queries: int) -> float:
        attack = Square(Ball("linf", epsilon), num_queries=num_queries)
        return float((surface.values(attack(surface, images, generators=per_image(64))) > 0).double().mean())

    assert float((surface.values(images) > 0).double().mean()) == 0
    assert broken(0.2, 300) >= 0.95
    assert broken(0.2, 1) < 0.1
    assert broken(0.02, 300) < 0.1
