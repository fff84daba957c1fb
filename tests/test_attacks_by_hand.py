"""Attacks and objectives on embeddings of two numbers, where the answer is known by hand.

Images have two pixels. Under :class:`Plane` the embedding is the image's offset from a pivot, so an objective of
cosines depends on the angle alone; the optimum is a corner of the L∞ square, or a point of the L2 circle.
"""

from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch import nn

from attack_table import small_images, small_model, small_objective
from eat_dist.attacks import ATTACKS, Ball, Best, Reading, Transfer, WhiteBox
from eat_dist.attacks.ball import Norm
from eat_dist.attacks.objectives import (
    class_centroids,
    displacement,
    draw_wrong_classes,
    nearest_negative,
    nearest_wrong_centroid,
    proxy_anchor,
    random_wrong_centroid,
)
from eat_dist.config import AttackConfig
from eat_dist.seeding import generator


class Plane(nn.Module):
    """The two pixels less a pivot, as embedding; optionally scaled to length 1."""

    def __init__(self, *pivot: float, on_circle: bool = False) -> None:
        super().__init__()
        self.pivot, self.on_circle = torch.tensor(pivot, dtype=torch.float64), on_circle

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        offset = images.flatten(1) - self.pivot
        return nn.functional.normalize(offset, dim=1) if self.on_circle else offset


def two_pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 2)


AXES = torch.eye(2, dtype=torch.float64)
CLASS_0 = torch.tensor([0])
CLIMBING = ("fgsm", "pgd", "mi_fgsm", "apgd")


def attacked(
    name: str, surface: WhiteBox, image: torch.Tensor, norm: Norm, epsilon: float, **more: float
) -> list[float]:
    config = AttackConfig(name=name, norm=norm, epsilon=epsilon, **({"num_steps": 40} | more))  # type: ignore[arg-type]
    adversarial: list[float] = ATTACKS[name](config)(surface, image, generators=[generator(0)]).flatten().tolist()
    return adversarial


@pytest.mark.parametrize("name", CLIMBING)
def test_the_optimum_of_a_cosine_margin_is_a_corner_of_the_square(name: str) -> None:
    """Embedding (x, y) of the pixels (0.5, 0.3), class 0 with its centroid on the x axis, class 1 on the y axis.

    Margin (y − x)/√(x² + y²): it rises with the angle, so with y and with falling x: to (0.4, 0.4) for ε = 0.1, where
    both centroids are equally near and the margin is 0.
    """
    surface = WhiteBox(Plane(0.0, 0.0, on_circle=True), nearest_wrong_centroid(AXES, CLASS_0))
    assert attacked(name, surface, two_pixels(0.5, 0.3), "linf", 0.1) == pytest.approx([0.4, 0.4], abs=1e-6)


@pytest.mark.parametrize("name", CLIMBING)
def test_the_pixel_range_cuts_the_corner(name: str) -> None:
    """As above from (0.5, 0.95) seen from the pivot (0, 0.5): y may only rise to 1."""
    surface = WhiteBox(Plane(0.0, 0.5), nearest_wrong_centroid(AXES, CLASS_0))
    assert attacked(name, surface, two_pixels(0.5, 0.95), "linf", 0.1) == pytest.approx([0.4, 1.0], abs=1e-6)


@pytest.mark.parametrize("name", ["pgd", "mi_fgsm", "apgd"])
def test_the_optimum_of_a_cosine_margin_in_l2_touches_the_tangent_from_the_pivot(name: str) -> None:
    """The largest angle within ε of an image at distance r and angle φ is φ + asin(ε/r), on the tangent of the circle.

    Pixels (0.6, 0.2) are r = √0.4 from the pivot 0 at φ = atan(1/3); ε = 0.2 gives asin(0.2/√0.4) = 0.3218 = φ: twice
    φ, at the tangent's length √(r² − ε²) = 0.6: (0.6·cos 2φ, 0.6·sin 2φ) = (0.6·0.8, 0.6·0.6) = (0.48, 0.36).
    """
    surface = WhiteBox(Plane(0.0, 0.0, on_circle=True), nearest_wrong_centroid(AXES, CLASS_0))
    reached = attacked(name, surface, two_pixels(0.6, 0.2), "l2", 0.2, num_steps=100)
    assert reached == pytest.approx([0.48, 0.36], abs=0.01 if name == "pgd" else 0.005)
    (value,) = surface.values(two_pixels(*reached)).tolist()
    assert value == pytest.approx(0.6 - 0.8, abs=1e-3 if name == "pgd" else 1e-4)  # PGD's steps do not get shorter


def test_fgsm_in_l2_goes_all_of_epsilon_along_the_gradient() -> None:
    """cos to the y axis at (0.6, 0.2): its gradient is perpendicular to the offset, (−1, 3)/√10."""
    surface = WhiteBox(Plane(0.0, 0.0), random_wrong_centroid(AXES, torch.tensor([1])))
    expected = [0.6 - 0.1 / sqrt(10), 0.2 + 0.3 / sqrt(10)]
    assert attacked("fgsm", surface, two_pixels(0.6, 0.2), "l2", 0.1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["pgd", "mi_fgsm", "apgd"])
