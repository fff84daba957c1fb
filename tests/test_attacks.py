"""One table of attacks, norms and settings, and the claims that hold for every row of it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from eat_dist.attacks import ATTACKS, Ball, GradientAttack, Objective, WhiteBox, ascend, frozen, steepest_ascent
from eat_dist.attacks.ball import Norm
from eat_dist.attacks.objectives import (
    batch_loss,
    class_centroids,
    displacement,
    draw_wrong_classes,
    nearest_wrong_centroid,
    random_wrong_centroid,
)
from eat_dist.config import AttackConfig, LossConfig, ModelConfig
from eat_dist.losses import make_loss
from eat_dist.models import build_embedder
from eat_dist.seeding import generator

SETTINGS = {
    "small": {"epsilon": 0.03},
    "one step": {"epsilon": 0.1, "num_steps": 1},
    "large, cut by the pixel range": {"epsilon": 0.6, "num_steps": 3},
    "from the image": {"epsilon": 0.1, "random_start": False},
    "steps longer than the ball": {"epsilon": 0.05, "step_size": 0.4, "num_steps": 2},
}
TABLE = [
    pytest.param(
        AttackConfig(name=name, norm=norm, **({"num_steps": 4} | SETTINGS[setting])), id=f"{name}-{norm}-{setting}"
    )
    for name, norm, setting in product(ATTACKS, ("linf", "l2"), SETTINGS)
]
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fresh weights, and BatchNorm statistics of real batches."""
    config = ModelConfig(widths=(4, 8), embedding_dim=6)
    model = build_embedder(config, in_channels=1, generator=generator(0, "weights")).to(dtype)
    model(torch.rand(32, 1, 8, 8, generator=generator(0, "warm-up"), dtype=dtype))
    return model


def small_images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Six images, some pixels at the ends of the range."""
    images = torch.rand(6, 1, 8, 8, generator=generator(0, "images"), dtype=dtype)
    images[:, :, 0] = 0
    images[:, :, 1] = 1
    return images


def small_loss(dtype: torch.dtype = torch.float32) -> nn.Module:
    return make_loss(LossConfig(), num_classes=3, embedding_dim=6, generator=generator(0, "proxies")).to(dtype)


def craft(config: AttackConfig, model: nn.Module, objective: Objective, *, seed: int = 0) -> torch.Tensor:
    return ATTACKS[config.name](config)(WhiteBox(model, objective), small_images(), generators=generator(seed))


def distances(perturbed: torch.Tensor, images: torch.Tensor, norm: str) -> torch.Tensor:
    return (perturbed - images).flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1)


@pytest.mark.parametrize("config", TABLE)
def test_every_attack_stays_inside_the_epsilon_ball_and_the_pixel_range(config: AttackConfig) -> None:
    images = small_images()
    adversarial = craft(config, small_model(), batch_loss(small_loss(), LABELS))
    assert adversarial.shape == images.shape
    assert not adversarial.requires_grad
    assert float(distances(adversarial, images, config.norm).max()) <= config.epsilon + 1e-6
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert not torch.equal(adversarial, images)


@pytest.mark.parametrize("config", TABLE)
def test_every_attack_with_radius_zero_is_the_identity(config: AttackConfig) -> None:
    config = AttackConfig(**(config.model_dump() | {"epsilon": 0.0}))
    assert torch.equal(craft(config, small_model(), batch_loss(small_loss(), LABELS)), small_images())


@pytest.mark.parametrize("config", TABLE)
def test_every_attack_leaves_model_loss_and_input_as_they_were(config: AttackConfig) -> None:
    model, loss, images = small_model().train(), small_loss(), small_images()
    model.head.eval()  # a mixture of modes must come back as a mixture
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)

    def everything() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in (model.state_dict() | loss.state_dict()).items()}

    def flags() -> tuple[list[bool], list[bool]]:
        return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    before, flags_before = everything(), flags()
    ATTACKS[config.name](config)(WhiteBox(model, batch_loss(loss, LABELS)), images, generators=generator(0))
    after = everything()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert flags() == flags_before
    assert len(set(flags_before[0])) == len(set(flags_before[1])) == 2
    assert torch.equal(images, small_images())
    assert not images.requires_grad
    with_grad = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_grad == ["head.weight"]
    assert bool((model.head.weight.grad == 1).all())
    assert loss.proxies.grad is None


@pytest.mark.parametrize("config", TABLE)
def test_every_attack_repeats_itself_with_the_same_generator(config: AttackConfig) -> None:
    objective = batch_loss(small_loss(), LABELS)
    first = craft(config, small_model(), objective, seed=1)
    assert torch.equal(first, craft(config, small_model(), objective, seed=1))
    if ATTACKS[config.name](config).random_start:
        assert not torch.equal(first, craft(config, small_model(), objective, seed=2))


@pytest.mark.parametrize("config", TABLE)
def test_every_attack_raises_its_objective_on_an_undefended_model(config: AttackConfig) -> None:
    model, objective = small_model().eval(), batch_loss(small_loss(), LABELS)
    with torch.no_grad():
        clean, attacked = (float(objective(model(x))) for x in (small_images(), craft(config, model, objective)))
    assert attacked > clean


def per_image_objectives(model: nn.Module, rows: torch.Tensor) -> dict[str, Objective]:
    """The objectives that promise not to look at the rest of the batch, for some of the six images."""
    with torch.no_grad():
        clean = model.eval()(small_images(torch.float64))
    centroids = class_centroids(clean, LABELS, 3)
    aims = draw_wrong_classes(LABELS, 3, generator(0, "aims"))
    return {
        # Not the clean embeddings themselves: there the gradient is zero and nothing moves without a random start.
        "displacement": displacement(clean[rows].roll(1, dims=1)),
        "nearest_wrong_centroid": nearest_wrong_centroid(centroids, LABELS[rows]),
        "random_wrong_centroid": random_wrong_centroid(centroids, aims[rows]),
    }


@pytest.mark.parametrize("name", ["displacement", "nearest_wrong_centroid", "random_wrong_centroid"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_per_image_objectives_do_not_depend_on_how_images_are_batched(norm: Norm, name: str) -> None:
    """Not promised for ``batch_loss``: Proxy Anchor's log-sum-exp couples the images of a batch (next test)."""
    model, images = small_model(torch.float64), small_images(torch.float64)
    attack = GradientAttack(Ball(norm, 0.1), num_steps=3, step_size=0.05, random_start=False)

    def attacked(rows: torch.Tensor) -> torch.Tensor:
        return attack(WhiteBox(model, per_image_objectives(model, rows)[name]), images[rows], generators=generator(0))

    together = attacked(torch.arange(6))
    alone = torch.cat([attacked(torch.tensor([row])) for row in range(6)])
    halves = torch.cat([attacked(torch.tensor([0, 1])), attacked(torch.tensor([2, 3, 4, 5]))])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-9)
    torch.testing.assert_close(halves, together, rtol=0, atol=1e-9)
    assert float(distances(together, images, norm).min()) > 0.05


