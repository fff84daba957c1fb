"""One table of attacks, norms and settings, and the claims that hold for every row of it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from attack_table import EVERY_ROW, LABELS, OBJECTIVES, Counted, small_images, small_model, small_objective
from eat_dist.attacks import ATTACKS, Ball, GradientAttack, Objective, WhiteBox, ascend, frozen, steepest_ascent
from eat_dist.attacks.ball import Norm
from eat_dist.attacks.objectives import batch_loss, random_wrong_centroid
from eat_dist.config import AttackConfig, LossConfig
from eat_dist.errors import ConfigError
from eat_dist.losses import make_loss
from eat_dist.seeding import generator

NORMS: dict[str, tuple[Norm, ...]] = {
    "fgsm": ("linf", "l2"),
    "pgd": ("linf", "l2"),
    "mi_fgsm": ("linf", "l2"),
    "apgd": ("linf", "l2"),
    "random_noise": ("linf", "l2", "l0"),
    "cw": ("l2",),
    "jsma": ("l0",),
    "square": ("linf",),
}
SETTINGS = {
    "small": {"epsilon": 0.03},
    "one step": {"epsilon": 0.1, "num_steps": 1},
    "large, cut by the pixel range": {"epsilon": 0.6, "num_steps": 3},
    "from the image": {"epsilon": 0.1, "random_start": False},
    "steps longer than the ball": {"epsilon": 0.05, "step_size": 0.4, "num_steps": 2},
}
DEFINED = [(name, norm) for name in ATTACKS for norm in NORMS[name]]
EVERY_ATTACK = [pytest.param(name, norm, id=f"{name}-{norm}") for name, norm in DEFINED]
TABLE = [
    pytest.param(
        AttackConfig(name=name, norm=norm, **({"num_steps": 4} | SETTINGS[setting])), id=f"{name}-{norm}-{setting}"
    )
    for (name, norm), setting in product(DEFINED, SETTINGS)
    if (name, setting) != ("cw", "one step")  # it judges the iterates that it steps from, and the first is the image
]
NEVER_DRAW = ("fgsm", "cw", "jsma")


def small_loss(dtype: torch.dtype = torch.float32) -> nn.Module:
    return make_loss(LossConfig(), num_classes=3, embedding_dim=6, generator=generator(0, "proxies")).to(dtype)


def craft(config: AttackConfig, model: nn.Module, objective: Objective, *, seed: int = 0) -> torch.Tensor:
    return ATTACKS[config.name](config)(WhiteBox(model, objective), small_images(), generators=generator(seed))


def test_the_table_knows_every_attack() -> None:
    assert set(ATTACKS) == set(NORMS)


@pytest.mark.parametrize("config", TABLE)
def test_every_attack_stays_inside_the_epsilon_ball_and_the_pixel_range(config: AttackConfig) -> None:
    model, images = small_model(), small_images()
    attack = ATTACKS[config.name](config)
    assert attack.ball == Ball(config.norm, config.epsilon)
    surface = WhiteBox(model, small_objective(model))
    adversarial = attack(surface, small_images().requires_grad_(True), generators=generator(0))
    assert adversarial.shape == images.shape
    assert not adversarial.requires_grad
    assert float(Ball(config.norm, config.epsilon).distances(adversarial, images).max()) <= config.epsilon + 1e-6
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert not torch.equal(adversarial, images)


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_every_attack_with_radius_zero_is_the_identity(name: str, norm: Norm) -> None:
    model = small_model()
    config = AttackConfig(name=name, norm=norm, epsilon=0.0, num_steps=3)
    assert torch.equal(craft(config, model, small_objective(model)), small_images())


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_every_attack_leaves_model_and_input_as_they_were(name: str, norm: Norm) -> None:
    model, images = small_model().train(), small_images()
    model.head.eval()  # a mixture of modes must come back as a mixture
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    objective = small_objective(model)

    def everything() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def flags() -> tuple[list[bool], list[bool]]:
        return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    before, flags_before, random_state = everything(), flags(), torch.get_rng_state()
    attack = ATTACKS[name](AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=3))
    attack(WhiteBox(model, objective), images, generators=generator(0))
    after = everything()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert flags() == flags_before
    assert len(set(flags_before[0])) == len(set(flags_before[1])) == 2
    assert torch.equal(images, small_images())
    assert not images.requires_grad
    with_grad = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_grad == ["head.weight"]
    assert bool((model.head.weight.grad == 1).all())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_every_attack_repeats_itself_with_the_same_generator_and_only_with_that(name: str, norm: Norm) -> None:
    model = small_model()
    config = AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=3)
    first = craft(config, model, small_objective(model), seed=1)
    assert torch.equal(first, craft(config, model, small_objective(model), seed=1))
    other = craft(config, model, small_objective(model), seed=2)
    assert torch.equal(first, other) == (name in NEVER_DRAW)


@pytest.mark.parametrize("config", TABLE)
def test_every_attack_raises_its_objective_on_an_undefended_model(config: AttackConfig) -> None:
    """In the mean over the images. Random noise promises no rise: test_attacks_by_hand.py has what it does promise."""
    if config.name == "random_noise":
        return
    model = small_model().eval()
    objective = small_objective(model)
    with torch.no_grad():
        clean, attacked = (objective(model(x)) for x in (small_images(), craft(config, model, objective)))
    assert float(attacked.mean()) > float(clean.mean())


class WithoutSlopeAtAPixel(nn.Module):
    """The same values, and NaN where the gradient of the fourth pixel of the fourth row should be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.requires_grad:
            gone = torch.zeros(images.shape[-2:], dtype=torch.bool)
            gone[3, 3] = True
            images = images * 1
            images.register_hook(lambda gradient: gradient.masked_fill(gone, float("nan")))
        return self.model(images)


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_a_gradient_that_is_not_a_number_at_one_pixel_ends_no_attack(name: str, norm: Norm) -> None:
    """Else the iterate is NaN, never the best, and the model looks robust."""
    if name in ("random_noise", "square"):
        return  # without gradients
    model = small_model().eval()
    objective = small_objective(model)
    config = AttackConfig(name=name, norm=norm, epsilon=0.3, num_steps=10)
    with torch.no_grad():
        clean = objective(model(small_images()))
        adversarial = craft(config, WithoutSlopeAtAPixel(model).eval(), objective)
        attacked, whole = objective(model(adversarial)), objective(model(craft(config, model, objective)))
    assert adversarial.isfinite().all()
    assert float((attacked - clean).mean()) > 0.7 * float((whole - clean).mean()) > 0


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_no_attack_lets_an_image_depend_on_the_others_of_its_batch(name: str, norm: Norm) -> None:
    """With a generator an image. Not promised for ``batch_loss``, whose log-sum-exp couples the images (next tests)."""
    model, images = small_model(torch.float64), small_images(torch.float64)
    attack = ATTACKS[name](AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=5))

    def attacked(rows: list[int], objective: str) -> torch.Tensor:
        surface = WhiteBox(model, small_objective(model, torch.tensor(rows), objective))
        return attack(surface, images[rows], generators=[generator(1, row) for row in rows])

    for objective in OBJECTIVES if name in ("pgd", "apgd") else ("nearest_wrong_centroid",):
        together = attacked([*range(6)], objective)
        alone = torch.cat([attacked([row], objective) for row in range(6)])
        halves = torch.cat([attacked([0, 1], objective), attacked([2, 3, 4, 5], objective)])
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-9)
        torch.testing.assert_close(halves, together, rtol=0, atol=1e-9)
        assert float(attack.ball.distances(together, images).max()) > 0.01


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_an_attack_costs_no_more_passes_than_it_says(name: str, norm: Norm) -> None:
    model = small_model()
    surface = Counted(WhiteBox(model, small_objective(model)))
    attack = ATTACKS[name](AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=7))
    attack(surface, small_images(), generators=generator(0))
    if name in (counts := {"fgsm": (1, 0), "pgd": (7, 0), "mi_fgsm": (7, 1), "apgd": (7, 1), "random_noise": (0, 7)}):
        assert (surface.gradients, surface.forward_passes) == counts[name]
    assert 0 < surface.gradients + surface.forward_passes / 3 <= attack.passes + 1e-9


