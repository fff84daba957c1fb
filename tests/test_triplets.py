"""Mining triplets: who is a candidate, that the choice is uniform and repeats itself, and what cannot be mined."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from eat_dist.attacks import Interleaved
from eat_dist.config import RunConfig, load_config
from eat_dist.defenses.triplets import hardness, mine, triplet_loss
from eat_dist.errors import ConfigError, DataError
from eat_dist.seeding import generator

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
MARGIN = 0.2


def embeddings() -> torch.Tensor:
    """Classes that overlap, so that every method narrows the choice of some anchors and of others not."""
    centres = torch.randn(3, 4, generator=generator("centres"), dtype=torch.float64)[LABELS]
    noise = torch.randn(len(LABELS), 4, generator=generator("noise"), dtype=torch.float64)
    return functional.normalize(centres + 0.5 * noise, dim=1)


def candidates(method: str, anchor: int, positive: int) -> tuple[set[int], set[int]]:
    """Positives and negatives that may be drawn, one by one; semihard's negatives depend on the positive."""
    points, label = embeddings(), LABELS[anchor]
    others = [image for image in range(len(LABELS)) if image != anchor]
    d = {image: float((points[anchor] - points[image]).norm()) for image in others}
    positives = {image for image in others if LABELS[image] == label}
    negatives = {image for image in others if LABELS[image] != label}
    if method == "softhard":
        nearest, farthest = min(d[n] for n in negatives), max(d[p] for p in positives)
        return {p for p in positives if d[p] > nearest} or positives, {
            n for n in negatives if d[n] < farthest
        } or negatives
    if method == "semihard":
        return positives, {n for n in negatives if d[positive] < d[n] < d[positive] + MARGIN} or negatives
    return positives, negatives


@pytest.mark.parametrize("method", ["random", "softhard", "semihard"])
def test_every_candidate_and_nobody_else_is_drawn(method: str) -> None:
    drawn: dict[tuple[int, int], set[int]] = {}
    seen: dict[int, set[int]] = {}
    for draw in range(300):
        triplets = mine(LABELS, generator("draw", draw), method=method, embeddings=embeddings(), margin=MARGIN)  # type: ignore[arg-type]
        for anchor, (p, n) in enumerate(zip(triplets.positives.tolist(), triplets.negatives.tolist(), strict=True)):
            seen.setdefault(anchor, set()).add(p)
            drawn.setdefault((anchor, p if method == "semihard" else -1), set()).add(n)
    narrowed = {"positives": 0, "negatives": 0}
    for (anchor, positive), negatives in drawn.items():
        expected = candidates(method, anchor, positive)
        assert seen[anchor] == expected[0]
        assert negatives == expected[1]
        narrowed["positives"] += len(expected[0]) < int((LABELS[anchor] == LABELS).sum()) - 1
        narrowed["negatives"] += len(expected[1]) < int((LABELS[anchor] != LABELS).sum())
    assert bool(narrowed["positives"]) is (method == "softhard")
    assert bool(narrowed["negatives"]) is (method != "random")


def test_the_choice_is_uniform() -> None:
    counts = torch.zeros(len(LABELS))
    for draw in range(2000):
        counts[mine(LABELS, generator("draw", draw)).negatives[0]] += 1
    assert counts[:3].sum() == 0
    assert (counts[3:] / 2000 - 1 / 7).abs().max() < 0.03


@pytest.mark.parametrize("method", ["random", "softhard", "semihard"])
def test_a_copy_of_the_anchor_is_its_positive_only_where_the_class_has_no_other_image(method: str) -> None:
    """Small classes and the split `bootstrap` repeat images: class 0 holds 7 twice and 8, class 1 9 twice."""
    labels, images = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([7, 7, 8, 9, 9])
    points = torch.nn.functional.normalize(torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1], [0, 1]]).float(), dim=1)
    drawn: list[set[int]] = [set() for _ in labels]
    for draw in range(100):
        chosen = mine(labels, generator("draw", draw), method=method, images=images, embeddings=points)  # type: ignore[arg-type]
        for anchor, positive in enumerate(chosen.positives.tolist()):
            drawn[anchor].add(positive)
    assert drawn == [{2}, {2}, {0, 1}, {4}, {3}]


