"""The attacks of the Empirical Robustness Score, one row a run: the partner, the objective, the figures.

Zhou et al., "Adversarial Ranking Attack and Defense" (ECCV 2020: CA, QA, ES) and "Adversarial Attack and Defense in
Deep Ranking" (arXiv 2106.03614: the others). Where the papers leave something open, their public code counts, since it
made the tables; docs/ers.md names every deviation from it.

An attacked image meets a **partner**, a sample of the clean gallery: the query that a candidate is ranked for, the
candidate that a query is asked for, or the sample that it is drawn to. Everything here looks at one image, its partner
and the clean gallery alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from eat_dist.attacks import GradientAttack, Objective, WhiteBox
from eat_dist.attacks.objectives import displacement
from eat_dist.evaluation.ers_gallery import Gallery, Pairs
from eat_dist.metrics import hits_at_k

# CA− and QA− begin with a candidate among this share of the nearest.
_TOP_SHARE = 0.01
# GTT: the top-1 sample counts as kept while it is among so many.
_KEPT_AMONG = 4


Partners = Callable[[Gallery, torch.Tensor, Sequence[torch.Generator]], torch.Tensor]
"""Positions [B] of images and a CPU generator for each → positions [B] of their partners, another image each."""
Measure = Callable[[Pairs, torch.Tensor], torch.Tensor]
"""Attacked embeddings [B, D] of length 1 → a figure an image [B]; its mean over the images is what is reported."""


@dataclass(frozen=True)
class ErsAttack:
    """One run over the images.

    Attributes:
        partners: Whom each image meets.
        objective: What is maximised, of embeddings of length 1.
        measures: Figure → how it is read from the attacked embeddings.
        first_step: What the first step climbs instead, where the objective has no gradient at the image itself.
    """

    partners: Partners
    objective: Callable[[Pairs], Objective]
    measures: Mapping[str, Measure]
    first_step: Objective | None = None

    def craft(
        self, model: nn.Module, images: torch.Tensor, pairs: Pairs, *, attack: GradientAttack, draws: int = 1
    ) -> torch.Tensor:
        """Attack [B, C, H, W] images in [0, 1] from the images themselves; the last iterate, of the same shape."""
        current, steps = images, attack.num_steps
        if self.first_step is not None:
            climbed = WhiteBox(model, _of_length_1(self.first_step), draws)
            current, steps = attack.advance(climbed, images, images, num_steps=1).images, steps - 1
        climbed = WhiteBox(model, _of_length_1(self.objective(pairs)), draws)
        return attack.advance(climbed, images, current, num_steps=steps).images


def _of_length_1(objective: Objective) -> Objective:
    return lambda embeddings: objective(functional.normalize(embeddings, dim=1))


# Partners.


def _itself(_: Gallery, indices: torch.Tensor, __: Sequence[torch.Generator]) -> torch.Tensor:
    return indices


def _any_other(gallery: Gallery, indices: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Uniform over all other images. The public code may also draw the image itself, once in N."""
    count = len(gallery.clean)
    return (indices + _drawn(1, count, generators).to(indices.device)) % count


