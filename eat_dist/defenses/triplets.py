"""Triplets of a batch: how they are mined, their loss, and how a defense that trains on them ends its step.

The defenses of Zhou et al. (:mod:`est`, :mod:`act`, :mod:`hm`) train the network on a triplet loss. The configured loss
has no part in that. Its proxies learn beside it, on the same embeddings detached from the network, so that the nearest
proxy, hence the fooled rate and the class risk, means here what it means under every other defense; a loss without
proxies observes the embeddings. This is ours: the papers have no proxies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from eat_dist.attacks import Generators, Interleaved
from eat_dist.batch import Batch
from eat_dist.defenses.displaced import reference_embeddings
from eat_dist.defenses.table import FORWARD, Learner, Measured, StepResult, Waits, await_merged, statistics_of
from eat_dist.errors import DataError
from eat_dist.robustness.statistics import EnsembleStatistics

Mining = Literal["random", "softhard", "semihard"]


@dataclass(frozen=True)
class Triplets:
    """One triplet an image of a batch: image i is the anchor.

    Attributes:
        positives: [B] int64, for each anchor the place of another image of its class (of a copy, where the batch has
            no other).
        negatives: [B] int64, the place of an image of another class.
    """

    positives: torch.Tensor
    negatives: torch.Tensor


def mine(
    labels: torch.Tensor,
    generators: Generators,
    *,
    method: Mining = "random",
    images: torch.Tensor | None = None,
    embeddings: torch.Tensor | None = None,
    margin: float = 0.2,
) -> Triplets:
    """Choose a positive and a negative for every image, uniformly among its candidates.

    The candidates, with d the Euclidean distance of embeddings, as in the public code of Zhou et al.
    (``robrank/losses/miner.py``):

    - ``random``: every image of the anchor's class, every image of another class.
    - ``softhard`` (Roth et al. 2020): the positives farther than the nearest negative, the negatives nearer than the
      farthest positive.
    - ``semihard`` (Schroff et al. 2015): every positive p, the negatives n with d(a, p) < d(a, n) < d(a, p) + γ.

    Where that leaves none, every positive or negative is a candidate. Deviations from that code: every image is an
    anchor, where a batch there holds pairs and the first of each pair is one; no image is its own positive, nor is a
    copy of it, unless the batch has no other image of the class.

    Args:
        labels: [B] int64.
        generators: The only source of random numbers; one draw of B·B. Of a batch that several replicas share, every
            one of them gets the whole choice.
        method: How.
        images: [B] int64, which image stands at each place: small classes and the split ``bootstrap`` repeat some.
            Default: all are different.
        embeddings: [B, D], what distances are measured on; ``random`` needs none.
        margin: γ of ``semihard``.

    Raises:
        DataError: An image has no other one of its class, or none of another class.
    """
    same = labels[:, None] == labels
    elsewhere = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive, negative = same & elsewhere, ~same
    if not bool((positive.any(dim=1) & negative.any(dim=1)).all()):
        alone = int((~positive.any(dim=1)).sum())
        raise DataError(
            f"triplets need another image of its class and one of another for every image of a batch; got "
            f"{len(labels)} images of {len(torch.unique(labels))} classes, {alone} alone in theirs. Set "
            f"data.sampler to class_balanced."
        )
    if images is not None:
        places = images.to(labels.device)
        positive = _if_any(positive & (places[:, None] != places), positive)
    generator = generators.generator if isinstance(generators, Interleaved) else generators
    assert isinstance(generator, torch.Generator)
    # One number a pair: no image is both, so positives and negatives are drawn independently all the same.
    drawn = torch.rand(same.shape, generator=generator, device=labels.device)
    if method == "random":
        return Triplets(_drawn(positive, drawn), _drawn(negative, drawn))
    assert embeddings is not None, f"mining by '{method}' compares distances"
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist").detach()
    if method == "softhard":
        farthest = distances.masked_fill(~positive, float("-inf")).amax(dim=1, keepdim=True)
        nearest = distances.masked_fill(~negative, float("inf")).amin(dim=1, keepdim=True)
        positives = _drawn(_if_any(positive & (distances > nearest), positive), drawn)
        return Triplets(positives, _drawn(_if_any(negative & (distances < farthest), negative), drawn))
    positives = _drawn(positive, drawn)
    to_positive = distances.gather(1, positives[:, None])
    beyond = negative & (distances > to_positive) & (distances < to_positive + margin)
    return Triplets(positives, _drawn(_if_any(beyond, negative), drawn))


def mine_clean(learner: Learner, batch: Batch) -> tuple[Triplets, float]:
    """Mine by the configured method on the clean batch, and what it cost in passes: nothing where it is random."""
    method, embeddings, passes = learner.options["mining"], None, 0.0
    if method != "random":
        embeddings, passes = reference_embeddings(learner, batch.images), FORWARD
    triplets = mine(
        batch.labels,
        learner.generator("triplets"),
        method=method,
        images=batch.indices,
        embeddings=embeddings,
        margin=learner.options["triplet_margin"],
    )
    return triplets, passes


def _if_any(candidates: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """[B, B] bool: the rows of ``candidates`` that have one, those of ``otherwise`` elsewhere."""
    return torch.where(candidates.any(dim=1, keepdim=True), candidates, otherwise)


def _drawn(candidates: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[B] the candidate of each row with the largest of its independent numbers: a uniform choice."""
    return numbers.masked_fill(~candidates, -1.0).argmax(dim=1)


def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[B] ‖x − x'‖ of embeddings [B, D]; where two coincide, the gradient is 0."""
    lengths: torch.Tensor = (first - second).norm(dim=1)
    return lengths


def hardness(anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """[B] H = d(a, p) − d(a, n) ∈ [−2, 2] of embeddings [B, D] (Zhou & Patel 2022, equation (2))."""
    return distance(anchors, positives) - distance(anchors, negatives)


def triplet_loss(
    anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, *, margin: float
) -> torch.Tensor:
    """Mean over all triplets of [d(a, p) − d(a, n) + γ]₊, embeddings [B, D] → scalar."""
    return (hardness(anchors, positives, negatives) + margin).clamp_min(0).mean()


def conclude(
    learner: Learner,
    batch: Batch,
    ensemble: EnsembleStatistics,
    *,
    total: torch.Tensor,
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    attacked: int,
    measured: Measured,
    passes: float,
) -> StepResult:
    """Hand in the statistics, take the backward pass of a triplet loss, and let the proxies learn beside it.

    Args:
        learner: The member.
        batch: Its clean batch.
        ensemble: As a step gets it.
        total: Scalar, what the network learns from.
        embeddings: [N, D] all that were trained on, of one pass.
        labels: [N] theirs.
        attacked: How many of them, the last ones, are adversarial: those the fooled rate is of.
        measured: Losses and displacement.
        passes: What the step cost.
    """
    detached = embeddings.detach()
    assert isinstance(learner.loss, nn.Module)
    if next(learner.loss.parameters(), None) is not None:
        total = total + learner.loss(detached, labels)
    learner.loss.observe(detached, labels)  # before similarities are asked for, so that they know these classes
    similarities = learner.loss.similarities(detached[-attacked:])
    own = replace(measured, similarities=similarities, labels=labels[-attacked:])
    pending = learner.exchange.submit(statistics_of(learner, batch, ensemble, own, []), ensemble)
    total.backward()  # type: ignore[no-untyped-call]
    waits = Waits()
    return StepResult(await_merged(pending, waits), passes, waits)
