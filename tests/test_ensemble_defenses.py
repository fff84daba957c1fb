"""One step of ADP and of DVERGE against their formulas written out over all members at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_defenses import CLASSES, EPSILON, LABELS, STEPS, Case, fooled_rate

from eat_dist.attacks import whole_batch
from eat_dist.defenses.adp import DET_OFFSET, ensemble_entropy, log_determinant
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.robustness.transfer import TransferPlan
from eat_dist.seeding import generator


def adp_of_one_image(similarities: list[torch.Tensor], label: int, alpha: float, beta: float) -> torch.Tensor:
    """α·H(mean prediction) + β·log det of the Gram matrix of normalised non-true predictions, step by step."""
    predictions = [(32 * s).exp() / (32 * s).exp().sum() for s in similarities]
    mean = sum(predictions) / len(predictions)
    entropy = -sum(p * p.log() for p in mean)
    wrong = [c for c in range(CLASSES) if c != label]
    directions = [p[wrong] / p[wrong].square().sum().sqrt() for p in predictions]
    gram = torch.stack([torch.stack([a @ b for b in directions]) for a in directions])
    return alpha * entropy + beta * torch.det(gram + DET_OFFSET * torch.eye(len(gram)).double()).log()


@pytest.mark.parametrize(
    ("iteration", "options", "alpha", "beta"),
    [
        (0, {}, 2.0, 0.5),
        (1, {}, 2.0, 0.5),
        (5, {}, 2.0, 0.5),
        (0, {"entropy_weight": 0.0, "log_det_weight": 3.0}, 0, 3),
    ],
)
def test_every_member_of_adp_takes_its_part_of_the_gradient_of_the_joint_loss(
    iteration: int, options: dict[str, float], alpha: float, beta: float
) -> None:
    case = Case(3, name="adp", **options)
    case.start = EnsembleStatistics.initial(case.learners[0].exchange.policy, iteration)  # type: ignore[attr-defined]
    results = case.step()
    sender = iteration % 3
    images, labels = case.batches[sender].images, LABELS[sender]
    embeddings = [model(images) for model, _ in case.twins]
    losses = [loss(mine, labels) for (_, loss), mine in zip(case.twins, embeddings, strict=True)]
    similarities = [loss.similarities(mine) for (_, loss), mine in zip(case.twins, embeddings, strict=True)]
    terms = [
        adp_of_one_image([member[row] for member in similarities], label, alpha, beta)
        for row, label in enumerate(labels.tolist())
    ]
    joint = sum(losses) - sum(terms) / len(terms)
    joint.backward()  # type: ignore[union-attr]  # through all members at once
    for rank in range(3):
        case.assert_like_twin(rank)
        measured = results[0].ensemble.members[rank]
        assert measured.clean_loss == pytest.approx(losses[rank].item())
        assert (measured.adversarial_loss, measured.fooled_rate, measured.received) == (None, None, ())
        assert results[rank].passes == 1


def test_the_entropy_of_members_that_are_sure_of_different_classes_is_that_of_a_coin() -> None:
    logits = torch.tensor([[[500.0, 0.0, 0.0]], [[0.0, 500.0, 0.0]]], requires_grad=True)
    entropy = ensemble_entropy(logits)
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())
    entropy.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_determinant_is_that_of_the_angle_between_two_members_wrong_classes() -> None:
    """Wrong classes as 3 : 4 and 4 : 3 have the cosine 24/25: det = 1 − (24/25)²; the true class takes no part."""
    probabilities = torch.tensor([[[0.3, 3.0, 4.0]], [[9.0, 4.0, 3.0]]], dtype=torch.float64)
    found = log_determinant(probabilities.log(), torch.tensor([0]))
    assert found.exp().item() == pytest.approx(1 - (24 / 25) ** 2, rel=1e-4)


def test_the_determinant_stays_finite_where_members_agree_or_probabilities_underflow() -> None:
    agreeing = torch.randn(1, 4, 5, generator=generator(0)).repeat(3, 1, 1)
    for logits in (agreeing, 1000 * torch.randn(3, 4, 5, generator=generator(1))):
        logits.requires_grad_()
        found = log_determinant(logits, torch.tensor([0, 1, 2, 3]))
        found.sum().backward()
        assert torch.isfinite(found).all()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_plans_of_everybody_and_of_one_sender() -> None:
    assert TransferPlan.from_all(3).sources == ((1, 2), (0, 2), (0, 1))
    assert TransferPlan.from_all(1).sources == ((),)
    assert TransferPlan.from_one(1, 3).sources == ((1,), (), (1,))
    assert TransferPlan.from_one(1, 3).targets(1) == (0, 2)
    assert TransferPlan.from_one(1, 3).targets(0) == ()


def distilled(case: Case, rank: int, epsilon: float, steps: int, project: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Image by image: signed steps with momentum towards the features of the partner image, from the source."""
    network = case.attackers[rank][0]
    images = case.batches[rank].images

    def features(image: torch.Tensor) -> torch.Tensor:
        return network.backbone((image[None] - network.mean) / network.std)[0]

    partners = whole_batch(generator("distil", rank)).permutation(8).tolist()
    assert partners != list(range(8))
    results = []
    for source, partner in zip(images, partners, strict=True):
        target, current, momentum = features(images[partner]).detach(), source, torch.zeros_like(source)
        for _ in range(steps):
            current = current.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad((features(current) - target).square().sum(), current)
            momentum = momentum + gradient / gradient.abs().sum().clamp_min(1e-12)
            current = project(current.detach() - epsilon / steps * momentum.sign(), source)
        results.append(current.detach())
    return torch.stack(results)


