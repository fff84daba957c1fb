"""One step of the defenses that attack displacements and tuples, against their formulas written out in float64.

As in test_defenses, twins made before the step go through the same forward passes. Which triplets are chosen is
test_triplets' business; here :func:`mine` is asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_defenses import ATTACK, EPSILON, LABELS, STEP_SIZE, STEPS, Case, fooled_rate

from eat_dist.attacks import GradientAttack
from eat_dist.defenses.triplets import Triplets, mine
from eat_dist.losses.pairs import PairLoss
from eat_dist.robustness.statistics import EnsembleStatistics, MemberStatistics
from eat_dist.seeding import generator
from small_runs import small_config, train_locally

MARGIN = 0.2
THIRD = 1 / 3
Value = Callable[[torch.Tensor], torch.Tensor]


def d(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first - second).square().sum().sqrt()


def hinge_mean(anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, margin: float) -> torch.Tensor:
    """The triplet loss, one triplet after the other."""
    terms = [torch.relu(d(a, p) - d(a, n) + margin) for a, p, n in zip(anchors, positives, negatives, strict=True)]
    return torch.stack(terms).sum() / len(terms)


def climbed(case: Case, rank: int, images: torch.Tensor, value: Value, *, random: bool = True) -> torch.Tensor:
    """Signed gradient steps on the sum of ``value`` in evaluation mode, from a random start or the images."""
    model, current = case.attackers[rank][0], images
    if random:
        noise = torch.rand(images.shape, generator=generator("attack", rank), dtype=torch.float64) * 2 - 1
        current = (images + EPSILON * noise).clamp(0, 1)
    for _ in range(STEPS):
        current = current.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(model(current)), current)
        current = current.detach() + STEP_SIZE * gradient.sign()
        current = current.clamp(images - EPSILON, images + EPSILON).clamp(0, 1)
    return current


def clean(case: Case, rank: int) -> torch.Tensor:
    """[8, D] as an attack sees it."""
    with torch.no_grad():
        return case.attackers[rank][0](case.batches[rank].images)


def spread_proxies(case: Case) -> None:
    """Proxies among the images' embeddings, so that not all images have the same nearest one."""
    for rank, (_, loss) in enumerate(case.twins):
        for proxies in (loss.proxies, case.learners[rank].loss.proxies):
            proxies.data = clean(case, rank)[::2].clone()


def mined(case: Case, rank: int, method: str, embeddings: torch.Tensor | None = None) -> Triplets:
    points = clean(case, rank) if embeddings is None else embeddings
    return mine(LABELS[rank], generator("triplets", rank), method=method, embeddings=points, margin=MARGIN)  # type: ignore[arg-type]


def displaced(case: Case, rank: int) -> torch.Tensor:
    reference = clean(case, rank)
    return climbed(
        case, rank, case.batches[rank].images, lambda e: sum(d(*pair) ** 2 for pair in zip(e, reference, strict=True))
    )


