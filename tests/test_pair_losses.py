"""The losses over pairs against their formulas written out in loops, their centroids, and training with them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eat_dist.attacks import ATTACKS, WhiteBox
from eat_dist.attacks.objectives import batch_loss
from eat_dist.batch import Batch
from eat_dist.config import AttackConfig, DefenseConfig, LossConfig
from eat_dist.defenses import DEFENSES, Learner
from eat_dist.errors import DataError
from eat_dist.exchange import Board, LocalExchange
from eat_dist.losses import LOSSES, is_pair_loss, make_loss
from eat_dist.losses.pairs import PairLoss
from eat_dist.robustness.statistics import EnsembleStatistics, Policy, fooled
from eat_dist.seeding import generator
from small_runs import small_config, train_locally

NUM_CLASSES, DIM = 4, 3
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1, 2])  # class 2 has one image, so no positive pair
PAIR_LOSSES = [name for name in LOSSES if is_pair_loss(name)]
PRECISIONS = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])


def make(name: str, dtype: torch.dtype = torch.float64, **options: float) -> PairLoss:
    config = LossConfig.model_validate({"name": name, **options})
    loss = make_loss(config, num_classes=NUM_CLASSES, embedding_dim=DIM, generator=generator(0))
    assert isinstance(loss, PairLoss)
    return loss.to(dtype)


def random_embeddings(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(len(LABELS), DIM, generator=generator(0, "embeddings"), dtype=dtype)


def unit_rows(embeddings: torch.Tensor) -> list[list[float]]:
    return [[value / math.hypot(*row) for value in row] for row in embeddings.tolist()]


def dot(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def partners(labels: list[int], anchor: int) -> tuple[list[int], list[int]]:
    """The other images of the anchor's class, and those of other classes."""
    others = [i for i in range(len(labels)) if i != anchor]
    same = [i for i in others if labels[i] == labels[anchor]]
    return same, [i for i in others if i not in same]


def mean_of_positive(terms: list[float]) -> float:
    positive = [term for term in terms if term > 0]
    return sum(positive) / len(positive) if positive else 0.0


def naive_contrastive(rows: list[list[float]], labels: list[int], positive_margin: float, margin: float) -> float:
    pull, push = [], []
    for i, first in enumerate(rows):
        for j, second in enumerate(rows[:i]):
            distance = math.dist(first, second)
            if labels[i] == labels[j]:
                pull.append(max(0.0, distance - positive_margin))
            else:
                push.append(max(0.0, margin - distance))
    return mean_of_positive(pull) + mean_of_positive(push)


def naive_triplet(rows: list[list[float]], labels: list[int], margin: float) -> float:
    terms = []
    for anchor, row in enumerate(rows):
        same, different = partners(labels, anchor)
        terms += [max(0.0, math.dist(row, rows[p]) - math.dist(row, rows[n]) + margin) for p in same for n in different]
    return mean_of_positive(terms)


def naive_angular(rows: list[list[float]], labels: list[int], angle: float) -> float:
    square = math.tan(math.radians(angle)) ** 2
    terms = []
    for anchor, row in enumerate(rows):
        same, different = partners(labels, anchor)
        for p in same:
            both = [a + b for a, b in zip(row, rows[p], strict=True)]
            exponents = [4 * square * dot(both, rows[n]) - 2 * (1 + square) * dot(row, rows[p]) for n in different]
            terms.append(math.log(1 + sum(math.exp(exponent) for exponent in exponents)))
    return sum(terms) / len(terms)


def naive_multi_similarity(
    rows: list[list[float]], labels: list[int], alpha: float, beta: float, margin: float
) -> float:
    total = 0.0
    for anchor, row in enumerate(rows):
        same, different = partners(labels, anchor)
        positive, negative = [dot(row, rows[p]) for p in same], [dot(row, rows[n]) for n in different]
        kept_positive = [s for s in positive if s < max(negative) + 0.1]
        kept_negative = [s for s in negative if positive and s > min(positive) - 0.1]
        total += math.log(1 + sum(math.exp(-alpha * (s - margin)) for s in kept_positive)) / alpha
        total += math.log(1 + sum(math.exp(beta * (s - margin)) for s in kept_negative)) / beta
    return total / len(rows)