def into_ball(epsilon: float) -> Callable[..., torch.Tensor]:
    return lambda image, centre: image.clamp(centre - epsilon, centre + epsilon).clamp(0, 1)


@pytest.mark.parametrize(
    ("options", "epsilon", "steps"), [({}, EPSILON, STEPS), ({"distil_epsilon": 0.2, "distil_steps": 3}, 0.2, 3)]
)
def test_dverge_trains_each_member_on_what_all_others_distilled(
    options: dict[str, float], epsilon: float, steps: int
) -> None:
    case = Case(3, name="dverge", **options)
    images = [distilled(case, rank, epsilon, steps, into_ball(epsilon)) for rank in range(3)]
    results = case.step()
    merged = results[0].ensemble
    for rank, (model, loss) in enumerate(case.twins):
        total, received = torch.zeros((), dtype=torch.float64), merged.members[rank].received
        assert [entry.sender for entry in received] == [peer for peer in range(3) if peer != rank]
        for entry in received:
            embeddings = model(images[entry.sender])
            part = loss(embeddings, LABELS[entry.sender])
            assert entry.loss == pytest.approx(part.item())
            rate = fooled_rate(loss, embeddings, LABELS[entry.sender])
            assert entry.fooled_rate == pytest.approx(rate)
            assert merged.transfer_matrix[rank, entry.sender] == pytest.approx(rate)
            total = total + part
        case.assert_left_by_step(rank, total)
        with torch.no_grad():
            clean = loss(case.attackers[rank][0](case.batches[rank].images), LABELS[rank])
        assert merged.members[rank].clean_loss == pytest.approx(clean.item())
        assert (merged.members[rank].adversarial_loss, merged.members[rank].fooled_rate) == (None, None)
        assert results[rank].passes == pytest.approx(steps + 1 / 3 + 2)


def test_distillation_brings_the_features_nearer_to_those_of_the_other_image() -> None:
    case = Case(1, name="dverge", distil_epsilon=0.3, distil_steps=10)
    from eat_dist.defenses.dverge import _distilled

    learner, images = case.learners[0], case.batches[0].images
    found = _distilled(learner, case.batches[0])
    features = case.attackers[0][0].features
    targets = features(images)[torch.from_numpy(whole_batch(generator("distil", 0)).permutation(8))]
    before = (features(images) - targets).square().sum(dim=(1, 2, 3))
    after = (features(found.images) - targets).square().sum(dim=(1, 2, 3))
    assert found.steps == 10
    assert (found.images - images).abs().max() <= 0.3 + 1e-12
    assert (after <= before).all()
    assert after.sum() < 0.7 * before.sum()