def with_proxies(case: Case, rank: int, total: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
    """The network got the gradient of ``total`` alone, the proxies that of their loss on detached embeddings."""
    case.assert_left_by_step(rank, total + case.twins[rank][1](embeddings.detach(), labels))


def check_measured(
    case: Case, entry: MemberStatistics, adversarial: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor
) -> None:
    assert entry.adversarial_loss == pytest.approx(loss.item())
    assert entry.fooled_rate == pytest.approx(fooled_rate(case.twins[entry.member][1], adversarial, labels))
    assert entry.batch_size == 8


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_adversarial_metric_trains_the_configured_loss_on_displaced_images(beta: float) -> None:
    case = Case(2, name="adversarial_metric", adversarial_share=beta)
    results = case.step()
    for rank, (model, loss) in enumerate(case.twins):
        adversarial, entry = displaced(case, rank), results[0].ensemble.members[rank]
        if beta == 1:
            attacked = model(adversarial)
            total = loss(attacked, LABELS[rank])
            assert (entry.clean_loss, entry.displacement) == (None, None)
        else:
            before, attacked = case.own_embeddings(rank, adversarial)
            total = 0.5 * loss(before, LABELS[rank]) + 0.5 * loss(attacked, LABELS[rank])
            assert entry.displacement == pytest.approx((attacked - before).norm(dim=1).mean().item())
        case.assert_left_by_step(rank, total)
        check_measured(case, entry, attacked, LABELS[rank], loss(attacked, LABELS[rank]))
        assert results[rank].passes == pytest.approx(THIRD + STEPS + (1 if beta == 1 else 2))


@pytest.mark.parametrize("role", ["positive", "negative", "anchor", None])
def test_robust_dml_attacks_one_role_against_fixed_references(role: str | None) -> None:
    case = Case(2, name="robust_dml", perturbed_role=role)
    results = case.step()
    for rank, (_, loss) in enumerate(case.twins):
        tuples, references = mined(case, rank, "random"), clean(case, rank)
        same, other = references[tuples.positives], references[tuples.negatives]

        def value(embeddings: torch.Tensor, same: torch.Tensor = same, other: torch.Tensor = other) -> torch.Tensor:
            far = sum(d(*pair) for pair in zip(embeddings, same, strict=True))
            near = sum(d(*pair) for pair in zip(embeddings, other, strict=True))
            return {"positive": far, "negative": -near, "anchor": far - near}[role or "positive"]

        before, attacked = case.own_embeddings(rank, climbed(case, rank, case.batches[rank].images, value))
        losses = loss(before, LABELS[rank]), loss(attacked, LABELS[rank])
        case.assert_left_by_step(rank, 0.5 * losses[0] + 0.5 * losses[1])
        entry = results[0].ensemble.members[rank]
        check_measured(case, entry, attacked, LABELS[rank], losses[1])
        assert entry.clean_loss == pytest.approx(losses[0].item())
        assert entry.displacement == pytest.approx((attacked - before).norm(dim=1).mean().item())
        assert results[rank].passes == pytest.approx(THIRD + STEPS + 2)


@pytest.mark.parametrize("mining", [None, "softhard", "semihard"])
def test_est_trains_triplets_mined_on_displaced_images(mining: str | None) -> None:
    case = Case(2, name="est", mining=mining)
    results = case.step()
    for rank, (model, _) in enumerate(case.twins):
        embeddings = model(displaced(case, rank))
        triplets = mined(case, rank, mining or "random", embeddings.detach())
        total = hinge_mean(embeddings, embeddings[triplets.positives], embeddings[triplets.negatives], MARGIN)
        with_proxies(case, rank, total, embeddings, LABELS[rank])
        entry = results[0].ensemble.members[rank]
        check_measured(case, entry, embeddings, LABELS[rank], total)
        assert (entry.clean_loss, entry.displacement) == (None, None)
        assert results[rank].passes == pytest.approx(THIRD + STEPS + 1)


@pytest.mark.parametrize(("mining", "margin"), [(None, None), ("softhard", 0.5)])
def test_act_pulls_positive_and_negative_together_and_trains_them_apart(
    mining: str | None, margin: float | None
) -> None:
    case = Case(2, name="act", mining=mining, triplet_margin=margin)
    spread_proxies(case)
    results = case.step()
    for rank, (model, _) in enumerate(case.twins):
        images, triplets = case.batches[rank].images, mined(case, rank, mining or "random")
        pairs = torch.cat([images[triplets.positives], images[triplets.negatives]])

        def value(embeddings: torch.Tensor) -> torch.Tensor:
            return -sum(d(embeddings[i], embeddings[8 + i]) for i in range(8))

        adversarial = climbed(case, rank, pairs, value)
        a, p, n = model(torch.cat([images, adversarial])).split(8)
        total = hinge_mean(a, p, n, margin or MARGIN)
        labels = torch.cat([LABELS[rank][triplets.positives], LABELS[rank][triplets.negatives]])
        with_proxies(case, rank, total, torch.cat([a, p, n]), torch.cat([LABELS[rank], labels]))
        entry = results[0].ensemble.members[rank]
        check_measured(case, entry, torch.cat([p, n]), labels, total)
        before = a[triplets.positives], a[triplets.negatives]
        assert entry.clean_loss == pytest.approx(hinge_mean(a, *before, margin or MARGIN).item())
        moved = [d(x, y).item() for x, y in zip(torch.cat([p, n]), torch.cat(before), strict=True)]
        assert entry.displacement == pytest.approx(sum(moved) / 16)
        assert results[rank].passes == pytest.approx(2 * STEPS + 3 + (THIRD if mining else 0))


def destinations(case: Case, previous: list[float | None]) -> list[float]:
    """−γ·min(u, ℓ)/u, u = γ, and −γ where no loss is known yet; the losses go into the members' memories."""
    for learner, value in zip(case.learners, previous, strict=True):
        if value is not None:
            learner.memory["hm_previous_loss"] = value
    return [-MARGIN if value is None else -MARGIN * min(MARGIN, value) / MARGIN for value in previous]


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize("previous", [[None, 0.07], [0.0, 1.3]])
def test_hm_attacks_all_three_up_to_a_hardness_and_adds_the_intra_class_structure(
    weight: float | None, previous: list[float | None]
) -> None:
    case = Case(2, name="hm", ics_weight=weight)
    spread_proxies(case)
    hardest = destinations(case, previous)
    results = case.step()
    for rank, (model, _) in enumerate(case.twins):
        images, triplets = case.batches[rank].images, mined(case, rank, "softhard")
        chosen = torch.cat([torch.arange(8), triplets.positives, triplets.negatives])

        def value(embeddings: torch.Tensor, destination: float = hardest[rank]) -> torch.Tensor:
            gaps = [destination - (d(a, p) - d(a, n)) for a, p, n in zip(*embeddings.split(8), strict=True)]
            return -sum(torch.relu(gap) ** 2 for gap in gaps)

        adversarial = climbed(case, rank, images[chosen], value)
        passed = model(adversarial if weight is None else torch.cat([images, adversarial]))
        a, p, n = passed[-24:].split(8)
        loss = total = hinge_mean(a, p, n, MARGIN)
        labels, entry = LABELS[rank][chosen], results[0].ensemble.members[rank]
        trained_on = labels
        if weight is None:
            assert (entry.clean_loss, entry.displacement) == (None, None)
        else:
            before, trained_on = passed[:8], torch.cat([LABELS[rank], labels])
            total = loss + weight * hinge_mean(before, a, before[triplets.positives], 0.0)
            three = before[chosen].split(8)
            assert entry.clean_loss == pytest.approx(hinge_mean(*three, MARGIN).item())
            moved = (torch.cat([a, p, n]) - before[chosen]).norm(dim=1).mean()
            assert entry.displacement == pytest.approx(moved.item())
        with_proxies(case, rank, total, passed, trained_on)
        check_measured(case, entry, passed[-24:], labels, loss)
        assert case.learners[rank].memory == {"hm_previous_loss": pytest.approx(loss.item(), rel=1e-12)}
        assert results[rank].passes == pytest.approx(THIRD + 3 * STEPS + 3 + (weight is not None))


def test_hm_leaves_a_triplet_alone_that_is_hard_enough() -> None:
    """From the images themselves, as the paper starts: then such a triplet stays clean."""
    case = Case(1, name="hm", mining="random")
    seen: list[torch.Tensor] = []
    learner = case.learners[0]
    learner.attack = GradientAttack(ATTACK.ball, STEPS, STEP_SIZE, random_start=False)
    learner.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]) if module.training else None)
    images, triplets = case.batches[0].images, mined(case, 0, "random")
    points = clean(case, 0)
    h = [float(d(points[i], points[p]) - d(points[i], points[n])) for i, (p, n) in _rows(triplets)]
    destinations(case, [-sorted(h)[4] if sorted(h)[4] < 0 else None])
    destination = -min(MARGIN, learner.memory.get("hm_previous_loss", MARGIN))
    case.step()
    attacked = seen[-1].split(8)
    reached = [value >= destination for value in h]
    assert 0 < sum(reached) < 8
    for row, (p, n) in _rows(triplets):
        left = [torch.equal(part[row], images[place]) for part, place in zip(attacked, (row, p, n), strict=True)]
        assert left == [reached[row]] * 3


