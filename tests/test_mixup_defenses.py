"""One step of mixup, manifold mixup and interpolated adversarial training against their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_defenses import LABELS, STEPS, Case
from torch.nn import functional

from eat_dist.attacks import Interleaved, whole_batch
from eat_dist.defenses.manifold_mixup import _output_changed
from eat_dist.defenses.mixing import Mix
from eat_dist.models import BACKBONES
from eat_dist.seeding import generator
from model_forms import built, small

Pairs = tuple[float, list[int]]


def draw(numbers: np.random.Generator, alpha: float) -> Pairs:
    return numbers.beta(alpha, alpha), numbers.permutation(8).tolist()


def mixed(images: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    share, partners = pairs
    return torch.stack([share * images[i] + (1 - share) * images[j] for i, j in enumerate(partners)])


def two_labels(loss: torch.nn.Module, embeddings: torch.Tensor, labels: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    share, partners = pairs
    others = torch.tensor([int(labels[j]) for j in partners])
    total: torch.Tensor = share * loss(embeddings, labels) + (1 - share) * loss(embeddings, others)
    return total


@pytest.mark.parametrize(("options", "alpha"), [({}, 1.0), ({"mix_alpha": 0.3}, 0.3)])
def test_mixup_leaves_the_gradient_of_the_loss_with_two_labels(options: dict[str, float], alpha: float) -> None:
    case = Case(3, name="mixup", **options)
    results = case.step()
    shares = []
    for rank, (model, loss) in enumerate(case.twins):
        pairs = draw(whole_batch(generator("mix", rank)), alpha)
        shares.append(pairs[0])
        total = two_labels(loss, model(mixed(case.batches[rank].images, pairs)), LABELS[rank], pairs)
        case.assert_left_by_step(rank, total)
        measured = results[0].ensemble.members[rank]
        assert measured.clean_loss == pytest.approx(total.item())
        assert (measured.adversarial_loss, measured.fooled_rate, measured.displacement) == (None, None, None)
        assert results[rank].passes == 1
    assert len(set(shares)) == 3
    assert all(0.05 < share < 0.95 for share in shares) or alpha < 1  # a mixture, not one image or the other


def seed_of_layer(k: int) -> int:
    """A seed with which the step draws the layer k of a network of two stages."""

    def drawn(seed: int) -> int:
        numbers = whole_batch(generator("mix", seed))
        draw(numbers, 2.0)
        return int(numbers.integers(3))

    return next(seed for seed in range(100) if drawn(seed) == k)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_manifold_mixup_mixes_what_leaves_a_random_layer(k: int) -> None:
    case, seed = Case(1, name="manifold_mixup"), seed_of_layer(k)
    case.learners[0].generator = lambda purpose: generator(purpose, seed)
    results = case.step()
    pairs = draw(whole_batch(generator("mix", seed)), 2.0)
    model, loss = case.twins[0]
    features = (case.batches[0].images - model.mean) / model.std
    blocks = model.backbone.blocks  # convolution, BatchNorm and ReLU, twice
    features = blocks[3 * k :](mixed(blocks[: 3 * k](features), pairs))
    pooled = features.mean(dim=(2, 3)) + features.amax(dim=(2, 3))
    total = two_labels(loss, functional.normalize(model.head(pooled), dim=1), LABELS[0], pairs)
    case.assert_left_by_step(0, total)
    assert results[0].ensemble.members[0].clean_loss == pytest.approx(total.item())
    assert results[0].passes == 1
    assert not any(module._forward_hooks for module in case.learners[0].model.modules())


@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_backbone_is_cut_by_each_of_its_stages(name: str) -> None:
    """With another image's features handed over at a stage, the network knows nothing of the own image any more."""
    model = built(small(name))
    images = torch.rand(3, 3, 64, 64, generator=generator("images"))
    partners = torch.tensor([1, 2, 0])
    with torch.no_grad():
        plain = model(images)
        assert len(model.backbone.stages) >= 2
        for stage in model.backbone.stages:
            with _output_changed(stage, Mix(0.0, torch.zeros(3), partners).of):
                torch.testing.assert_close(model(images), plain[partners], rtol=1e-4, atol=1e-5)
            with _output_changed(stage, Mix(0.5, torch.zeros(3), partners).of):
                assert (model(images) - plain).abs().max() > 1e-4
            torch.testing.assert_close(model(images), plain, rtol=0, atol=0)


def test_iat_leaves_the_gradient_of_half_mixed_clean_and_half_mixed_adversarial_images() -> None:
    case = Case(2, name="iat")
    adversarial = [case.attacked([rank], rank) for rank in range(2)]
    results = case.step()
    for rank, (model, loss) in enumerate(case.twins):
        numbers = whole_batch(generator("mix", rank))
        pairs = draw(numbers, 1.0), draw(numbers, 1.0)
        assert pairs[0] != pairs[1]
        images = (mixed(case.batches[rank].images, pairs[0]), mixed(adversarial[rank], pairs[1]))
        halves = model(torch.cat(images)).split(8)
        losses = [two_labels(loss, half, LABELS[rank], drawn) for half, drawn in zip(halves, pairs, strict=True)]
        case.assert_left_by_step(rank, 0.5 * losses[0] + 0.5 * losses[1])
        measured = results[0].ensemble.members[rank]
        assert measured.clean_loss == pytest.approx(losses[0].item())
        assert measured.adversarial_loss == pytest.approx(losses[1].item())
        assert (measured.fooled_rate, measured.displacement) == (None, None)
        assert results[rank].passes == STEPS + 2


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_are_of_the_beta_distribution_and_pairs_are_permutations(alpha: float) -> None:
    labels = torch.arange(6)
    mixes = [Mix.draw(whole_batch(generator("mix", seed)), labels, alpha=alpha) for seed in range(2000)]
    shares = np.array([mix.share for mix in mixes])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    assert all(sorted(mix.partners.tolist()) == labels.tolist() for mix in mixes)
    counts = np.bincount([int(mix.partners[0]) for mix in mixes], minlength=6) / 2000
    assert np.abs(counts - 1 / 6).max() < 0.04


def test_a_centroid_is_shown_the_class_that_a_mixed_image_has_more_of() -> None:
    seen: list[list[int]] = []

    class Observing:
        def observe(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
            assert not embeddings.requires_grad
            seen.append(labels.tolist())

    for share in (0.7, 0.3):
        mix = Mix(share, torch.tensor([5, 6, 7]), torch.tensor([2, 0, 1]))
        mix.observe(Observing(), torch.zeros(3, 2, requires_grad=True))  # type: ignore[arg-type]
    assert seen == [[5, 6, 7], [7, 5, 6]]


def test_all_parts_of_a_batch_draw_the_same_numbers_for_the_whole_of_it() -> None:
    whole = whole_batch(generator("mix")).permutation(50).tolist()
    assert whole == whole_batch(Interleaved(generator("mix"), 1, 2)).permutation(50).tolist()
    assert whole != whole_batch(generator("other")).permutation(50).tolist()