def test_the_batch_loss_does_depend_on_the_batch() -> None:
    model, images, loss = small_model(torch.float64), small_images(torch.float64), small_loss(torch.float64)
    attack = GradientAttack(Ball("l2", 0.1), num_steps=3, step_size=0.05, random_start=False)
    together, half = (
        attack(WhiteBox(model, batch_loss(loss, LABELS[:count])), images[:count], generators=generator(0))
        for count in (6, 3)
    )
    assert float((together[:3] - half).abs().max()) > 1e-6


def test_fgsm_is_the_image_plus_epsilon_times_the_sign_of_the_gradient() -> None:
    model, loss, images = small_model().eval(), small_loss(), small_images().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(model(images), LABELS), images)
    expected = (images + 0.1 * gradient.sign()).clamp(0, 1)
    config = AttackConfig(name="fgsm", epsilon=0.1, num_steps=7, step_size=0.01)  # the last two have no meaning
    assert ATTACKS["fgsm"](config).num_steps == 1
    torch.testing.assert_close(craft(config, model, batch_loss(loss, LABELS)), expected.detach(), rtol=0, atol=1e-7)


def test_pgd_takes_two_and_a_half_radii_in_all_unless_told_otherwise() -> None:
    attack = ATTACKS["pgd"](AttackConfig(epsilon=0.2, num_steps=4, norm="l2"))
    assert attack == GradientAttack(Ball("l2", 0.2), num_steps=4, step_size=0.125, random_start=True)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_an_attack_in_two_stretches_equals_the_whole(norm: Norm, first: int) -> None:
    """What a relay relies on: its halves are handed from member to member."""
    attack = GradientAttack(Ball(norm, 0.1), num_steps=5, step_size=0.05, random_start=True)
    surface, images = WhiteBox(small_model(), batch_loss(small_loss(), LABELS)), small_images()
    whole = attack(surface, images, generators=generator(3))
    start = attack.start(images, generator(3))
    begun = attack.advance(surface, images, start, num_steps=first).images
    finished = attack.advance(surface, images, begun, num_steps=5 - first).images
    torch.testing.assert_close(finished, whole, rtol=0, atol=1e-6)