def _rows(triplets: Triplets) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(zip(triplets.positives.tolist(), triplets.negatives.tolist(), strict=True)))


@pytest.mark.parametrize("defense", ["est", "act", "hm"])
def test_beside_a_loss_without_proxies_the_centroids_observe(defense: str) -> None:
    case = Case(1, name=defense)
    loss = PairLoss(torch.nn.Identity(), num_classes=4, embedding_dim=5).double()  # calling it would be an error
    case.learners[0].loss = loss
    results = case.step()
    assert bool(loss.centroids.any(dim=1).all())
    assert results[0].ensemble.members[0].fooled_rate is not None


@pytest.mark.parametrize("defense", ["robust_dml", "adversarial_metric", "est", "act", "hm"])
def test_in_a_short_run_on_digits_the_loss_falls(defense: str, tmp_path: Path) -> None:
    """40 iterations. HM's attack grows with the loss it has brought down, so there it is the loss before the attack."""
    seen: list[EnsembleStatistics] = []
    config = small_config(
        f"defense.name={defense}",
        *(["defense.ics_weight=0.5", "defense.mining=random"] if defense == "hm" else []),
        "ensemble.members=1",
        "data.batch_size=100",
        "data.images_per_class=20",
        "attack.epsilon=0.1",
        "optimiser.learning_rate=3e-3",
    )
    train_locally(config, tmp_path, on_iteration=seen.append)
    entries = [statistics.members[0] for statistics in seen]
    losses = [entry.clean_loss if defense == "hm" else entry.adversarial_loss for entry in entries]
    assert len(losses) == 40
    for figures in (losses, [entry.fooled_rate for entry in entries]):
        assert sum(figures[30:]) < (0.9 if "dml" in defense else 0.85) * sum(figures[:10])  # type: ignore[arg-type]