@PRECISIONS
@pytest.mark.parametrize(
    ("name", "naive", "options"),
    [
        ("contrastive", naive_contrastive, {"positive_margin": 0.0, "margin": 1.0}),
        ("contrastive", naive_contrastive, {"positive_margin": 0.4, "margin": 1.7}),
        ("triplet", naive_triplet, {"margin": 0.05}),
        ("triplet", naive_triplet, {"margin": 0.8}),
        ("angular", naive_angular, {"angle": 40.0}),
        ("angular", naive_angular, {"angle": 20.0}),
        ("multi_similarity", naive_multi_similarity, {"alpha": 2.0, "beta": 50.0, "margin": 0.5}),
        ("multi_similarity", naive_multi_similarity, {"alpha": 5.0, "beta": 3.0, "margin": 0.2}),
    ],
)
def test_a_pair_loss_equals_its_naive_loops(
    dtype: torch.dtype, rtol: float, name: str, naive: object, options: dict[str, float]
) -> None:
    assert callable(naive)
    embeddings = random_embeddings(dtype)
    expected = naive(unit_rows(embeddings), LABELS.tolist(), **options)
    assert make(name, dtype, **options)(embeddings, LABELS).item() == pytest.approx(expected, rel=rtol)


def test_mining_leaves_a_batch_alone_whose_classes_keep_their_distance() -> None:
    """Two classes on two axes: every pair of one class is at cosine 1, of two at 0. The loss is 0, with a gradient."""
    embeddings = torch.eye(2, DIM, dtype=torch.float64)[[0, 0, 1, 1]].requires_grad_(True)
    value = make("multi_similarity")(embeddings, torch.tensor([0, 0, 1, 1]))
    (gradient,) = torch.autograd.grad(value, embeddings)
    assert value.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_batch_without_a_pair_of_either_kind_is_refused_with_what_to_do(name: str) -> None:
    loss, embeddings = make(name), random_embeddings()[:4]
    with pytest.raises(DataError, match=r"two images of one class in every batch; got 4 of 4 classes\. .*class_bal"):
        loss(embeddings, torch.arange(4))
    with pytest.raises(DataError, match=r"images of two classes in every batch; got 4 of one class\. .*class_bal"):
        loss(embeddings, torch.zeros(4, dtype=torch.int64))


def test_the_first_centroid_is_the_direction_of_the_mean_and_later_ones_move_a_tenth_of_the_way() -> None:
    loss, first, second = make("triplet"), random_embeddings(), random_embeddings().flip(0)
    loss.observe(first, LABELS)
    loss.observe(second, LABELS[:4].repeat(2))  # class 1 has other images, class 2 none
    for label in range(NUM_CLASSES):
        expected = torch.zeros(DIM, dtype=torch.float64)
        for share, embeddings, labels in ((1.0, first, LABELS), (0.1, second, LABELS[:4].repeat(2))):
            rows = [row / row.norm() for row, given in zip(embeddings, labels.tolist(), strict=True) if given == label]
            if rows:
                mean = torch.stack(rows).mean(dim=0)
                expected = (1 - share) * expected + share * mean / mean.norm()
        torch.testing.assert_close(loss.centroids[label], expected)


def test_observing_takes_no_order_and_leaves_no_gradient() -> None:
    loss, embeddings = make("triplet"), random_embeddings().requires_grad_(True)
    order = torch.randperm(len(LABELS), generator=generator(0, "order"))
    other = make("triplet")
    loss.observe(embeddings, LABELS)
    other.observe(embeddings[order], LABELS[order])
    torch.testing.assert_close(other.centroids, loss.centroids)
    assert not loss.centroids.requires_grad
    before = loss.centroids.clone()
    loss(embeddings, LABELS)  # as an attack does
    loss.similarities(embeddings)
    assert torch.equal(loss.centroids, before)


