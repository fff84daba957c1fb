"""Defences that only hide their gradients: at random, or by rounding. They look robust, and are not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import inf, nan, pi

import pytest
import torch
from torch import nn

from attack_table import make_objective, small_images, small_model
from eat_dist.attacks import ATTACKS, Ball, Best, Bpda, MemberSum, Reading, WhiteBox, ascend, seeded
from eat_dist.attacks.ball import Norm
from eat_dist.config import AttackConfig
from eat_dist.errors import ConfigError
from eat_dist.seeding import generator
from small_victims import recall_at_1, unseen_digits, victim

COUNT = 100


class Rippled(nn.Module):
    """A randomised defence: a fine ripple of random phase on every pixel, of height 0.05, five times its slope."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images + 0.05 * torch.sin(100 * images + 2 * pi * torch.rand_like(images)))


def to_eight_levels(images: torch.Tensor) -> torch.Tensor:
    return (images * 7).round() / 7


class Rounded(nn.Module):
    """A quantising defence: eight levels a pixel. Its gradient is zero everywhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(to_eight_levels(images))


def recall(defended: nn.Module, images: torch.Tensor) -> float:
    """R@1 of attacked unseen digits against the clean ones; the mean of ten fresh draws."""
    clean_images, labels = unseen_digits(COUNT)
    with torch.no_grad(), seeded(generator(9), "cpu"):
        clean = victim(hardened=False)(clean_images)
        return sum(recall_at_1(defended(images), clean, labels) for _ in range(10)) / 10


def broken_by(attacker: nn.Module, *, name: str = "pgd", norm: Norm = "linf", draws: int = 1) -> torch.Tensor:
    """Unseen digits attacked through ``attacker``: the defence itself, or what the attacker puts in its place."""
    images, labels = unseen_digits(COUNT)
    with torch.no_grad():
        clean = victim(hardened=False)(images)
    objective = make_objective("nearest_wrong_centroid", clean, labels, torch.arange(COUNT))
    epsilon = 0.15 if norm == "linf" else 0.9
    attack = ATTACKS[name](AttackConfig(name=name, norm=norm, epsilon=epsilon, num_steps=10))
    generators = [generator(5, row) for row in range(COUNT)]
    with seeded(generators, "cpu"):
        return attack(WhiteBox(attacker, objective, draws), images, generators=generators)


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_randomised_defence_that_withstands_plain_gradients_is_broken_with_eot(name: str) -> None:
    """Ten steps each: one draw a step sees little but the ripple's slope, twenty see what is under it."""
    defended = Rippled(victim(hardened=False))
    unattacked = recall(defended, unseen_digits(COUNT)[0])
    plain, expected = (recall(defended, broken_by(defended, name=name, draws=draws)) for draws in (1, 20))
    assert unattacked > 0.9
    assert plain > 0.6
    assert expected < 0.25


