"""The losses with proxies against their formulas written out in loops, and what the weights mean."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning.losses import ProxyNCALoss, SoftTripleLoss

from eat_dist.config import LossConfig
from eat_dist.losses import make_loss
from eat_dist.losses.proxy_anchor import ProxyAnchor
from eat_dist.losses.proxy_nca import ProxyNCA
from eat_dist.losses.soft_triple import SoftTriple
from eat_dist.seeding import generator

NUM_CLASSES, DIM = 5, 4
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1])  # classes 2 and 4 do not occur
WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.5, 0.1, 1.0]
PRECISIONS = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])


def proxy_anchor(dtype: torch.dtype = torch.float64, *, alpha: float = 32.0, seed: int = 0) -> ProxyAnchor:
    config = LossConfig(alpha=alpha, margin=0.1)
    loss = make_loss(config, num_classes=NUM_CLASSES, embedding_dim=DIM, generator=generator(seed, "proxies"))
    assert isinstance(loss, ProxyAnchor)
    return loss.to(dtype)


def random_embeddings(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(len(LABELS), DIM, generator=generator(0, "embeddings"), dtype=dtype)


def naive(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    proxies: torch.Tensor,
    weights: list[float] | None = None,
    *,
    alpha: float = 32.0,
    delta: float = 0.1,
) -> float:
    """Equation (4) of Kim et al. 2020 in Python floats, one image and one proxy at a time."""
    weights = weights or [1.0] * len(labels)
    pull_total = push_total = 0.0
    positive_proxies = 0
    for proxy, direction in enumerate(proxies.tolist()):
        pull = push = 0.0
        occurs = False
        for row, label, weight in zip(embeddings.tolist(), labels.tolist(), weights, strict=True):
            dot = sum(a * b for a, b in zip(row, direction, strict=True))
            cosine = dot / math.hypot(*row) / math.hypot(*direction)
            if label == proxy:
                occurs = True
                pull += weight * math.exp(-alpha * (cosine - delta))
            else:
                push += weight * math.exp(alpha * (cosine + delta))
        positive_proxies += occurs
        pull_total += math.log(1 + pull)
        push_total += math.log(1 + push)
    return pull_total / positive_proxies + push_total / len(proxies)


@PRECISIONS
@pytest.mark.parametrize("alpha", [1.0, 32.0])
def test_proxy_anchor_equals_the_naive_double_loop(dtype: torch.dtype, rtol: float, alpha: float) -> None:
    loss, embeddings = proxy_anchor(dtype, alpha=alpha), random_embeddings(dtype)
    expected = naive(embeddings, LABELS, loss.proxies, alpha=alpha)
    assert loss(embeddings, LABELS).item() == pytest.approx(expected, rel=rtol)


@PRECISIONS
@pytest.mark.parametrize("alpha", [1.0, 32.0])
def test_weighted_proxy_anchor_equals_the_naive_double_loop(dtype: torch.dtype, rtol: float, alpha: float) -> None:
    loss, embeddings = proxy_anchor(dtype, alpha=alpha), random_embeddings(dtype)
    expected = naive(embeddings, LABELS, loss.proxies, WEIGHTS, alpha=alpha)
    weights = torch.tensor(WEIGHTS, dtype=dtype)
    assert loss(embeddings, LABELS, weights=weights).item() == pytest.approx(expected, rel=rtol)


def test_proxy_anchor_by_hand() -> None:
    """α = 1, δ = 0.1, two proxies on the axes, one image on the first: s = 1 to its own, 0 to the other.

    log(1 + e^{−0.9}) / 1 + log(1 + e^{0.1}) / 2.
    """
    config = LossConfig(alpha=1, margin=0.1)
    loss = make_loss(config, num_classes=2, embedding_dim=2, generator=generator(0))
    loss.proxies.data = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    value = loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
    assert value.item() == pytest.approx(math.log(1 + math.exp(-0.9)) + math.log(1 + math.exp(0.1)) / 2, rel=1e-6)


def gradients(
    loss: ProxyAnchor, embeddings: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Value, gradient by embeddings, gradient by proxies."""
    embeddings = embeddings.clone().requires_grad_(True)
    value = loss(embeddings, labels, weights=weights)
    return (value.detach(), *torch.autograd.grad(value, [embeddings, loss.proxies]))