def test_positives_and_negatives_are_drawn_independently() -> None:
    pairs = {
        (int(t.positives[0]), int(t.negatives[0]))
        for t in (mine(LABELS, generator("draw", draw)) for draw in range(300))
    }
    assert pairs == set(itertools.product([1, 2], range(3, 10)))


def test_the_same_seed_gives_the_same_triplets_and_every_replica_all_of_them() -> None:
    whole = mine(LABELS, generator("triplets"))
    for index in range(2):
        part = mine(LABELS, Interleaved(generator("triplets"), index, 2))
        assert torch.equal(part.positives, whole.positives)
        assert torch.equal(part.negatives, whole.negatives)
    assert not torch.equal(mine(LABELS, generator("other")).negatives, whole.negatives)


def test_mining_leaves_no_gradient() -> None:
    points = embeddings().requires_grad_(True)
    triplets = mine(LABELS, generator("draw"), method="softhard", embeddings=points)
    assert not triplets.positives.requires_grad


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 1, 1, 2], "got 5 images of 3 classes, 1 alone in theirs. Set data.sampler to class_balanced."),
        ([0, 1, 2], "got 3 images of 3 classes, 3 alone in theirs."),
        ([4, 4, 4], "got 3 images of 1 classes, 0 alone in theirs."),
    ],
)
def test_an_image_without_a_partner_or_an_opponent_is_an_error(labels: list[int], message: str) -> None:
    with pytest.raises(DataError) as raised:
        mine(torch.tensor(labels), generator("draw"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_hardness_and_loss_of_two_triplets_worked_by_hand() -> None:
    """a = (1, 0), p = (0, 1), n = (−1, 0): d(a, p) = √2, d(a, n) = 2. The second one, turned round, is hard."""
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    a, p, n = points[[0, 0]], points[[1, 2]], points[[2, 1]]
    torch.testing.assert_close(hardness(a, p, n), torch.tensor([2**0.5 - 2, 2 - 2**0.5], dtype=torch.float64))
    assert triplet_loss(a, p, n, margin=MARGIN).item() == pytest.approx((2 - 2**0.5 + MARGIN) / 2)


def test_where_anchor_and_positive_coincide_the_gradient_is_finite() -> None:
    points = embeddings().requires_grad_(True)
    triplet_loss(points, points, points.flip(0), margin=MARGIN).backward()
    assert points.grad is not None
    assert bool(points.grad.isfinite().all())


def config(*assignments: str) -> RunConfig:
    return load_config(None, list(assignments))


@pytest.mark.parametrize("defense", ["robust_dml", "est", "act", "hm"])
def test_without_class_balanced_batches_the_config_is_refused(defense: str) -> None:
    with pytest.raises(ConfigError, match=r"so data\.sampler must be class_balanced; got shuffle"):
        config(f"defense.name={defense}", "data.sampler=shuffle")


@pytest.mark.parametrize("defense", ["est", "adversarial_metric"])
@pytest.mark.parametrize("setting", ["attack.name=fgsm", "attack.random_start=false"])
def test_an_attack_that_would_stay_where_it_is_is_refused(defense: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"attack\.random_start true and attack\.name pgd; got"):
        config(f"defense.name={defense}", setting)


@pytest.mark.parametrize("defense", ["act", "hm"])
def test_tuples_over_several_replicas_are_refused(defense: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.replicas_per_member must be 1; got 2"):
        config(f"defense.name={defense}", "cluster.replicas_per_member=2")
    assert config("defense.name=est", "cluster.replicas_per_member=2").cluster.replicas_per_member == 2
