"""Auto-PGD against the paper: its schedule by hand, a plain reference implementation, and what it adds to PGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fractions import Fraction
from math import ceil

import pytest
import torch

from attack_table import OBJECTIVES, make_objective, small_images, small_model, small_objective
from eat_dist.attacks import ATTACKS, Ball, Best, GradientAttack, Reading, WhiteBox
from eat_dist.attacks.apgd import AutoPgd, AutoStep, checkpoints
from eat_dist.attacks.ball import Norm
from eat_dist.config import AttackConfig
from eat_dist.seeding import generator
from small_victims import unseen_digits, victim


def test_the_checkpoints_are_those_of_the_paper() -> None:
    """p = 0.22, 0.41 (+0.19), 0.57 (+0.16), 0.70, 0.80, 0.87, 0.93 (+0.06: the least), 0.99; ⌈p·N⌉ below N.

    N = 50: 11, 20.5, 28.5, 35, 40, 43.5, 46.5, 49.5. N = 5: 1.1, 2.05, 2.85, 3.5, 4, then 5. N = 1: none.
    """
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(50) == [11, 21, 29, 35, 40, 44, 47]
    assert checkpoints(5) == [2, 3, 4]
    assert checkpoints(1) == []


def step_sizes(stories: Sequence[Sequence[float]]) -> torch.Tensor:
    """[N, B] the steps that are taken while iterate k of image b has the value ``stories[b][k]``; the first is 1.

    One pixel and no momentum (α = 1): whatever the story, the iterate is at 0, the left end of a ball of radius 1/2,
    and the gradient points right. So the step leads to the step size itself.
    """
    values = torch.tensor(stories).T
    attack = AutoPgd(Ball("linf", 0.5), num_steps=len(values), random_start=False, momentum=1.0)
    images = torch.full((len(stories), 1, 1, 1), 0.5)
    step = AutoStep(attack, images, Best())
    left = torch.zeros_like(images)
    return torch.stack([step(left, Reading(row, torch.ones_like(left), None)).flatten() for row in values])


def test_the_step_size_halves_where_the_paper_says() -> None:
    """N = 10: checkpoints at ⌈2.2⌉ = 3, ⌈4.1⌉ = 5, ⌈5.7⌉ = 6, 7, 8 and ⌈8.7⌉ = 9; ρ = 0.75.

    Image 0 rises at every step: never halved.
    Image 1 falls at every step: halved at all six.
    Image 2 falls to 2 and to 6. At 3: 2 of 3 rises are fewer than 2.25, halved. At 5: 2 of 2. At 6: 0 of 1, halved.
    Then 1 of 1 rises each time, to a new best value: no more.
    Image 3 begins at its best value, falls, and rises without reaching it. At 3: 2 of 3 rises, halved. At 5: all rises
    and no new best value, but condition 2 asks for an unchanged step, and it was halved at 3. At 6: condition 2 holds,
    halved. At 7: halved at 6, so not. At 8: condition 2, halved. At 9: not.
    """
    sizes = step_sizes(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
            [0, 1, 0.5, 2, 3, 4, 3.5, 5, 6, 7],
            [9, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        ]
    )
    assert sizes[:, 0].tolist() == [1] * 10
    assert sizes[:, 1].tolist() == [1, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]
    assert sizes[:, 2].tolist() == [1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4]
    assert sizes[:, 3].tolist() == [1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]


def test_a_hundred_steps_without_progress_halve_at_the_papers_eight_checkpoints() -> None:
    sizes = step_sizes([[0.0] * 100])[:, 0]
    assert [k for k in range(1, 100) if sizes[k] < sizes[k - 1]] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert float(sizes[-1]) == 2.0**-8


Oracle = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


def reference(oracle: Oracle, x: torch.Tensor, norm: Norm, epsilon: float, num_steps: int) -> tuple[torch.Tensor, int]:
    """Algorithm 1 for one image [1, C, H, W] from the image itself, in the paper's words and order.

    It keeps every iterate and every value, and goes through them again at every checkpoint. As in the authors' code, a
    return to the best point replaces the iterate that the checkpoint has just read.

    Returns:
        The best point, and how often the step was halved.
    """

    def project(z: torch.Tensor) -> torch.Tensor:
        if norm == "linf":
            z = torch.min(torch.max(z, x - epsilon), x + epsilon)
        elif (z - x).norm() > epsilon:
            z = x + epsilon * (z - x) / (z - x).norm()
        return z.clamp(0, 1)

    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    w = [ceil(share * num_steps) for share in p]
    step, halvings, halved_at = 2 * epsilon, 0, 0
    points, values, gradients = [x], [], []
    for k in range(num_steps):
        value, gradient = oracle(points[k])
        values.append(value)
        gradients.append(gradient)
        if k in w[1:]:
            before = w[w.index(k) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(before, k))
            same_best = max(values[: k + 1]) == max(values[: before + 1])
            if rises < 0.75 * (k - before) or (same_best and (halved_at != before or before == 0)):
                step, halvings, halved_at = step / 2, halvings + 1, k
                best = max(range(k + 1), key=values.__getitem__)
                points[k], gradients[k] = points[best], gradients[best]
        direction = gradients[k].sign() if norm == "linf" else gradients[k] / gradients[k].norm()
        z = project(points[k] + step * direction)
        points.append(z if k == 0 else project(points[k] + 0.75 * (z - points[k]) + 0.25 * (points[k] - points[k - 1])))
    values.append(oracle(points[-1])[0])
    return points[max(range(len(values)), key=values.__getitem__)], halvings


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_equals_a_plain_implementation_of_the_algorithm_image_by_image(norm: Norm) -> None:
    model, images = small_model(torch.float64).eval(), small_images(torch.float64)
    attack = ATTACKS["apgd"](AttackConfig(name="apgd", norm=norm, epsilon=0.3, num_steps=40, random_start=False))
    together = attack(WhiteBox(model, small_objective(model)), images, generators=generator(0))
    halvings = []
    for row in range(6):
        objective = small_objective(model, torch.tensor([row]))

        def oracle(x: torch.Tensor, objective=objective) -> tuple[float, torch.Tensor]:  # type: ignore[no-untyped-def]
            x = x.clone().requires_grad_(True)
            value = objective(model(x))
            return value.item(), torch.autograd.grad(value, x)[0]

        expected, count = reference(oracle, images[[row]], norm, 0.3, 40)
        torch.testing.assert_close(together[[row]], expected, rtol=0, atol=1e-9)
        halvings.append(count)
    assert len(set(halvings)) > 1  # they halve at different times: what the batch has to keep apart
    assert min(halvings) > 0


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.6)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_reaches_at_least_what_pgd_reaches_with_as_many_gradients(
    name: str, norm: Norm, epsilon: float, hardened: bool
) -> None:
    """In the mean over 100 images, 20 gradients each; PGD keeps its best iterate, too."""
    model, (images, labels) = victim(hardened=hardened), unseen_digits(100)
    with torch.no_grad():
        clean = model(images)
    objective = make_objective(name, clean, labels, torch.arange(100))
    surface, generators = WhiteBox(model, objective), [generator(3, row) for row in range(100)]
    pgd = GradientAttack(Ball(norm, epsilon), num_steps=20, step_size=epsilon / 8, random_start=True, keep="best")
    apgd = ATTACKS["apgd"](AttackConfig(name="apgd", norm=norm, epsilon=epsilon, num_steps=20))
    with torch.no_grad():
        reached_by_pgd = surface.values(pgd(surface, images, generators=generators)).mean()
        generators = [generator(3, row) for row in range(100)]
        reached = surface.values(apgd(surface, images, generators=generators)).mean()
        untouched = objective(clean).mean()
    assert untouched < reached_by_pgd <= reached


def test_the_best_iterate_is_kept_even_if_it_is_the_start() -> None:
    class Falling:
        """Each reading is worse than the one before, and the gradient points on."""

        draws, asked = 1, 0
        held = nullcontext

        def read(self, images: torch.Tensor) -> Reading:
            return Reading(self.values(images), torch.ones_like(images), None)

        def values(self, images: torch.Tensor) -> torch.Tensor:
            self.asked += 1
            return torch.full((len(images),), -float(self.asked))

    attack, surface = AutoPgd(Ball("linf", 0.1), num_steps=5, random_start=False), Falling()
    assert torch.equal(attack(surface, small_images(), generators=generator(0)), small_images())
    assert surface.asked == 6