def test_weights_of_one_are_no_weights_in_value_and_gradient() -> None:
    loss = proxy_anchor()
    without = gradients(loss, random_embeddings(), LABELS, None)
    ones = gradients(loss, random_embeddings(), LABELS, torch.ones(len(LABELS), dtype=torch.float64))
    torch.testing.assert_close(ones, without, rtol=1e-10, atol=1e-12)


def test_a_repeated_image_counts_twice_in_the_sums() -> None:
    """What the loss itself does with a batch that holds every image twice is a weight of two for each."""
    loss, embeddings = proxy_anchor(), random_embeddings()
    twice = gradients(loss, embeddings.repeat(2, 1), LABELS.repeat(2), None)
    weighted = gradients(loss, embeddings, LABELS, torch.full((len(LABELS),), 2.0, dtype=torch.float64))
    torch.testing.assert_close(weighted[0], twice[0])
    torch.testing.assert_close(weighted[1], twice[1][: len(LABELS)] + twice[1][len(LABELS) :])
    torch.testing.assert_close(weighted[2], twice[2])


def test_weight_two_of_one_image_is_that_image_repeated() -> None:
    loss, embeddings = proxy_anchor(), random_embeddings()
    repeated = loss(torch.cat([embeddings, embeddings[3:4]]), torch.cat([LABELS, LABELS[3:4]]))
    weights = torch.ones(len(LABELS), dtype=torch.float64)
    weights[3] = 2
    torch.testing.assert_close(loss(embeddings, LABELS, weights=weights), repeated)
    assert repeated.item() != pytest.approx(loss(embeddings, LABELS).item(), rel=1e-4)