def test_similarities_are_cosines_to_the_centroids() -> None:
    loss, embeddings = make("triplet"), random_embeddings()
    loss.observe(embeddings, LABELS)
    loss.observe(embeddings.flip(0), LABELS)  # lengths below one now
    similarities = loss.similarities(embeddings)
    for row, column in ((0, 0), (3, 2), (6, 3)):
        expected = torch.cosine_similarity(embeddings[row], loss.centroids[column], dim=0)
        torch.testing.assert_close(similarities[row, column], expected)


def test_a_class_that_was_not_observed_is_never_the_nearest_and_stands_at_the_mean_of_the_others() -> None:
    loss = make("triplet")
    assert not loss.similarities(random_embeddings()).any()
    # One observed class per axis; the image is opposite to both, so that a similarity of 0 would be the greatest.
    loss.observe(torch.eye(2, DIM, dtype=torch.float64), torch.tensor([1, 3]))
    image = torch.tensor([[-1.0, -2.0, 0.0]], dtype=torch.float64)
    similarities = loss.similarities(image)
    one, three = -1 / math.sqrt(5), -2 / math.sqrt(5)
    mean = (one + three) / 2
    torch.testing.assert_close(similarities, torch.tensor([[mean, one, mean, three]], dtype=torch.float64))
    assert fooled(similarities, torch.tensor([0])).item()
    assert not fooled(similarities, torch.tensor([1])).item()


@pytest.mark.parametrize(("defense", "share"), [("natural", 0.5), ("pgd_at", 0.5), ("pgd_at", 1.0), ("eat", 0.5)])
def test_a_step_observes_once_the_clean_images_or_with_beta_one_the_adversarial_ones(
    defense: str, share: float
) -> None:
    """A linear network without BatchNorm, so that an image's embedding does not depend on its pass."""
    config = DefenseConfig(name=defense, adversarial_share=share, transfer_rule="none")
    policy = Policy(1, NUM_CLASSES, "none", 1, 1.0, 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, DIM, bias=False)).double()
    nn.init.normal_(model[1].weight, generator=generator("weights"))
    images = torch.rand(8, 1, 4, 4, generator=generator("images"), dtype=torch.float64)
    attack = ATTACKS["pgd"](AttackConfig(epsilon=0.2, num_steps=3))
    loss, expected = make("triplet"), make("triplet")
    learner = Learner(0, model, loss, attack, LocalExchange(Board(1, timeout=20), 0, policy=policy), config, generator)
    objective = batch_loss(expected, LABELS)
    attacked = attack(WhiteBox(model, objective), images, generators=generator("attack"))
    expected.observe(model(images if share < 1 else attacked).detach(), LABELS)
    result = DEFENSES[defense].step(learner, Batch(images, LABELS, torch.arange(8)), EnsembleStatistics.initial(policy))
    torch.testing.assert_close(loss.centroids, expected.centroids)
    lengths = loss.centroids.norm(dim=1)  # 1 after one observation, less after several
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    if defense != "natural":  # measured with what this very step observed
        is_fooled = fooled(expected.similarities(model(attacked)), LABELS)
        assert result.ensemble.members[0].fooled_rate == pytest.approx(is_fooled.double().mean().item())


@pytest.mark.parametrize(("name", "saved"), [("triplet", "loss.centroids"), ("soft_triple", "loss.fc")])
def test_eat_trains_with_it_and_its_checkpoint_holds_what_the_loss_keeps(name: str, saved: str, tmp_path: Path) -> None:
    config = small_config(
        f"loss.name={name}",
        "data.batch_size=50",
        "data.images_per_class=10",
        "train.epochs=1",
        "defense.diversity_weight=0.1",
    )
    seen: list[EnsembleStatistics] = []
    (result, *_) = train_locally(config, tmp_path, on_iteration=seen.append)
    for statistics in seen:
        for entry in statistics.members:
            assert all(math.isfinite(value) for value in entry.losses().values())
            assert len(entry.losses()) == 3
            assert entry.fooled_rate is not None
            assert 0 <= entry.fooled_rate <= 1
    kept = load_file(tmp_path / "checkpoints" / f"{result.iterations:08d}" / "member_1.safetensors")
    assert bool(kept[saved].isfinite().all())
    assert bool(kept[saved].any(dim=-1).all())
