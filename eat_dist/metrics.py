"""Retrieval and clustering figures: R@K, mAP@R, NMI, AMI, pairwise F1 and the k-means before the last three.

Legend: Q queries, G gallery samples, D embedding dimension, N samples, K clusters.

Retrieval ranks by cosine similarity and **a tie counts against the query**: among gallery samples of equal
similarity those of another class come first. That is deterministic, does not depend on the gallery's order,
and gives a collapsed model (all embeddings equal) a recall of 0 instead of luck. Similarities are computed in
float64 and compared in float32, so two samples with equal embeddings do tie, wherever a matrix product
happens to round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch.nn import functional

Labels = npt.ArrayLike | torch.Tensor

# Queries compared with the whole gallery at a time: 256 × 60,000 float64 similarities are 120 MB.
_BLOCK_SIZE = 256


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
    """Which queries have a sample of their class among their K nearest in the gallery.

    Args:
        query: [Q, D] embeddings of any length; compared by cosine.
        query_labels: [Q] int64.
        gallery: [G, D], on the same device.
        gallery_labels: [G] int64.
        ks: The values of K, each ≥ 1.
        exclude_self: [Q] int64, the position in the gallery that each query may not retrieve (its own image, when
            the queries are a part of the gallery: leave-one-out); None where query and gallery are apart.
        block_size: Queries at a time; memory is O((block_size + D) · G). No effect on the result.

    Returns:
        [Q, len(ks)] bool on the CPU.

    Raises:
        ValueError: An embedding is not finite, a K is below 1, or a query's class has no (other) gallery
            sample.
    """
    if min(ks) < 1:
        raise ValueError(f"every K must be at least 1; got {list(ks)}")
    # Made at once: small results between the large blocks would keep the heap from being used again.
    hits = torch.empty(len(query), len(ks), dtype=torch.bool)
    for block in _similarities(
        query, query_labels, gallery, gallery_labels, exclude_self=exclude_self, block_size=block_size
    ):
        nearest = block.positives.amax(dim=1, keepdim=True)
        rivals = (block.negatives >= nearest).sum(dim=1)
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

    Arguments and errors as :func:`hits_at_k`.

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
    and errors as :func:`hits_at_k`.
    """
    average_precisions = torch.empty(len(query), dtype=torch.float64)
    for block in _similarities(
        query, query_labels, gallery, gallery_labels, exclude_self=exclude_self, block_size=block_size
    ):
        most = int(block.num_positives.max())
        positives = block.positives.topk(most, dim=1).values
        # A positive counts only within the first R places, so more than R rivals need not be told apart.
        rivals = block.negatives.topk(most, dim=1).values
        ahead = most - torch.searchsorted(rivals.flip(1).contiguous(), positives)
        place = torch.arange(1, most + 1, device=positives.device, dtype=torch.float64)
        rank = place + ahead
        counts = rank <= block.num_positives[:, None]
        precision = torch.where(counts, place / rank, 0.0)
        average_precisions[block.queries] = (precision.sum(dim=1) / block.num_positives).cpu()
    return float(average_precisions.mean())


def kmeans_labels(embeddings: torch.Tensor, num_clusters: int, *, seed: int, n_init: int = 10) -> npt.NDArray[np.int64]:
    """Cluster by k-means (Lloyd, k-means++ starts), the best of ``n_init`` starts by inertia.

    It runs on one thread: scikit-learn adds the threads' partial sums in the order in which they finish, so
    the result would depend on the number of threads, and from three on on chance.

    Args:
        embeddings: [N, D].
        num_clusters: K ≤ N.
        seed: Any integer ≥ 0; its lowest 32 bits count.
        n_init: Starts.

    Returns:
        [N] int64 in 0 … K − 1.

    Raises:
        ValueError: An embedding is not finite, or K > N.
    """
    _check_finite(embeddings, "embedding")
    points = embeddings.detach().cpu().numpy()
    if num_clusters > len(points):
        raise ValueError(f"k-means needs at least one sample a cluster; got {len(points)} and {num_clusters} clusters")
    with threadpool_limits(limits=1):
        clusters = KMeans(num_clusters, n_init=n_init, random_state=seed % 2**32).fit_predict(points)
    return np.asarray(clusters, dtype=np.int64)