def test_a_weight_of_zero_drops_the_image_and_a_small_one_nearly_does() -> None:
    """Of a class that others keep in the batch: |P⁺| counts the classes of the batch, whatever their weights."""
    loss, embeddings = proxy_anchor(), random_embeddings()
    dropped = torch.arange(len(LABELS)) != 4
    without = gradients(loss, embeddings[dropped], LABELS[dropped], None)
    for weight, tolerance in ((0.0, 1e-12), (1e-14, 1e-6)):
        weights = dropped.to(torch.float64).clamp_min(weight)
        value, by_embeddings, by_proxies = gradients(loss, embeddings, LABELS, weights)
        torch.testing.assert_close(value, without[0], rtol=tolerance, atol=0)
        torch.testing.assert_close(by_embeddings[dropped], without[1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(by_proxies, without[2], rtol=tolerance, atol=tolerance)
        assert float(by_embeddings[4].abs().max()) <= tolerance


def test_large_scales_overflow_neither_value_nor_gradient() -> None:
    """α = 1,000 makes e^{α(s + δ)} infinite in float32; the log-sum-exp must not."""
    loss, embeddings = proxy_anchor(torch.float32, alpha=1000.0), random_embeddings(torch.float32)
    for weights in (None, torch.ones(len(LABELS))):
        assert all(bool(part.isfinite().all()) for part in gradients(loss, embeddings, LABELS, weights))


def test_proxies_are_kaiming_normal_with_fan_out() -> None:
    """Standard deviation √(2 / number of proxies), as in the official code; 200 · 64 draws: standard error 0.6 %."""
    loss = make_loss(LossConfig(), num_classes=200, embedding_dim=64, generator=generator(0))
    assert loss.proxies.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.03)
    assert [name for name, _ in loss.named_parameters()] == ["proxies"]


def test_similarities_are_cosines() -> None:
    loss, embeddings = proxy_anchor(), random_embeddings()
    similarities = loss.similarities(embeddings)
    assert similarities.shape == (len(LABELS), NUM_CLASSES)
    for row, column in ((0, 0), (3, 2), (6, 4)):
        a, b = embeddings[row].tolist(), loss.proxies[column].tolist()
        expected = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        assert similarities[row, column].item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(loss.similarities(7 * embeddings), similarities)


def proxy_nca(dtype: torch.dtype = torch.float64, *, scale: float = 3.0) -> ProxyNCA:
    config = LossConfig(name="proxy_nca", scale=scale)
    loss = make_loss(config, num_classes=NUM_CLASSES, embedding_dim=DIM, generator=generator(0, "proxies"))
    assert isinstance(loss, ProxyNCA)
    return loss.to(dtype)


def soft_triple(dtype: torch.dtype = torch.float64) -> SoftTriple:
    config = LossConfig(name="soft_triple", centers_per_class=3, scale=8, gamma=0.2, margin=0.05)
    loss = make_loss(config, num_classes=NUM_CLASSES, embedding_dim=DIM, generator=generator(0, "proxies"))
    assert isinstance(loss, SoftTriple)
    return loss.to(dtype)


def cosine(first: list[float], second: list[float]) -> float:
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return dot / math.hypot(*first) / math.hypot(*second)


def naive_proxy_nca(row: list[float], label: int, proxies: list[list[float]], scale: float) -> float:
    """−log(e^{−s‖x−p_y‖²} / Σ_p e^{−s‖x−p‖²}) of one image, with the vectors scaled to length 1 one by one."""
    terms = []
    for proxy in proxies:
        pairs = zip(row, proxy, strict=True)
        square = sum((a / math.hypot(*row) - b / math.hypot(*proxy)) ** 2 for a, b in pairs)
        terms.append(math.exp(-scale * square))
    return -math.log(terms[label] / sum(terms))


def naive_relaxed(row: list[float], centers: list[list[float]], gamma: float) -> float:
    """Σ_k softmax_k(x·w_k / γ) x·w_k over the centres of one class."""
    cosines = [cosine(row, center) for center in centers]
    powers = [math.exp(value / gamma) for value in cosines]
    return sum(power * value for power, value in zip(powers, cosines, strict=True)) / sum(powers)


def naive_soft_triple(row: list[float], label: int, fc: torch.Tensor) -> float:
    """λ = 8, γ = 0.2, δ = 0.05 and three centres a class, which lie side by side in ``fc``."""
    centers = fc.T.tolist()
    relaxed = [naive_relaxed(row, centers[3 * c : 3 * c + 3], 0.2) for c in range(NUM_CLASSES)]
    own = math.exp(8 * (relaxed[label] - 0.05))
    others = sum(math.exp(8 * value) for c, value in enumerate(relaxed) if c != label)
    return -math.log(own / (own + others))


def mean(losses: list[float], weights: list[float] | None) -> float:
    weights = weights or [1.0] * len(losses)
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)


@PRECISIONS
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_proxy_nca_equals_the_naive_loop(dtype: torch.dtype, rtol: float, weights: list[float] | None) -> None:
    loss, embeddings = proxy_nca(dtype), random_embeddings(dtype)
    proxies = loss.proxies.tolist()
    rows = zip(embeddings.tolist(), LABELS.tolist(), strict=True)
    expected = mean([naive_proxy_nca(row, label, proxies, 3.0) for row, label in rows], weights)
    given = torch.tensor(weights, dtype=dtype) if weights else None
    assert loss(embeddings, LABELS, weights=given).item() == pytest.approx(expected, rel=rtol)


@PRECISIONS
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_soft_triple_equals_the_naive_loop(dtype: torch.dtype, rtol: float, weights: list[float] | None) -> None:
    loss, embeddings = soft_triple(dtype), random_embeddings(dtype)
    rows = zip(embeddings.tolist(), LABELS.tolist(), strict=True)
    expected = mean([naive_soft_triple(row, label, loss.fc) for row, label in rows], weights)
    given = torch.tensor(weights, dtype=dtype) if weights else None
    assert loss(embeddings, LABELS, weights=given).item() == pytest.approx(expected, rel=rtol)


