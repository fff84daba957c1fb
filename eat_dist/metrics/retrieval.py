"""Retrieval by cosine: R@K and mAP@R, both in one pass over the similarities.

Legend: Q queries, G gallery samples, D embedding dimension, B queries of a block, R gallery samples of a query's class.

**A tie counts against the query**: among gallery samples of equal similarity those of another class come first. That
is deterministic, does not depend on the gallery's order, and gives a collapsed model (all embeddings equal) a recall
of 0 instead of luck. Similarities are computed in float64 and compared in float32, so two samples with equal
embeddings do tie, wherever a matrix product happens to round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from eat_dist.metrics.finite import check_finite

# Queries compared with the whole gallery at a time: 256 × 60,000 float64 similarities are 120 MB.
_BLOCK_SIZE = 256


@dataclass(frozen=True)
class Found:
    """What a search found for each query, on the CPU.

    Attributes:
        hits: [Q, len(ks)] bool, whether a sample of its class is among its K nearest.
        average_precision: [Q] float64 in [0, 1], its average precision at R (:func:`map_at_r`).
    """

    hits: torch.Tensor
    average_precision: torch.Tensor


def search(
    query: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    *,
    ks: Sequence[int],
    exclude_self: torch.Tensor | None,
    block_size: int = _BLOCK_SIZE,
) -> Found:
    """Rank the gallery for every query, in one pass over the similarities, on the queries' device.

    Args:
        query: [Q, D] embeddings of any length; compared by cosine.
        query_labels: [Q] int64.
        gallery: [G, D], on the same device.
        gallery_labels: [G] int64.
        ks: The values of K, each ≥ 1.
        exclude_self: [Q] int64, the position in the gallery that each query may not retrieve (its own image, when
            the queries are a part of the gallery: leave-one-out); None where query and gallery are apart.
        block_size: Queries at a time; memory is O((block_size + D) · G). No effect on the result.

    Raises:
        ValueError: An embedding is not finite, a K is below 1, or a query's class has no (other) gallery sample.
    """
    _check_ks(ks)
    # Made at once: small results between the large blocks would keep the heap from being used again.
    hits = torch.empty(len(query), len(ks), dtype=torch.bool)
    average_precision = torch.empty(len(query), dtype=torch.float64)
    for block in _blocks(
        query, query_labels, gallery, gallery_labels, exclude_self=exclude_self, block_size=block_size
    ):
        positives, most = block.positives, block.positives.shape[1]
        # A positive counts only within the first R places, a hit within the first K: rivals beyond are all alike.
        deepest = min(max(most, *ks), len(gallery))
        rivals = block.negatives.topk(deepest, dim=1).values
        ahead = deepest - torch.searchsorted(rivals.flip(1).contiguous(), positives)
        hits[block.queries] = torch.stack([ahead[:, 0] < k for k in ks], dim=1).cpu()
        place = torch.arange(1, most + 1, device=positives.device, dtype=torch.float64)
        rank = place + ahead
        precision = torch.where(rank <= block.num_positives[:, None], place / rank, 0.0)
        average_precision[block.queries] = (precision.sum(dim=1) / block.num_positives).cpu()
    return Found(hits, average_precision)


def hits_at_k(
    query: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    *,
    ks: Sequence[int],
    exclude_self: torch.Tensor | None,
    block_size: int = _BLOCK_SIZE,
) -> torch.Tensor:
    """Which queries have a sample of their class among their K nearest: :attr:`Found.hits` alone, for less time.

    Arguments and errors as :func:`search`.
    """
    _check_ks(ks)
    hits = torch.empty(len(query), len(ks), dtype=torch.bool)
    for block in _blocks(
        query, query_labels, gallery, gallery_labels, exclude_self=exclude_self, block_size=block_size
    ):
        rivals = (block.negatives >= block.positives[:, :1]).sum(dim=1)
        hits[block.queries] = torch.stack([rivals < k for k in ks], dim=1).cpu()
    return hits


def recall_at_k(
    query: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    *,
    ks: Sequence[int],
    exclude_self: torch.Tensor | None,
    block_size: int = _BLOCK_SIZE,
) -> dict[int, float]:
    """R@K, the share of queries with a sample of their class among their K nearest (Jégou et al. 2011).

    Arguments and errors as :func:`search`.

    Returns:
        K → share in [0, 1].
    """
    hits = hits_at_k(
        query,
        query_labels,
        gallery,
        gallery_labels,
        ks=ks,
        exclude_self=exclude_self,
        block_size=block_size,
    )
    return {k: int(column.sum()) / len(query) for k, column in zip(ks, hits.T, strict=True)}


def map_at_r(
    query: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    *,
    exclude_self: torch.Tensor | None,
    block_size: int = _BLOCK_SIZE,
) -> float:
    """Mean average precision at R (Musgrave, Belongie & Lim 2020, "A Metric Learning Reality Check").

    MAP@R = 1/R Σ_{i=1…R} P(i), where R is the number of (other) gallery samples of the query's class and P(i)
    the precision at i if the i-th neighbour is of that class, else 0; averaged over the queries. Arguments
    and errors as :func:`search`.
    """
    found = search(
        query,
        query_labels,
        gallery,
        gallery_labels,
        ks=(1,),
        exclude_self=exclude_self,
        block_size=block_size,
    )
    return float(found.average_precision.mean())


@dataclass(frozen=True)
class _Block:
    """Similarities of some queries, float32.

    Attributes:
        queries: Which queries.
        positives: [B, P] to the samples of the query's class, falling; −∞ after its R.
        negatives: [B, G] to samples of other classes; −∞ where a gallery sample is of the query's or left out.
        num_positives: [B] int64, each query's R, at least 1.
    """

    queries: slice
    positives: torch.Tensor
    negatives: torch.Tensor
    num_positives: torch.Tensor


def _blocks(
    query: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    *,
    exclude_self: torch.Tensor | None,
    block_size: int,
) -> Iterator[_Block]:
    check_finite(query, "query embedding")
    check_finite(gallery, "gallery embedding")
    device, hidden = query.device, float("-inf")
    query_labels = query_labels.to(device)
    # The samples of a class side by side, so that a query's positives are gathered and not looked for.
    sorted_labels, order = gallery_labels.to(device).sort(stable=True)
    columns = functional.normalize(gallery.double(), dim=1).T
    for begin in range(0, len(query), block_size):
        chosen = slice(begin, begin + block_size)
        own = None if exclude_self is None else exclude_self[chosen, None].to(device)
        first, last = (
            torch.searchsorted(sorted_labels, query_labels[chosen, None], right=right) for right in (False, True)
        )
        entry = first + torch.arange(int((last - first).max()), device=device)
        of_class = entry < last
        # Past its class an entry stands for the first of it once more.
        positions = order[torch.where(of_class, entry, first).clamp_max(len(gallery) - 1)]
        positive = of_class if own is None else of_class & (positions != own)
        num_positives = positive.sum(dim=1)
        if int(num_positives.min()) == 0:
            lonely = begin + int(num_positives.argmin())
            raise ValueError(
                f"every query needs a sample of its class to retrieve; query {lonely} of class "
                f"{int(query_labels[lonely])} has none in the gallery (its own image does not count)"
            )
        rows = functional.normalize(query[chosen].double(), dim=1)
        similarities = (rows @ columns).float()
        positives = similarities.gather(1, positions).masked_fill(~positive, hidden)
        negatives = similarities.scatter_(1, positions, hidden)
        if own is not None:
            negatives.scatter_(1, own, hidden)
        yield _Block(chosen, positives.sort(dim=1, descending=True).values, negatives, num_positives)


def _check_ks(ks: Sequence[int]) -> None:
    if min(ks) < 1:
        raise ValueError(f"every K must be at least 1; got {list(ks)}")