@pytest.mark.parametrize("name", ["pgd", "apgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_rounding_defence_without_gradient_is_broken_with_bpda(name: str, norm: Norm) -> None:
    model = victim(hardened=False)
    defended, through = Rounded(model), Bpda(to_eight_levels, model)
    assert recall(defended, unseen_digits(COUNT)[0]) > 0.9
    assert recall(defended, broken_by(defended, name=name, norm=norm)) > 0.8  # no better than its random start
    assert recall(defended, broken_by(through, name=name, norm=norm)) < 0.2


def test_bpda_computes_what_the_defence_computes_to_the_bit() -> None:
    model, images = small_model().eval(), small_images()
    assert torch.equal(Bpda(to_eight_levels, model)(images), Rounded(model)(images))


def test_bpda_goes_back_through_the_approximation() -> None:
    """d/dx of (round(7x)/7)²: nothing by itself; 2·round(7x)/7 · g'(x) with g in place of the rounding.

    At x = 0.5: 7x = 3.5 rounds to 4, so the value is (4/7)². g(x) = x gives 8/7, g(x) = 3x gives 24/7.
    """

    class Square(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).square()

    image = torch.full((1, 1, 1, 1), 0.5)
    for model, slope in (
        (Rounded(Square()), 0.0),
        (Bpda(to_eight_levels, Square()), 8 / 7),
        (Bpda(to_eight_levels, Square(), lambda x: 3 * x), 24 / 7),
    ):
        reading = WhiteBox(model, lambda embeddings: embeddings.sum(dim=1)).read(image)
        assert reading.values.tolist() == pytest.approx([16 / 49])
        assert reading.gradient.flatten().tolist() == pytest.approx([slope])


def test_an_approximation_of_another_shape_is_refused() -> None:
    model = Bpda(to_eight_levels, small_model().eval(), lambda images: images[:, :, :4])
    with pytest.raises(ConfigError, match=r"the transform's shape \(6, 1, 8, 8\); got \(6, 1, 4, 8\)"):
        model(small_images())


class Scaled(nn.Module):
    """Draws from a script: every pass multiplies by the next factor."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = list(factors)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.factors.pop(0) * images.flatten(1)


def test_a_reading_is_the_mean_of_its_draws() -> None:
    """Factors 1, 2 and 6: on the mean 3 times x, whose sum over two pixels of 0.5 is 3, with a slope of 3."""
    images = torch.full((2, 1, 1, 2), 0.5)
    surface = WhiteBox(Scaled(1, 2, 6, 1, 2, 6), lambda embeddings: embeddings.sum(dim=1), draws=3)
    reading = surface.read(images)
    assert reading.values.tolist() == [3.0, 3.0]
    assert reading.gradient.flatten().tolist() == [3.0] * 4
    assert reading.embeddings is not None
    assert reading.embeddings.tolist() == [[0.5, 0.5]] * 2
    assert surface.values(images).tolist() == [3.0, 3.0]
    assert MemberSum([surface, surface]).draws == 3


def slopes_of(*factors: float) -> torch.Tensor:
    """The gradient of a surface that averages as many draws; a factor that is NaN makes a slope so."""
    images = torch.full((1, 1, 1, 2), 0.5)
    return (
        WhiteBox(Scaled(*factors), lambda embeddings: embeddings.sum(dim=1), draws=len(factors)).read(images).gradient
    )


def test_one_draw_without_a_slope_does_not_undo_the_others() -> None:
    assert slopes_of(1, nan, 5).flatten().tolist() == [3.0, 3.0]
    assert slopes_of(nan, inf).isnan().all(), "where no draw has one, the check of gradients must see it"


def test_one_member_without_a_slope_does_not_undo_the_others() -> None:
    sound, broken = (WhiteBox(Scaled(factor), lambda embeddings: embeddings.sum(dim=1)) for factor in (3, nan))
    gradient = MemberSum([broken, sound]).read(torch.full((1, 1, 1, 2), 0.5)).gradient
    assert gradient.flatten().tolist() == pytest.approx([0.5**0.5] * 2)


class Lucky:
    """Image values by script: iterate k is truly worth ``worth[k]``, but its first reading may be a lucky one."""

    def __init__(self, worth: Sequence[float], first: Sequence[float], draws: int) -> None:
        self.worth, self.first, self.draws = worth, list(first), draws
        self.held = nullcontext

    def read(self, images: torch.Tensor) -> Reading:
        return Reading(torch.tensor([self.first.pop(0)]), torch.ones_like(images), None)

    def values(self, images: torch.Tensor) -> torch.Tensor:
        if self.first:
            return torch.tensor([self.first.pop(0)])
        return torch.tensor([self.worth[round(float(images) * 10)]])


@pytest.mark.parametrize(("draws", "chosen"), [(1, 1), (2, 3)])
def test_a_lucky_draw_does_not_win_where_readings_are_random(draws: int, chosen: int) -> None:
    """Iterates 0, 0.1, … 0.4. The second is worth nothing but read as 9 once; the fourth, worth 3, is the best.

    A surface that claims to answer always the same (one draw) has the lucky one taken: what the fresh reading is for.
    """
    surface = Lucky(worth=[0, 0, 1, 3, 2], first=[0, 9, 1, 2.5, 2], draws=draws)
    found = ascend(
        surface,
        torch.zeros(1, 1, 1, 1),
        start=torch.zeros(1, 1, 1, 1),
        step=lambda current, reading: current + 0.1 * reading.gradient,
        ball=Ball("linf", 1.0),
        num_steps=4,
        keep="best",
    )
    assert round(float(found.images) * 10) == chosen


def test_the_finalists_are_the_largest_values_each_images_own() -> None:
    """Seven rounds, five places. Image 0 is best in round 6, image 1 in round 0; each one's two worst are out."""
    best, values = Best(finalists=5), [[1, 7], [2, 6], [3, 5], [4, 4], [5, 3], [6, 2], [7, 1]]
    taken = [best.see(torch.full((2, 1, 1, 1), float(k)), torch.tensor(row)).tolist() for k, row in enumerate(values)]
    assert taken == [[True, True]] + [[True, False]] * 6
    asked: list[list[float]] = []

    class Asked(WhiteBox):
        def values(self, images: torch.Tensor) -> torch.Tensor:
            asked.append(images.flatten().tolist())
            return torch.tensor([float(images[0] == 3), float(images[1] == 4)])

    chosen = best.settled(Asked(nn.Identity(), lambda embeddings: embeddings, draws=2))
    assert asked == [[6, 0], [5, 1], [4, 2], [3, 3], [2, 4]]
    assert chosen.flatten().tolist() == [3, 4]


def test_what_a_model_draws_repeats_with_the_generators_and_disturbs_nobody() -> None:
    images, model = small_images(), Rippled(small_model().eval())
    before = torch.get_rng_state()

    def drawn(*seeds: int) -> torch.Tensor:
        generators = [generator(seed) for seed in seeds]
        with torch.no_grad(), seeded(generators, "cpu"):
            embeddings: torch.Tensor = model(images)
        # The generators themselves go on as if nothing had been.
        assert torch.rand(3, generator=generators[0]).tolist() == torch.rand(3, generator=generator(seeds[0])).tolist()
        return embeddings

    first = drawn(1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn(1, 2), first)
    assert not torch.equal(drawn(1, 3), first)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))  # the control: outside nothing repeats


def test_the_global_generator_is_restored_when_the_attack_fails() -> None:
    def failing() -> None:
        torch.rand(1)
        raise RuntimeError("out of memory, say")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"), seeded(generator(0), "cpu"):
        failing()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["pgd", "mi_fgsm", "apgd", "random_noise"])
def test_an_attack_on_a_randomised_model_repeats_inside_seeded(name: str) -> None:
    model, images = Rippled(small_model()), small_images()
    surface = WhiteBox(model, lambda embeddings: embeddings[:, 0], draws=3)
    attack = ATTACKS[name](AttackConfig(name=name, epsilon=0.1, num_steps=3))

    def attacked(seed: int) -> torch.Tensor:
        with seeded(generator(seed), "cpu"):
            return attack(surface, images, generators=generator(seed))

    assert torch.equal(attacked(1), attacked(1))
    assert not torch.equal(attacked(1), attacked(2))
