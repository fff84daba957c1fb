"""The members' disagreement about neighbours: by hand, at its limits, and its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch.nn import functional

from eat_dist.models.disagreement import disagreement
from eat_dist.models.ensemble import EmbeddingEnsemble
from eat_dist.seeding import generator


def drawn(*shape: int, name: str) -> torch.Tensor:
    return torch.randn(*shape, generator=generator("test disagreement", name), dtype=torch.float64)


def test_two_members_and_two_references_by_hand() -> None:
    """Cosines (1, 0) and (0, 1) at τ = 1 / ln 3 give p = (3/4, 1/4) and q = (1/4, 3/4), whose mean is (1/2, 1/2).

    JS = H(1/2, 1/2) − H(3/4, 1/4) = 1 − (2 − 3/4·log₂ 3) = 3/4·log₂ 3 − 1 = 0.18872 bits.
    """
    references = torch.eye(2, dtype=torch.float64)
    first, second = references[:1], references[1:]
    value = disagreement([first, 5 * second], [references, 2 * references], temperature=1 / 1.0986122886681098)
    assert value.tolist() == pytest.approx([0.18872187554086717])


def test_it_is_the_mean_over_the_pairs_of_scipys_divergence() -> None:
    members, references = ([drawn(5, 4, name=f"{kind} {m}") for m in range(3)] for kind in ("image", "reference"))
    own = torch.eye(5, dtype=torch.bool)
    found = disagreement(members, references, own=own, temperature=0.3)
    for image in range(5):
        others = [n for n in range(5) if n != image]
        shares = [
            (functional.cosine_similarity(one[image][None], compared[others]) / 0.3).softmax(dim=0)
            for one, compared in zip(members, references, strict=True)
        ]
        expected = [jensenshannon(p, q, base=2) ** 2 for p, q in itertools.combinations(shares, 2)]
        assert float(found[image]) == pytest.approx(sum(expected) / 3)


def test_members_of_one_mind_do_not_disagree_and_opposite_ones_do_wholly() -> None:
    """Whatever the member's own space: the second one sees everything turned by 90°."""
    images, references = drawn(6, 2, name="images"), drawn(9, 2, name="references")
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    same = disagreement([images, images @ turn], [references, references @ turn], temperature=0.05)
    assert float(same.max()) < 1e-12
    pole, poles = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert disagreement([pole, -pole], [poles, poles], temperature=0.01).tolist() == pytest.approx([1.0])


def test_the_further_a_member_turns_the_more_it_disagrees() -> None:
    angles = torch.tensor([0.0, 10.0, 30.0, 60.0, 90.0]).deg2rad()
    turned = torch.stack([angles.cos(), angles.sin()], dim=1)
    axes = torch.eye(2)
    values = disagreement([axes[:1].expand(5, 2), turned], [axes, axes], temperature=0.5)
    assert (values.diff() > 0).all()
    assert float(values[0]) == pytest.approx(0.0, abs=1e-6)


def test_what_is_left_out_changes_nothing() -> None:
    members, references = ([drawn(4, 3, name=f"{kind} {m}") for m in range(2)] for kind in ("image", "reference"))
    own = torch.zeros(4, 4, dtype=torch.bool)
    own[:, 1] = True
    shorter = [embeddings[[0, 2, 3]] for embeddings in references]
    for temperature in (0.001, 1.0):
        left_out = disagreement(members, references, own=own, temperature=temperature)
        assert torch.allclose(left_out, disagreement(members, shorter, temperature=temperature), atol=1e-12)
    assert not torch.allclose(left_out, disagreement(members, references, temperature=1.0))


def test_the_gradient_is_that_of_the_values() -> None:
    members = tuple(drawn(3, 4, name=f"image {m}").requires_grad_() for m in range(2))
    references, own = [drawn(3, 4, name=f"reference {m}") for m in range(2)], torch.eye(3, dtype=torch.bool)

    def value(*embeddings: torch.Tensor) -> torch.Tensor:
        return disagreement(embeddings, references, own=own, temperature=0.5)

    assert torch.autograd.gradcheck(value, members)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 10.0])
def test_the_gradient_is_finite_at_any_temperature(temperature: float) -> None:
    members = [drawn(8, 4, name=f"image {m}").float().requires_grad_() for m in range(3)]
    own = torch.eye(8, dtype=torch.bool)
    values = disagreement(members, [one.detach() for one in members], own=own, temperature=temperature)
    values.sum().backward()
    assert ((values >= 0) & (values <= 1)).all()
    assert all(one.grad is not None and torch.isfinite(one.grad).all() for one in members)


def test_an_ensemble_compares_a_batch_with_itself_or_with_references() -> None:
    weights = generator("test disagreement", "weights")
    ensemble = EmbeddingEnsemble([nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)])
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=weights))
    images, others = (torch.rand(n, 1, 2, 2, generator=weights) for n in (5, 7))
    members, references = ensemble.member_embeddings(images), ensemble.member_embeddings(others)
    own = torch.eye(5, dtype=torch.bool)
    assert torch.equal(ensemble.disagreement(images), disagreement(members, members, own=own))
    assert torch.equal(ensemble.disagreement(images, references), disagreement(members, references))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(ensemble.disagreement(images, references, temperature=0.1).sum(), images)
    assert torch.isfinite(gradient).all()
    assert float(gradient.abs().min(dim=0).values.max()) > 0


def test_one_member_and_missing_references_are_refused() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match="two or more; got 1"):
        disagreement([one], [one])
    with pytest.raises(ValueError, match="got 1 sets of references for 2 members"):
        disagreement([one, one], [one])
    with pytest.raises(ValueError, match="two or more; got 1"):
        EmbeddingEnsemble([nn.Flatten()]).disagreement(torch.rand(3, 1, 2, 2))