@pytest.mark.parametrize(("norm", "distance"), [("linf", 0.1 * sqrt(2)), ("l2", 0.1)])
def test_displacement_ends_at_a_corner_or_on_the_circle(name: str, norm: Norm, distance: float) -> None:
    """The clean embedding is at the centre: every corner, every point of the circle is farthest."""
    surface = WhiteBox(Plane(0.0, 0.0), displacement(two_pixels(0.5, 0.4).flatten(1)))
    x, y = attacked(name, surface, two_pixels(0.5, 0.4), norm, 0.1)
    assert sqrt((x - 0.5) ** 2 + (y - 0.4) ** 2) == pytest.approx(distance, abs=1e-6)


def test_displacement_does_not_move_from_the_image_itself() -> None:
    """Its gradient there is zero: why it needs a random start, and why FGSM says nothing about it."""
    surface = WhiteBox(Plane(0.0, 0.0), displacement(two_pixels(0.5, 0.4).flatten(1)))
    assert attacked("fgsm", surface, two_pixels(0.5, 0.4), "linf", 0.1) == [0.5, 0.4]


@pytest.mark.parametrize("name", ["pgd", "mi_fgsm", "apgd"])
@pytest.mark.parametrize(("own", "corner"), [(0, [0.55, 0.45]), (1, [0.45, 0.45])])
def test_every_objective_draws_the_embedding_to_the_other_class(name: str, own: int, corner: list[float]) -> None:
    """Seen from the pivot (0.5, 0.5) the image (0.5, 0.4) is below, class 0 to the left and class 1 to the right.

    Every objective is then a rising function of the angle towards the other class alone (cosines ± cos θ). Within
    ε = 0.05 it is largest, −45° or −135°, at that side's upper corner.
    """
    centroids = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    label = torch.tensor([own])
    nobody = torch.tensor([-1])
    for objective in (
        nearest_wrong_centroid(centroids, label),
        random_wrong_centroid(centroids, 1 - label),
        nearest_negative(centroids, torch.arange(2), labels=label, own=nobody),
        proxy_anchor(centroids, label),
    ):
        surface = WhiteBox(Plane(0.5, 0.5), objective)
        assert attacked(name, surface, two_pixels(0.5, 0.4), "linf", 0.05) == pytest.approx(corner, abs=1e-6)