def nmi(labels: Labels, clusters: Labels) -> float:
    """Normalised mutual information, 2·I(Y; C) / (H(Y) + H(C)) in [0, 1] (Manning et al. 2008, section 16.3).

    Args:
        labels: [N] true classes.
        clusters: [N] found clusters; their numbers do not matter.
    """
    return float(normalized_mutual_info_score(_array(labels), _array(clusters), average_method="arithmetic"))


def ami(labels: Labels, clusters: Labels) -> float:
    """Adjusted mutual information (Vinh, Epps & Bailey 2010): (I − E[I]) / ((H(Y) + H(C))/2 − E[I]).

    Unlike NMI it is 0 in the mean for a random clustering, whatever the number of clusters. It may be < 0.
    """
    return float(adjusted_mutual_info_score(_array(labels), _array(clusters), average_method="arithmetic"))


def pairwise_f1(labels: Labels, clusters: Labels) -> float:
    """F1 of the decisions "same cluster" over all pairs of samples (Manning et al. 2008, section 16.3).

    The clustering figure of deep metric learning beside NMI since Song et al. 2016. With n_yc samples of
    class y in cluster c and the binomial (n over 2): TP = Σ_yc (n_yc over 2), TP + FN = Σ_y (n_y over 2), TP
    + FP = Σ_c (n_c over 2), F1 = 2·TP / ((TP + FP) + (TP + FN)), counted in integers without looking at any
    pair. 1 where neither side has a pair, since they agree then.
    """
    true, found = _array(labels), _array(clusters)
    if true.shape != found.shape:
        raise ValueError(f"labels and clusters must be of one length; got {true.shape} and {found.shape}")
    _, joint = np.unique(np.stack([true, found]), axis=1, return_counts=True)
    both = _pairs(joint)
    either = _pairs(np.unique(true, return_counts=True)[1]) + _pairs(np.unique(found, return_counts=True)[1])
    return 2 * both / either if either else 1.0


@dataclass(frozen=True)
class _Block:
    """Similarities of some queries, [B, G] float32 each, −∞ where a gallery sample is on the other side or
    left out.

    Attributes:
        queries: Which queries.
        positives: To samples of the query's class.
        negatives: To samples of other classes.
        num_positives: [B] int64, at least 1.
    """

    queries: slice
    positives: torch.Tensor
    negatives: torch.Tensor
    num_positives: torch.Tensor


def _similarities(
    query: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    *,
    exclude_self: torch.Tensor | None,
    block_size: int,
) -> Iterator[_Block]:
    _check_finite(query, "query embedding")
    _check_finite(gallery, "gallery embedding")
    query_labels, gallery_labels = query_labels.to(query.device), gallery_labels.to(query.device)
    columns = functional.normalize(gallery.double(), dim=1).T
    for first in range(0, len(query), block_size):
        chosen = slice(first, first + block_size)
        rows = functional.normalize(query[chosen].double(), dim=1)
        similarities = (rows @ columns).float()
        same = query_labels[chosen, None] == gallery_labels
        if exclude_self is not None:
            own = exclude_self[chosen, None].to(query.device)
            similarities.scatter_(1, own, float("-inf"))
            same.scatter_(1, own, False)
        num_positives = same.sum(dim=1)
        if int(num_positives.min()) == 0:
            lonely = first + int(num_positives.argmin())
            raise ValueError(
                f"every query needs a sample of its class to retrieve; query {lonely} of class "
                f"{int(query_labels[lonely])} has none in the gallery (its own image does not count)"
            )
        yield _Block(
            queries=chosen,
            positives=similarities.masked_fill(~same, float("-inf")),
            negatives=similarities.masked_fill(same, float("-inf")),
            num_positives=num_positives,
        )


def _check_finite(embeddings: torch.Tensor, name: str) -> None:
    bad = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if bad:
        raise ValueError(f"every {name} must be finite; {bad} of {len(embeddings)} hold NaN or infinity")


def _array(labels: Labels) -> npt.NDArray[np.int64]:
    return np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels, dtype=np.int64)


def _pairs(counts: npt.NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())