def test_similarities_of_soft_triple_are_the_relaxed_ones_of_its_paper() -> None:
    loss, embeddings = soft_triple(), random_embeddings()
    similarities, centers = loss.similarities(embeddings), loss.fc.T.tolist()
    for row, column in ((0, 0), (3, 2), (6, 4)):
        expected = naive_relaxed(embeddings[row].tolist(), centers[3 * column : 3 * column + 3], 0.2)
        assert similarities[row, column].item() == pytest.approx(expected, rel=1e-12)


def test_without_weights_the_mean_losses_are_the_librarys_in_value_and_gradient() -> None:
    embeddings = random_embeddings().requires_grad_(True)
    libraries = (
        (proxy_nca(), ProxyNCALoss(NUM_CLASSES, DIM, softmax_scale=3.0).double()),
        (
            soft_triple(),
            SoftTripleLoss(NUM_CLASSES, DIM, centers_per_class=3, la=8, gamma=0.2, margin=0.05).double(),
        ),
    )
    for loss, library in libraries:
        library.load_state_dict(loss.state_dict())
        values = loss(embeddings, LABELS), library(embeddings, LABELS)
        torch.testing.assert_close(*values)
        mine, theirs = (
            torch.autograd.grad(value, [embeddings, *module.parameters()])
            for value, module in zip(values, (loss, library), strict=True)
        )
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("make", [proxy_nca, soft_triple])
def test_weight_two_of_one_image_is_that_image_repeated_in_a_mean_too(make: type[ProxyNCA]) -> None:
    loss, embeddings = make(), random_embeddings()
    repeated = loss(torch.cat([embeddings, embeddings[3:4]]), torch.cat([LABELS, LABELS[3:4]]))
    weights = torch.ones(len(LABELS), dtype=torch.float64)
    torch.testing.assert_close(loss(embeddings, LABELS, weights=weights), loss(embeddings, LABELS))
    weights[3] = 2
    torch.testing.assert_close(loss(embeddings, LABELS, weights=weights), repeated)
    assert repeated.item() != pytest.approx(loss(embeddings, LABELS).item(), rel=1e-4)


def test_proxy_nca_keeps_an_image_whose_probability_underflows() -> None:
    """s = 100, an image opposite to its proxy and on another's: log 1 + 100 · 2²; e^{−400} is 0 in float32."""
    loss = proxy_nca(torch.float32, scale=100.0)
    loss.proxies.data = torch.eye(NUM_CLASSES, DIM)
    loss.proxies.data[1] = -loss.proxies.data[0]
    embeddings = -loss.proxies.detach()[:1].clone()
    embeddings.requires_grad_(True)
    value = loss(embeddings, torch.tensor([0]))
    assert value.item() == pytest.approx(400, rel=1e-5)
    (gradient,) = torch.autograd.grad(value, embeddings)
    assert bool(gradient.isfinite().all())


def test_proxies_of_proxy_nca_are_standard_normal() -> None:
    loss = make_loss(LossConfig(name="proxy_nca"), num_classes=200, embedding_dim=64, generator=generator(0))
    assert loss.proxies.mean().item() == pytest.approx(0, abs=0.03)
    assert loss.proxies.std().item() == pytest.approx(1, rel=0.03)


def test_centres_of_soft_triple_are_kaiming_uniform() -> None:
    """a = √5 on [D, C·K]: uniform in ± √(6 / (1 + 5) / (C·K)) = ± 1/√(C·K)."""
    loss = make_loss(LossConfig(name="soft_triple"), num_classes=40, embedding_dim=64, generator=generator(0))
    assert loss.fc.shape == (64, 400)
    assert loss.fc.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert loss.fc.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.03)