def _near(gallery: Gallery, indices: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Uniform over the nearest 1 % (⌊N/100⌋, at least one) of the image's own list.

    For CA− the partner is a query, and the candidate should be in the top 1 % of *its* list. The public code draws from
    the candidate's list, as an approximation; so does this.
    """
    count = max(1, int(_TOP_SHARE * len(gallery.clean)))
    nearest = gallery.nearest(indices).topk(count, dim=1).indices
    return nearest.gather(1, _drawn(0, count, generators).to(indices.device)[:, None]).squeeze(1)


def _top_1(gallery: Gallery, indices: torch.Tensor, _: Sequence[torch.Generator]) -> torch.Tensor:
    return gallery.nearest(indices).argmax(dim=1)


def _nearest_of_another_class(gallery: Gallery, indices: torch.Tensor, _: Sequence[torch.Generator]) -> torch.Tensor:
    """The nearest sample that is not of the class of the image's top-1 sample."""
    return _unlike_top_1(gallery, indices)[0]


def _misplaced(gallery: Gallery, indices: torch.Tensor, _: Sequence[torch.Generator]) -> torch.Tensor:
    """The same as published: the sample's place among those of other classes, taken for its place in the gallery.

    What results is an arbitrary sample; it may be of the image's class, or the image itself.
    """
    target, unlike = _unlike_top_1(gallery, indices)
    return unlike.cumsum(dim=1).gather(1, target[:, None]).squeeze(1) - 1


def _unlike_top_1(gallery: Gallery, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] the nearest sample unlike the top-1, and [B, N] bool, which are unlike it."""
    similarities = gallery.nearest(indices)
    unlike = gallery.labels != gallery.labels[similarities.argmax(dim=1)][:, None]
    return similarities.masked_fill(~unlike, float("-inf")).argmax(dim=1), unlike


def _drawn(low: int, high: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    return torch.cat([torch.randint(low, high, (1,), generator=generator) for generator in generators])


# Objectives: to be maximised, so each is what the papers minimise with the sign turned. Sign +1: the attacker wants the
# candidate to rise in the list (CA+, QA+); −1: to fall.


def _candidate(sign: int) -> Callable[[Pairs], Objective]:
    """CA±: −mean_x [±(d(c̃, q) − d(x, q))]₊, c̃ the attacked image, q its partner (ECCV 2020)."""

    def of(pairs: Pairs) -> Objective:
        query, others = pairs.partner, pairs.gallery.distances(pairs.partner)
        return lambda embeddings: -_hinged(sign * (_lengths(embeddings - query)[:, None] - others))

    return of


def _query(sign: int) -> Callable[[Pairs], Objective]:
    """QA±: −mean_x [±(d(q̃, c) − d(q̃, x))]₊, q̃ the attacked image, c its partner (ECCV 2020)."""

    def of(pairs: Pairs) -> Objective:
        def objective(embeddings: torch.Tensor) -> torch.Tensor:
            distances = pairs.gallery.distances(embeddings)
            return -_hinged(sign * (distances.gather(1, pairs.partners[:, None]) - distances))

        return objective

    return of


def _cosine(pairs: Pairs) -> Objective:
    """TMA: cos(q̃, t)."""
    return lambda embeddings: (embeddings * pairs.partner).sum(dim=1)


def _nearness(pairs: Pairs) -> Objective:
    """GTM: −d(q̃, t)."""
    return lambda embeddings: -_lengths(embeddings - pairs.partner)


def _shift(pairs: Pairs) -> Objective:
    """ES: d(q̃, q), squared, which in L∞ gives the same steps."""
    return displacement(pairs.own)


def _learning_to_misrank(*, own_copy: bool) -> Callable[[Pairs], Objective]:
    """LTM: −[max over negatives d − min over positives d]₊; ``own_copy``: q's clean copy is among the positives."""

    def of(pairs: Pairs) -> Objective:
        negatives = pairs.gallery.labels != pairs.gallery.labels[pairs.indices][:, None]
        positives = ~negatives if own_copy else (~negatives).scatter(1, pairs.indices[:, None], False)

        def objective(embeddings: torch.Tensor) -> torch.Tensor:
            distances = pairs.gallery.distances(embeddings)
            farthest = distances.masked_fill(~negatives, float("-inf")).amax(dim=1)
            nearest = distances.masked_fill(~positives, float("inf")).amin(dim=1)
            return -(farthest - nearest).clamp_min(0)

        return objective

    return of


def _hinged(differences: torch.Tensor) -> torch.Tensor:
    return differences.clamp_min(0).mean(dim=1)


def _lengths(vectors: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return lengths


# Figures. A tie counts against the model.


def _ahead(pairs: Pairs, item: torch.Tensor, cosines: torch.Tensor, *, ties: bool) -> torch.Tensor:
    """[B] how many samples of a list are nearer than the ranked item; with ``ties`` those as near count, too.

    Args:
        pairs: The image's own clean copy and the partner are not counted.
        item: [B] the item's cosine.
        cosines: [B, N] those of all samples.
        ties: True where the attacker wants the item to fall.
    """
    cosines = cosines.scatter(1, torch.stack([pairs.indices, pairs.partners], dim=1), float("-inf"))
    return (cosines >= item[:, None] if ties else cosines > item[:, None]).sum(dim=1)


def _partner_ahead(pairs: Pairs, embeddings: torch.Tensor, *, ties: bool) -> torch.Tensor:
    cosines = pairs.gallery.similarities(embeddings)
    return _ahead(pairs, cosines.gather(1, pairs.partners[:, None]).squeeze(1), cosines, ties=ties)


def _partner_rank(sign: int) -> Measure:
    """QA±: percentile rank of the partner in the attacked query's list: 0 the first of N − 1, 100 the last."""
    return lambda pairs, embeddings: (
        100 * _partner_ahead(pairs, embeddings, ties=sign < 0) / (len(pairs.gallery.clean) - 2)
    )


def _candidate_rank(sign: int) -> Measure:
    """CA±: the same of the attacked candidate in its partner's list."""

    def measure(pairs: Pairs, embeddings: torch.Tensor) -> torch.Tensor:
        item = (embeddings.double() * pairs.partner.double()).sum(dim=1).float()
        cosines = pairs.gallery.similarities(pairs.partner)
        return 100 * _ahead(pairs, item, cosines, ties=sign < 0) / (len(pairs.gallery.clean) - 2)

    return measure


def _kept(pairs: Pairs, embeddings: torch.Tensor) -> torch.Tensor:
    """GTT: whether the partner is still among the first four, 100 or 0."""
    return 100.0 * (_partner_ahead(pairs, embeddings, ties=True) < _KEPT_AMONG)


def _cosine_reached(pairs: Pairs, embeddings: torch.Tensor) -> torch.Tensor:
    return _cosine(pairs)(embeddings)


def _distance_moved(pairs: Pairs, embeddings: torch.Tensor) -> torch.Tensor:
    return _lengths(embeddings - pairs.own)


def _retrieved(pairs: Pairs, embeddings: torch.Tensor) -> torch.Tensor:
    """R@1 of the attacked query in the clean gallery, its own copy left out: 100 or 0."""
    gallery = pairs.gallery
    hits = hits_at_k(
        embeddings, gallery.labels[pairs.indices], gallery.clean, gallery.labels, ks=[1], exclude_self=pairs.indices
    )
    return 100.0 * hits[:, 0]


ERS_ATTACKS: Mapping[str, ErsAttack] = {
    "ca_plus": ErsAttack(_any_other, _candidate(+1), {"ca_plus": _candidate_rank(+1)}),
    "ca_minus": ErsAttack(_near, _candidate(-1), {"ca_minus": _candidate_rank(-1)}),
    "qa_plus": ErsAttack(_any_other, _query(+1), {"qa_plus": _partner_rank(+1)}),
    "qa_minus": ErsAttack(_near, _query(-1), {"qa_minus": _partner_rank(-1)}),
    "tma": ErsAttack(_any_other, _cosine, {"tma": _cosine_reached}),
    # At the image itself the distance moved has no gradient. The public code's distance is to an embedding shifted by a
    # constant in every coordinate, so its first step climbs the sum of the coordinates. Here that is said outright: the
    # constant is 1e-6 and would drown in a network's rounding.
    "es": ErsAttack(
        _itself,
        _shift,
        {"es_d": _distance_moved, "es_r": _retrieved},
        first_step=lambda embeddings: embeddings.sum(dim=1),
    ),
    "ltm": ErsAttack(_itself, _learning_to_misrank(own_copy=False), {"ltm": _retrieved}),
    "ltm_compatible": ErsAttack(_itself, _learning_to_misrank(own_copy=True), {"ltm": _retrieved}),
    "gtm": ErsAttack(_nearest_of_another_class, _nearness, {"gtm": _retrieved}),
    "gtm_compatible": ErsAttack(_misplaced, _nearness, {"gtm": _retrieved}),
    "gtt": ErsAttack(_top_1, _query(-1), {"gtt": _kept}),
}
"""The runs by name: the corrected reading's, and two that differ as published (``…_compatible``)."""
