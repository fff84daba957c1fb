"""k-means: greedy k-means++ starts and Lloyd's iteration, by matrix products on the embeddings' device.

Legend: N samples, D embedding dimension, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from eat_dist.metrics.finite import check_finite
from eat_dist.seeding import generator

_MOST_ITERATIONS = 300
# Samples compared with all centres at a time: 1,024 × 11,000 float32 products are 46 MB.
_BLOCK_SIZE = 1024


def kmeans_labels(embeddings: torch.Tensor, num_clusters: int, *, seed: int, n_init: int = 10) -> npt.NDArray[np.int64]:
    """Cluster by k-means, the best of ``n_init`` starts by the sum of squared distances.

    A start is greedy k-means++ (Arthur & Vassilvitskii 2007, section 2.2 and, greedy, their conclusion: of 2 + ⌊ln K⌋
    candidates the one that leaves the least sum). Lloyd's iteration follows until the sum no longer falls, at most 300
    times; a cluster that lost all its samples restarts at the sample farthest from its centre. That is what
    scikit-learn does, and it reaches the same sum and NMI; starts that are not greedy are worse (docs/metrics.md).

    float32, on the embeddings' device. On a CPU it runs on one thread, so the result does not depend on their number.

    Args:
        embeddings: [N, D].
        num_clusters: K ≤ N.
        seed: Any integer ≥ 0.
        n_init: Starts.

    Returns:
        [N] int64 in 0 … K − 1. Fewer than K of them occur where fewer than K samples differ.

    Raises:
        ValueError: An embedding is not finite, or K > N.
    """
    check_finite(embeddings, "embedding")
    if num_clusters > len(embeddings):
        raise ValueError(
            f"k-means needs at least one sample a cluster; got {len(embeddings)} and {num_clusters} clusters"
        )
    with torch.no_grad(), _one_thread():
        points = embeddings.detach().float()
        # Nearer to 0 the squared distances keep more digits.
        points = points - points.mean(dim=0)
        starts = (_greedy_start(points, num_clusters, generator(seed, "k-means", start)) for start in range(n_init))
        _, clusters = min((_lloyd(points, points[chosen]) for chosen in starts), key=lambda found: found[0])
    found: npt.NDArray[np.int64] = clusters.cpu().numpy()
    return found


def _greedy_start(points: torch.Tensor, num_clusters: int, drawn: torch.Generator) -> torch.Tensor:
    """[K] the samples that greedy k-means++ chooses as centres; the draws are the CPU's on every device."""
    candidates = 2 + int(math.log(num_clusters))
    draws = torch.rand(num_clusters, candidates, generator=drawn, dtype=torch.float64).to(points.device)
    columns, lengths = points.T.contiguous(), points.square().sum(dim=1)
    chosen = torch.empty(num_clusters, dtype=torch.int64, device=points.device)
    nearest = torch.ones_like(lengths)
    for step in range(num_clusters):
        # A sample is drawn with a probability in proportion to its squared distance from the nearest centre.
        mass = nearest.double().cumsum(dim=0)
        tried = torch.searchsorted(mass, draws[step] * mass[-1], right=True).clamp_max(len(points) - 1)
        if step == 0:
            tried, nearest = tried[:1], torch.full_like(lengths, math.inf)
        distances = torch.addmm(lengths, points[tried], columns, alpha=-2).add_(lengths[tried, None])
        distances = torch.minimum(distances.clamp_(min=0), nearest)
        best = distances.sum(dim=1).argmin(dim=0, keepdim=True)
        chosen[step : step + 1] = tried[best]
        nearest = distances[best].squeeze(0)
    return chosen


def _lloyd(points: torch.Tensor, centres: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Lloyd's iteration from [K, D] centres: the sum of squared distances and [N] the samples' clusters."""
    lengths, least = points.square().sum(dim=1), math.inf
    for _ in range(_MOST_ITERATIONS):
        clusters, distances = _nearest(points, lengths, centres)
        total = float(distances.sum(dtype=torch.float64))
        if total >= least:
            break
        least = total
        centres = _means(points, clusters, distances, num_clusters=len(centres))
    return total, clusters


def _nearest(points: torch.Tensor, lengths: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] the nearest centre of each sample and [N] the squared distance from it."""
    halves = -centres.square().sum(dim=1) / 2
    firsts = range(0, len(points), _BLOCK_SIZE)
    blocks = [torch.addmm(halves, points[first : first + _BLOCK_SIZE], centres.T).max(dim=1) for first in firsts]
    closeness = torch.cat([block.values for block in blocks])
    return torch.cat([block.indices for block in blocks]), (lengths - 2 * closeness).clamp_min(0)


def _means(points: torch.Tensor, clusters: torch.Tensor, distances: torch.Tensor, *, num_clusters: int) -> torch.Tensor:
    """[K, D] the means of the clusters; an empty one gets the sample farthest from its centre, two the two farthest."""
    counts = clusters.bincount(minlength=num_clusters)
    # Side by side the samples of a cluster are added in one order; added where they lie, on a GPU, in any.
    sums = torch.segment_reduce(points[clusters.argsort(stable=True)], "sum", lengths=counts, initial=0)
    centres = sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero().squeeze(1)
    centres[empty] = points[distances.topk(len(empty)).indices]
    return centres


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