@pytest.mark.parametrize(("name", "norm"), [(n, norm) for n in ATTACKS for norm in ("linf", "l2", "l0")])
def test_an_attack_refuses_a_norm_that_it_is_not_defined_for(name: str, norm: Norm) -> None:
    config = AttackConfig(name=name, norm=norm, epsilon=0.1)
    if norm in NORMS[name]:
        assert ATTACKS[name](config).ball.norm == norm
        return
    with pytest.raises(ConfigError, match=f"'{name}' is defined for the norm {' and '.join(NORMS[name])}; got {norm}"):
        ATTACKS[name](config)


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_an_objective_that_raises_leaves_modes_and_flags_restored(name: str, norm: Norm) -> None:
    model = small_model().train()
    model.head.eval()
    modes = [module.training for module in model.modules()]

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory"):
        craft(AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=2), model, objective)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_every_attack_works_where_gradients_are_switched_off(name: str, norm: Norm) -> None:
    model = small_model()
    objective = small_objective(model)
    config = AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=2)
    outside = craft(config, model, objective)
    with torch.no_grad(), frozen(model):
        assert torch.equal(craft(config, model, objective), outside)


@pytest.mark.parametrize(("name", "norm"), EVERY_ATTACK)
def test_no_parameter_takes_part_in_an_attack(name: str, norm: Norm) -> None:
    model = small_model().train()
    objective = small_objective(model)
    seen: list[bool] = []

    def watched(embeddings: torch.Tensor) -> torch.Tensor:
        seen.extend(parameter.requires_grad for parameter in model.parameters())
        seen.extend(module.training for module in model.modules())
        return objective(embeddings)

    craft(AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=2), model, watched)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_the_attacks_of_training_climb_a_batch_loss_and_leave_it_as_it_was(name: str, norm: Norm) -> None:
    model, loss = small_model().eval(), small_loss()
    before = {key: tensor.clone() for key, tensor in loss.state_dict().items()}
    objective = batch_loss(loss, LABELS)
    adversarial = craft(AttackConfig(name=name, norm=norm, epsilon=0.1, num_steps=4), model, objective)
    with torch.no_grad():
        assert float(objective(model(adversarial))) > float(objective(model(small_images())))
    assert all(torch.equal(tensor, before[key]) for key, tensor in loss.state_dict().items())
    assert loss.proxies.grad is None


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
    surface = WhiteBox(small_model(), random_wrong_centroid(torch.eye(6), EVERY_ROW))
    step = steepest_ascent(ball, 0.1)
    steps = ascend(surface, images, start=images + 5, step=step, ball=ball, num_steps=0)
    assert torch.equal(steps.images, (images + 0.1).clamp(max=1))