def test_momentum_by_hand() -> None:
    """Equation (6) with μ = 1 and gradients (4, 0), (−1, 1), (−9, 11): lengths in L1 are 4, 2 and 20.

    Accumulated: (1, 0), (0.5, 0.5), (0.05, 1.05); by lengths in L2 the last would have turned to the left. In L∞, steps
    of 0.1: from (0.5, 0.5) to (0.6, 0.5), (0.7, 0.6), (0.8, 0.7). PGD would have turned back at the second step.
    """
    gradients = [(4.0, 0.0), (-1.0, 1.0), (-9.0, 11.0)]

    class Scripted(WhiteBox):
        def read(self, images: torch.Tensor) -> Reading:
            asked.append(images.flatten().tolist())
            return Reading(torch.tensor([float(len(asked))]), two_pixels(*gradients[len(asked) - 1]), None)

        def values(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([9.0])

    asked: list[list[float]] = []
    surface = Scripted(Plane(0.0, 0.0), displacement(AXES))
    settings = {"num_steps": 3, "step_size": 0.1, "random_start": False}
    final = attacked("mi_fgsm", surface, two_pixels(0.5, 0.5), "linf", 0.5, **settings)
    for reached, expected in zip([*asked, final], [[0.5, 0.5], [0.6, 0.5], [0.7, 0.6], [0.8, 0.7]], strict=True):
        assert reached == pytest.approx(expected)


def test_random_noise_is_the_best_of_its_draws() -> None:
    """The same generator gives the same points one by one; with more of them the best can only get better."""
    model = small_model().eval()
    surface, images = WhiteBox(model, small_objective(model)), small_images()
    ball, source = Ball("linf", 0.1), generator(4)
    with torch.no_grad():
        drawn = [ball.random_point(images, source) for _ in range(8)]
        values = torch.stack([surface.values(points) for points in drawn])
    for count in (1, 2, 8):
        noise = ATTACKS["random_noise"](AttackConfig(name="random_noise", epsilon=0.1, num_steps=count))
        chosen = noise(surface, images, generators=generator(4))
        assert torch.equal(surface.values(chosen), values[:count].amax(dim=0))
    assert len(set(values.argmax(dim=0).tolist())) > 1  # the choice is each image's own


def test_a_transfer_attack_climbs_its_source_and_never_asks_the_victim() -> None:
    """The source draws to the y axis, the victim would draw to the x axis, and fails if it is asked."""

    class Silent(WhiteBox):
        def read(self, images: torch.Tensor) -> Reading:
            raise AssertionError("the victim was asked for a gradient")

        def values(self, images: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the victim was asked for values")

    plane = Plane(0.0, 0.0)
    source = WhiteBox(plane, random_wrong_centroid(AXES, torch.tensor([1])))
    apgd = ATTACKS["apgd"](AttackConfig(name="apgd", epsilon=0.1, num_steps=10))
    transfer = Transfer(apgd, source)
    victim = Silent(plane, random_wrong_centroid(AXES, torch.tensor([0])))
    image = two_pixels(0.5, 0.5)
    adversarial = transfer(victim, image, generators=generator(0))
    assert adversarial.flatten().tolist() == pytest.approx([0.4, 0.6], abs=1e-6)
    assert torch.equal(adversarial, apgd(source, image, generators=generator(0)))
    assert (transfer.ball, transfer.passes) == (apgd.ball, apgd.passes)


def test_the_best_is_each_images_own_and_the_earlier_of_two_equal_ones() -> None:
    best = Best()
    rounds = [([1.0, 5.0], [True, True]), ([2.0, 5.0], [True, False]), ([0.0, 6.0], [False, True])]
    for number, (values, taken) in enumerate(rounds):
        assert best.see(torch.full((2, 1, 1, 1), float(number)), torch.tensor(values)).tolist() == taken
    assert best.images.flatten().tolist() == [1.0, 2.0]
    assert best.values.tolist() == [2.0, 6.0]


def test_the_objectives_by_hand() -> None:
    """Centroids on the three axes; the embedding (0.6, 0.8, 0) of class 0 is nearest to the wrong axis 1.

    Proxy Anchor with α = 32, δ = 0.1: cosines 0.6 (own), 0.8 and 0. log(1 + e^(−32·0.5)) for the own one; a third of
    log(1 + e^(32·0.9)) = 28.8 and of log(1 + e^3.2) for the others.
    """
    centroids, labels = torch.eye(3), torch.tensor([0])
    embedding = torch.tensor([[1.2, 1.6, 0.0]])  # length 2: the objectives take cosines
    assert float(nearest_wrong_centroid(centroids, labels)(embedding)) == pytest.approx(0.8 - 0.6)
    assert float(random_wrong_centroid(centroids, torch.tensor([2]))(embedding)) == pytest.approx(0.0)
    assert float(random_wrong_centroid(centroids, torch.tensor([1]))(embedding)) == pytest.approx(0.8)
    assert float(displacement(torch.tensor([[1.2, 0.6, 0.0]]))(embedding)) == pytest.approx(1.0)
    expected = log(1 + exp(-16)) + (28.8 + log(1 + exp(3.2))) / 3
    assert float(proxy_anchor(centroids, labels)(embedding)) == pytest.approx(expected, rel=1e-6)
    centroid = class_centroids(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(centroid, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_the_nearest_negative_by_hand() -> None:
    """Gallery on the axes x, y, z and −x, of classes 0, 0, 1, 1; the query (0.6, 0.8, 0) is of class 0.

    Negatives: cosines 0 and −0.6; positives 0.6 and 0.8. Without its own copy (the y axis) the nearest positive is at
    0.6; without any positive, the positives do not count.
    """
    gallery = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 1], [-1, 0, 0]])
    classes, query, label = torch.tensor([0, 0, 1, 1]), torch.tensor([[1.2, 1.6, 0.0]]), torch.tensor([0])
    for first, own, expected in ((0, -1, -0.8), (0, 1, -0.6), (1, 0, 0.0), (0, 2, -1.4)):
        objective = nearest_negative(gallery[first:], classes[first:], labels=label, own=torch.tensor([own]))
        assert float(objective(query)) == pytest.approx(expected)


def test_the_nearest_negative_in_a_gallery_of_several_blocks_is_that_of_a_plain_comparison_with_all() -> None:
    """Values and gradients; 9,000 samples are three blocks."""
    gallery = torch.randn(9000, 8, dtype=torch.float64, generator=generator(0, "gallery"))
    classes = torch.arange(9000) % 300
    rows = torch.tensor([0, 4095, 4096, 8999])
    embeddings = torch.randn(4, 8, dtype=torch.float64, generator=generator(0, "embeddings")).requires_grad_(True)
    values = nearest_negative(gallery, classes, labels=classes[rows], own=rows)(embeddings)
    (gradient,) = torch.autograd.grad(values.sum(), embeddings)

    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], gallery[None], dim=2)
    same = classes == classes[rows, None]
    itself = torch.arange(9000) == rows[:, None]
    negative = cosines.masked_fill(same, float("-inf")).amax(dim=1)
    expected = negative - cosines.masked_fill(~same | itself, float("-inf")).amax(dim=1)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), embeddings)[0])


def test_drawn_classes_are_wrong_and_every_wrong_class_is_drawn() -> None:
    labels = torch.arange(4).repeat(100)
    drawn = draw_wrong_classes(labels, 4, generator(0))
    assert set(zip(labels.tolist(), drawn.tolist(), strict=True)) == {
        (i, j) for i in range(4) for j in range(4) if i != j
    }
    with pytest.raises(ValueError, match="at least two classes; got 1"):
        draw_wrong_classes(torch.zeros(3, dtype=torch.int64), 1, generator(0))
