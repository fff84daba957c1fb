"""One step of TRADES against its formula written out, and its divergence."""

from __future__ import annotations

import math

import pytest
import torch
from test_defenses import EPSILON, LABELS, STEP_SIZE, STEPS, Case, fooled_rate

from eat_dist.defenses.trades import _divergence
from eat_dist.seeding import generator

SCALE = 5.0


def divergence(loss: torch.nn.Module, clean: torch.Tensor, attacked: torch.Tensor, scale: float) -> torch.Tensor:
    """Mean over the images of Σ_c p_c log(p_c / q_c), class by class, with the proxies and their priors as numbers."""
    proxies = loss.proxies.detach()
    total = torch.zeros((), dtype=torch.float64)
    logits = [
        [scale * torch.cosine_similarity(e[None], proxies) for e in embeddings] for embeddings in (clean, attacked)
    ]
    prior = sum(logits[0]).detach() / len(clean)
    for a, b in zip(*logits, strict=True):
        p, q = ((x - prior).exp() / (x - prior).exp().sum() for x in (a, b))
        for mine, other in zip(p, q, strict=True):
            total = total + mine * (mine / other).log()
    return total / len(clean)


def attacked_images(case: Case, rank: int, scale: float) -> torch.Tensor:
    """Signed steps up the divergence from the clean prediction, in evaluation mode, from x + 0.001·N(0, 1)."""
    (model, loss), images = case.attackers[rank], case.batches[rank].images
    noise = torch.randn(images.shape, generator=generator("attack", rank), dtype=torch.float64)
    current = (images + 0.001 * noise).clamp(0, 1)
    clean = model(images).detach()
    for _ in range(STEPS):
        current = current.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(divergence(loss, clean, model(current), scale), current)
        current = (current.detach() + STEP_SIZE * gradient.sign()).clamp(images - EPSILON, images + EPSILON).clamp(0, 1)
    return current


@pytest.mark.parametrize(("options", "weight", "scale"), [({}, 6.0, 32.0), ({"kl_weight": 0.5}, 0.5, 32.0)])
def test_trades_leaves_the_gradient_of_the_clean_loss_and_the_divergence(
    options: dict[str, float], weight: float, scale: float
) -> None:
    case = Case(2, name="trades", **options)
    adversarial = [attacked_images(case, rank, scale) for rank in range(2)]
    results = case.step()
    for rank, (_, loss) in enumerate(case.twins):
        clean, attacked = case.own_embeddings(rank, adversarial[rank])
        clean_loss = loss(clean, LABELS[rank])
        case.assert_left_by_step(rank, clean_loss + weight * divergence(loss, clean, attacked, scale))
        measured = results[1 - rank].ensemble.members[rank]
        assert measured.clean_loss == pytest.approx(clean_loss.item())
        assert measured.adversarial_loss == pytest.approx(loss(attacked, LABELS[rank]).item())
        assert measured.fooled_rate == pytest.approx(fooled_rate(loss, attacked, LABELS[rank]))
        assert measured.displacement == pytest.approx((attacked - clean).norm(dim=1).mean().item())
        assert measured.received == ()
        assert results[rank].passes == pytest.approx(STEPS + 1 / 3 + 2)


def test_the_scale_of_the_softmax_sets_attack_and_loss() -> None:
    case = Case(1, name="trades", softmax_scale=SCALE)
    adversarial = attacked_images(case, 0, SCALE)
    case.step()
    loss = case.twins[0][1]
    clean, attacked = case.own_embeddings(0, adversarial)
    case.assert_left_by_step(0, loss(clean, LABELS[0]) + 6 * divergence(loss, clean, attacked, SCALE))


def test_the_divergence_is_that_of_two_coins() -> None:
    """Two images that differ, ¾ : ¼ and ¼ : ¾, become alike, ½ : ½: each ¾ log(¾ / ½) + ¼ log(¼ / ½)."""
    half = math.log(3.0) / 2
    clean, attacked = torch.tensor([[half, -half], [-half, half]]), torch.zeros(2, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert _divergence(clean, attacked).tolist() == pytest.approx([expected, expected], rel=1e-6)
    assert _divergence(clean, clean).tolist() == [0, 0]


def test_one_proxy_nearest_to_every_image_does_not_hide_a_change() -> None:
    """Without the priors the divergence would be below 10⁻⁸ here, and training went there to have no more of it."""
    clean, attacked = torch.randn(2, 8, 5, generator=generator("logits"), dtype=torch.float64)
    everywhere = torch.tensor([30.0, 0, 0, 0, 0], dtype=torch.float64)
    expected = _divergence(clean, attacked)
    assert expected.min() > 0.05
    torch.testing.assert_close(_divergence(clean + everywhere, attacked + everywhere), expected)
