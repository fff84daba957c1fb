"""The set that an attack may move in."""

from __future__ import annotations

import pytest
import torch

from eat_dist.attacks import Ball
from eat_dist.attacks.ball import Norm
from eat_dist.seeding import generator


@pytest.mark.parametrize(
    ("norm", "perturbed", "expected"),
    [
        # Around (0.5, 0.9) with ε = 0.25. L∞: each pixel to ±0.25, then to the pixel range.
        ("linf", (0.6, 0.8), (0.6, 0.8)),
        ("linf", (0.9, 0.2), (0.75, 0.65)),
        ("linf", (0.1, 1.1), (0.25, 1.0)),
        # L2: the offset (0.3, −0.4) of length 0.5 is halved; (0.6, 0.8), of length 1, quartered, then cut at 1.
        ("l2", (0.6, 0.8), (0.6, 0.8)),
        ("l2", (0.8, 0.5), (0.65, 0.7)),
        ("l2", (1.1, 1.7), (0.65, 1.0)),
    ],
)
def test_projection_by_hand(norm: Norm, perturbed: tuple[float, ...], expected: tuple[float, ...]) -> None:
    images = torch.tensor((0.5, 0.9)).view(1, 1, 1, 2)
    projected = Ball(norm, 0.25).project(torch.tensor(perturbed).view_as(images), images)
    torch.testing.assert_close(projected, torch.tensor(expected).view_as(images), rtol=0, atol=1e-6)


def test_l0_projection_keeps_the_largest_changes_by_hand() -> None:
    """Half of four pixels may change; a pixel counts by its largest channel. Changes: 0.1, 0.4, 0.3 and 0.2."""
    images = torch.full((1, 2, 2, 2), 0.5)
    change = torch.tensor([[[0.1, 0.0], [-0.3, 0.2]], [[0.0, 0.4], [0.1, 0.2]]])[None]
    kept = torch.tensor([[[0.0, 0.0], [-0.3, 0.0]], [[0.0, 0.4], [0.1, 0.0]]])[None]
    torch.testing.assert_close(Ball("l0", 0.5).project(images + change, images), images + kept)


@pytest.mark.parametrize("norm", ["linf", "l2", "l0"])
def test_no_argument_of_a_projection_is_changed(norm: Norm) -> None:
    images = torch.rand(5, 3, 4, 4, generator=generator(0))
    perturbed = images + torch.randn(images.shape, generator=generator(1))
    before = images.clone(), perturbed.clone()
    projected = Ball(norm, 0.2).project(perturbed, images)
    assert torch.equal(images, before[0])
    assert torch.equal(perturbed, before[1])
    assert not torch.equal(projected, perturbed)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_idempotent_and_no_point_of_the_ball_is_nearer(norm: Norm) -> None:
    ball, plane = Ball(norm, 0.2), Ball("l2", 0.2)
    images = 0.3 + 0.4 * torch.rand(50, 1, 3, 3, generator=generator(0), dtype=torch.float64)  # balls within the box
    perturbed = images + 0.3 * torch.randn(images.shape, generator=generator(1), dtype=torch.float64)
    projected = ball.project(perturbed, images)
    torch.testing.assert_close(ball.project(projected, images), projected, rtol=0, atol=1e-15)
    nearest = plane.distances(projected, perturbed)
    assert float(nearest.min()) > 0  # all began outside
    for seed in range(100):
        point = ball.random_point(images, generator(seed))
        assert bool((plane.distances(point, perturbed) >= nearest - 1e-12).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_points_fill_the_ball_evenly(norm: Norm) -> None:
    """In n dimensions (radius / ε)^n of a point drawn evenly from a ball is uniform on [0, 1]: mean 1/2, variance 1/12.

    The radius is in the ball's own norm, so the claim is the same for both. 4,000 draws: standard error 0.0046.
    """
    images = torch.full((4000, 1, 2, 2), 0.5)
    ball = Ball(norm, 0.3)
    points = ball.random_point(images, generator(0))
    assert float(ball.distances(points, images).max()) <= 0.3 + 1e-6
    volumes = (ball.distances(points, images) / 0.3) ** 4
    assert float(volumes.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(volumes.var()) == pytest.approx(1 / 12, abs=0.01)
    assert float((points - images).mean(dim=0).abs().max()) < 0.01


def test_random_points_in_l0_change_exactly_their_share_of_the_pixels_and_every_pixel_in_turn() -> None:
    """Two of eight pixels, each chosen in a quarter of 4,000 draws: standard error 0.007."""
    images = torch.full((4000, 3, 2, 4), 0.5)
    points = Ball("l0", 0.25).random_point(images, generator(0))
    changed = (points != images).any(dim=1)
    assert bool((changed.flatten(1).sum(dim=1) == 2).all())
    assert float((changed.float().mean(dim=0) - 0.25).abs().max()) < 0.03


def test_random_points_are_clipped_to_the_pixel_range() -> None:
    for norm in ("linf", "l2"):
        points = Ball(norm, 0.5).random_point(torch.zeros(20, 1, 2, 2), generator(0))
        assert float(points.min()) == 0
        assert 0 < float(points.max()) <= 0.5 + 1e-6


def test_the_steepest_direction_by_hand() -> None:
    gradient = torch.tensor([[3.0, -4.0], [0.0, 0.0], [0.0, 2e-6]]).view(3, 1, 1, 2)
    signs = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 1.0]]).view(3, 1, 1, 2)
    units = torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.0, 1.0]]).view(3, 1, 1, 2)
    assert torch.equal(Ball("linf", 0.1).steepest(gradient), signs)
    torch.testing.assert_close(Ball("l2", 0.1).steepest(gradient), units)


def test_distances_by_hand() -> None:
    """One image of two channels and four pixels, of which two change: (0.3, 0) and (0, −0.4)."""
    images = torch.full((1, 2, 2, 2), 0.5)
    change = torch.tensor([[[0.3, 0.0], [0.0, 0.0]], [[0.0, -0.4], [0.0, 0.0]]])[None]
    expected: dict[Norm, float] = {"linf": 0.4, "l2": 0.5, "l0": 0.5}
    for norm, distance in expected.items():
        assert float(Ball(norm, 1.0).distances(images + change, images)) == pytest.approx(distance)
