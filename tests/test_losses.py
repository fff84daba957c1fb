"""What holds for every loss of the table: options, randomness, gradients, learning, saving. New ones are tested too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import REPOSITORY
from eat_dist.config import LossConfig
from eat_dist.errors import ConfigError
from eat_dist.losses import LOSSES, check_loss, is_pair_loss, make_loss, supports_weights
from eat_dist.seeding import generator

NUM_CLASSES, DIM = 5, 4
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1, 2])  # class 4 does not occur, class 2 once
OPTIONS = sorted((name, option) for name in LOSSES for option in LOSSES[name].options)
EVERY_LOSS = pytest.mark.parametrize("name", list(LOSSES))
# Another value of each option than any default.
OTHER = {"alpha": 3, "beta": 7, "margin": 0.3, "positive_margin": 0.4, "scale": 4, "gamma": 0.7, "angle": 25}


def make(name: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, **options: float) -> nn.Module:
    config = LossConfig.model_validate({"name": name, **options})
    return make_loss(config, num_classes=NUM_CLASSES, embedding_dim=DIM, generator=generator(seed, "proxies")).to(dtype)


def random_embeddings(dtype: torch.dtype = torch.float64, count: int = len(LABELS)) -> torch.Tensor:
    return torch.randn(count, DIM, generator=generator(0, "embeddings"), dtype=torch.float64).to(dtype)


def test_the_table_holds_the_reference_losses() -> None:
    assert list(LOSSES) == [
        "angular",
        "contrastive",
        "multi_similarity",
        "proxy_anchor",
        "proxy_nca",
        "soft_triple",
        "triplet",
    ]


@pytest.mark.parametrize("refuse", [check_loss, lambda config: make(config.name)])
def test_an_unknown_loss_names_the_known_ones(refuse: Callable[[LossConfig], object]) -> None:
    with pytest.raises(ConfigError, match=r"no loss is called 'proxy_ancor'; known: .*Did you mean 'proxy_anchor'\?"):
        refuse(LossConfig(name="proxy_ancor"))


@EVERY_LOSS
def test_options_that_a_loss_does_not_take_are_refused_by_name_with_those_it_takes(name: str) -> None:
    check_loss(LossConfig(name=name))
    foreign = [option for option in LossConfig.model_fields if option not in {"name", *LOSSES[name].options}]
    given = {option: 0.5 if option != "centers_per_class" else 2 for option in foreign}  # in every option's range
    config = LossConfig.model_validate({"name": name, **given})
    for refuse in (check_loss, lambda config: make_loss(config, num_classes=2, embedding_dim=2, generator=None)):
        with pytest.raises(ConfigError) as raised:
            refuse(config)
        message = str(raised.value)
        assert message.startswith(f"the loss '{name}' takes the options {', '.join(LOSSES[name].options)}; got ")
        assert all(f"loss.{option} = {value}" in message for option, value in given.items())
        assert "\n" not in message


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_left_out_is_its_default_and_one_that_is_set_counts(name: str, option: str) -> None:
    def value(**options: float) -> float:
        loss = make(name, **options)
        return loss(random_embeddings(), LABELS).item()

    default = LOSSES[name].options[option]
    assert value(**{option: default}) == value()
    if option == "centers_per_class":
        assert make(name, centers_per_class=3).fc.shape == (DIM, 3 * NUM_CLASSES)
    else:
        assert value(**{option: OTHER[option]}) != pytest.approx(value(), rel=1e-3)


@EVERY_LOSS
def test_the_docs_state_every_loss_with_its_options_and_defaults(name: str) -> None:
    page = (REPOSITORY / "docs" / "losses.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` | ")][:1]
    for option, default in LOSSES[name].options.items():
        assert f"`{option}` {default:g}" in row


@EVERY_LOSS
def test_pair_losses_are_those_without_parameters_and_without_weights(name: str) -> None:
    loss = make(name)
    assert is_pair_loss(name) == (not list(loss.parameters()))
    assert is_pair_loss(name) != supports_weights(name)
    weights = torch.ones(len(LABELS), dtype=torch.float64)
    if supports_weights(name):
        loss(random_embeddings(), LABELS, weights=weights)
    else:
        with pytest.raises(ConfigError, match=r"no weight an image.*transfer_rule.*class_risk"):
            loss(random_embeddings(), LABELS, weights=weights)


@EVERY_LOSS
def test_building_draws_from_the_generator_alone_and_leaves_the_global_one_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = make(name, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again, other = make(name, seed=1).state_dict(), make(name, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert is_pair_loss(name) or not any(torch.equal(first[key], other[key]) for key in first)


@EVERY_LOSS
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss = make(name, **({"alpha": 4} if name == "proxy_anchor" else {}))
    embeddings = random_embeddings().requires_grad_(True)

    def value(embeddings: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:  # proxies are perturbed in place
        return loss(embeddings, LABELS)

    assert torch.autograd.gradcheck(value, (embeddings, *loss.parameters()))


@pytest.mark.parametrize("name", [name for name in LOSSES if supports_weights(name)])
def test_weighted_gradients_are_those_of_finite_differences(name: str) -> None:
    loss = make(name, **({"alpha": 4} if name == "proxy_anchor" else {}))
    embeddings = random_embeddings().requires_grad_(True)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.5, 0.1, 1.0, 1.0], dtype=torch.float64)

    def value(embeddings: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return loss(embeddings, LABELS, weights=weights)

    assert torch.autograd.gradcheck(value, (embeddings, *loss.parameters()))


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [8, 60])  # above 25 rows torch.cdist takes another way
def test_gradients_are_finite_where_embeddings_coincide(name: str, dtype: torch.dtype, count: int) -> None:
    """Images 0 and 1 are of one class, 0 and 2 of two; the last ones are opposite to them."""
    embeddings = functional.normalize(random_embeddings(dtype, count))
    embeddings[1] = embeddings[2] = embeddings[0]
    embeddings[-1] = -embeddings[0]
    embeddings.requires_grad_(True)
    loss = make(name, dtype)
    value = loss(embeddings, LABELS.repeat(8)[:count])
    gradients = torch.autograd.grad(value, [embeddings, *loss.parameters()])
    assert bool(value.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@EVERY_LOSS
def test_float32_gives_the_numbers_of_float64(name: str) -> None:
    labels = LABELS.repeat(5)
    for given in (LABELS, labels):
        single, double = (
            make(name, dtype)(random_embeddings(dtype, len(given)), given) for dtype in (torch.float32, torch.float64)
        )
        assert single.dtype == torch.float32
        assert double.dtype == torch.float64
        assert single.item() == pytest.approx(double.item(), rel=1e-4)


@EVERY_LOSS
def test_the_length_of_embeddings_does_not_matter(name: str) -> None:
    loss, embeddings = make(name), random_embeddings()
    loss.observe(embeddings, LABELS)
    lengths = torch.linspace(0.5, 4, len(LABELS), dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(lengths * embeddings, LABELS), loss(embeddings, LABELS))
    torch.testing.assert_close(loss.similarities(lengths * embeddings), loss.similarities(embeddings))


@EVERY_LOSS
def test_similarities_are_one_number_a_class_from_minus_one_to_one(name: str) -> None:
    loss = make(name)
    loss.observe(random_embeddings(), LABELS)
    similarities = loss.similarities(random_embeddings()).detach()
    assert similarities.shape == (len(LABELS), NUM_CLASSES)
    assert float(similarities.abs().max()) <= 1 + 1e-12


@EVERY_LOSS
@pytest.mark.parametrize(("optimiser", "rate"), [(torch.optim.AdamW, 0.05), (torch.optim.SGD, 0.1)])
def test_every_loss_falls_on_a_toy_problem_and_moves_its_proxies(
    name: str, optimiser: type[torch.optim.SGD], rate: float
) -> None:
    """Four overlapping clouds in six dimensions, through one linear layer."""
    draw = generator(0, "toy")
    labels = torch.arange(4).repeat_interleave(5)
    images = torch.randn(4, 6, generator=draw)[labels] + 0.7 * torch.randn(20, 6, generator=draw)
    layer = nn.Parameter(torch.randn(6, DIM, generator=draw))
    loss = make_loss(LossConfig(name=name), num_classes=4, embedding_dim=DIM, generator=generator(1))
    before = {key: value.detach().clone() for key, value in loss.named_parameters()}
    steps = optimiser([layer, *loss.parameters()], lr=rate)
    values = []
    for _ in range(30):
        value = loss(functional.normalize(images @ layer), labels)
        steps.zero_grad()
        value.backward()
        steps.step()
        values.append(value.item())
    assert values[-1] < 0.85 * values[0]
    for key, parameter in loss.named_parameters():
        assert float((parameter.detach() - before[key]).abs().max()) > 1e-3


@EVERY_LOSS
def test_the_state_brings_proxies_or_centroids_back(name: str) -> None:
    loss, embeddings = make(name, seed=1), random_embeddings()
    loss.observe(embeddings, LABELS)
    other = make(name, seed=2)
    assert not torch.equal(other.similarities(embeddings), loss.similarities(embeddings))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.similarities(embeddings), loss.similarities(embeddings))
    assert torch.equal(other(embeddings, LABELS), loss(embeddings, LABELS))