def test_first_embeddings_are_those_of_the_start_in_evaluation_mode() -> None:
    attack = GradientAttack(Ball("linf", 0.1), num_steps=2, step_size=0.05, random_start=True)
    model, images, objective = small_model().train(), small_images(), batch_loss(small_loss(), LABELS)
    start = attack.start(images, generator(3))
    surface = WhiteBox(model, objective)
    first = attack.advance(surface, images, start, num_steps=2).first_embeddings
    assert first is not None
    assert not first.requires_grad
    with torch.no_grad():
        assert torch.equal(first, model.eval()(start))
    assert attack.advance(surface, images, start, num_steps=0).first_embeddings is None


def test_a_start_outside_the_ball_is_projected_even_without_a_step() -> None:
    images = small_images()
    ball = Ball("linf", 0.1)
    steps = ascend(
        WhiteBox(small_model(), batch_loss(small_loss(), LABELS)),
        images,
        start=images + 5,
        step=steepest_ascent(ball, 0.1),
        ball=ball,
        num_steps=0,
    )
    assert torch.equal(steps.images, (images + 0.1).clamp(max=1))


def test_no_parameter_takes_part_in_the_attack() -> None:
    model = small_model().train()
    seen: list[bool] = []

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        seen.extend(parameter.requires_grad for parameter in model.parameters())
        seen.extend(module.training for module in model.modules())
        return embeddings.sum(dim=1)

    craft(AttackConfig(num_steps=2), model, objective)
    assert seen
    assert not any(seen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_objective_that_raises_leaves_modes_and_flags_restored() -> None:
    model = small_model().train()
    model.head.eval()
    modes = [module.training for module in model.modules()]

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory"):
        craft(AttackConfig(num_steps=2), model, objective)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_attack_works_where_gradients_are_switched_off() -> None:
    model, objective = small_model(), batch_loss(small_loss(), LABELS)
    outside = craft(AttackConfig(num_steps=2), model, objective)
    with torch.no_grad(), frozen(model):
        assert torch.equal(craft(AttackConfig(num_steps=2), model, objective), outside)


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


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_idempotent_and_no_point_of_the_ball_is_nearer(norm: Norm) -> None:
    ball = Ball(norm, 0.2)
    images = 0.3 + 0.4 * torch.rand(50, 1, 3, 3, generator=generator(0), dtype=torch.float64)  # balls within the box
    perturbed = images + 0.3 * torch.randn(images.shape, generator=generator(1), dtype=torch.float64)
    projected = ball.project(perturbed, images)
    torch.testing.assert_close(ball.project(projected, images), projected, rtol=0, atol=1e-15)
    nearest = distances(projected, perturbed, "l2")
    assert float(nearest.min()) > 0  # all began outside
    for seed in range(100):
        assert bool((distances(ball.random_point(images, generator(seed)), perturbed, "l2") >= nearest - 1e-12).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_points_fill_the_ball_evenly(norm: Norm) -> None:
    """In n dimensions (radius / ε)^n of a point drawn evenly from a ball is uniform on [0, 1]: mean 1/2, variance 1/12.

    The radius is in the ball's own norm, so the claim is the same for both. 4,000 draws: standard error 0.0046.
    """
    images = torch.full((4000, 1, 2, 2), 0.5)
    points = Ball(norm, 0.3).random_point(images, generator(0))
    assert float(distances(points, images, norm).max()) <= 0.3 + 1e-6
    volumes = (distances(points, images, norm) / 0.3) ** 4
    assert float(volumes.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(volumes.var()) == pytest.approx(1 / 12, abs=0.01)
    assert float((points - images).mean(dim=0).abs().max()) < 0.01


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


def test_the_objectives_by_hand() -> None:
    """Centroids on the three axes; the embedding (0.6, 0.8, 0) of class 0 is nearest to the wrong axis 1."""
    centroids, labels = torch.eye(3), torch.tensor([0])
    embedding = torch.tensor([[1.2, 1.6, 0.0]])  # length 2: the objectives take cosines
    assert float(nearest_wrong_centroid(centroids, labels)(embedding)) == pytest.approx(0.8 - 0.6)
    assert float(random_wrong_centroid(centroids, torch.tensor([2]))(embedding)) == pytest.approx(0.0)
    assert float(random_wrong_centroid(centroids, torch.tensor([1]))(embedding)) == pytest.approx(0.8)
    assert float(displacement(torch.tensor([[1.2, 0.6, 0.0]]))(embedding)) == pytest.approx(1.0)
    centroid = class_centroids(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(centroid, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_drawn_classes_are_wrong_and_every_wrong_class_is_drawn() -> None:
    labels = torch.arange(4).repeat(100)
    drawn = draw_wrong_classes(labels, 4, generator(0))
    assert set(zip(labels.tolist(), drawn.tolist(), strict=True)) == {
        (i, j) for i in range(4) for j in range(4) if i != j
    }
    with pytest.raises(ValueError, match="at least two classes; got 1"):
        draw_wrong_classes(torch.zeros(3, dtype=torch.int64), 1, generator(0))
