"""Clustering: k-means, and how well its clusters fit the classes (NMI, AMI, pairwise F1).

Legend: N samples, D embedding dimension, K clusters.
"""

from __future__ import annotations

import math

import faiss
import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from eat_dist.metrics.finite import check_finite
from eat_dist.seeding import generator

Labels = npt.ArrayLike | torch.Tensor

_MOST_ITERATIONS = 300


def kmeans_labels(embeddings: torch.Tensor, num_clusters: int, *, seed: int, n_init: int = 10) -> npt.NDArray[np.int64]:
    """Cluster by k-means, the best of ``n_init`` starts by the sum of squared distances.

    A start is greedy k-means++ (Arthur & Vassilvitskii 2007, section 2.2 and, greedy, their conclusion: of 2 + ⌊ln K⌋
    candidates the one that leaves the least sum of squared distances); then Lloyd's iteration by faiss until the sum
    no longer falls, at most 300 times. Both are those of scikit-learn, whose NMI and sum it reaches (docs/metrics.md
    has the comparison; faiss' own starts are worse). float32, on the CPU and one thread, so the result does not depend
    on the number of cores.

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
    points = np.ascontiguousarray(embeddings.detach().cpu().numpy(), dtype=np.float32)
    if num_clusters > len(points):
        raise ValueError(f"k-means needs at least one sample a cluster; got {len(points)} and {num_clusters} clusters")
    with threadpool_limits(limits=1):
        starts = (_greedy_start(points, num_clusters, generator(seed, "k-means", start)) for start in range(n_init))
        _, clusters = min((_lloyd(points, points[chosen]) for chosen in starts), key=lambda found: found[0])
    return clusters


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


def _greedy_start(points: npt.NDArray[np.float32], num_clusters: int, drawn: torch.Generator) -> npt.NDArray[np.int64]:
    """[K] the samples that greedy k-means++ chooses as centres."""
    candidates = 2 + int(math.log(num_clusters))
    draws = torch.rand(num_clusters, candidates, generator=drawn, dtype=torch.float64).numpy()
    lengths = np.einsum("nd,nd->n", points, points)
    chosen = np.empty(num_clusters, dtype=np.int64)
    chosen[0] = int(draws[0, 0] * len(points))
    nearest = np.maximum(lengths + lengths[chosen[0]] - 2 * (points @ points[chosen[0]]), 0)
    for step in range(1, num_clusters):
        # A sample is drawn with a probability in proportion to its squared distance from the nearest centre.
        mass = np.cumsum(nearest, dtype=np.float64)
        tried = np.searchsorted(mass, draws[step] * mass[-1], side="right").clip(max=len(points) - 1)
        distances = points[tried] @ points.T
        distances *= -2
        distances += lengths
        distances += lengths[tried, None]
        np.clip(distances, 0, nearest, out=distances)
        best = int(distances.sum(axis=1).argmin())
        chosen[step], nearest = tried[best], distances[best].copy()
    return chosen


def _lloyd(points: npt.NDArray[np.float32], centres: npt.NDArray[np.float32]) -> tuple[float, npt.NDArray[np.int64]]:
    """Lloyd's iteration from [K, D] centres: the sum of squared distances and [N] the samples' clusters."""
    settings = faiss.ClusteringParameters()
    settings.niter = _MOST_ITERATIONS
    # All samples take part, and few of a cluster are no reason to warn.
    settings.min_points_per_centroid, settings.max_points_per_centroid = 1, len(points)
    clustering = faiss.Clustering(points.shape[1], len(centres), settings)
    faiss.copy_array_to_vector(centres.ravel(), clustering.centroids)
    index = faiss.IndexFlatL2(points.shape[1])
    clustering.train(points, index)
    distances, clusters = index.search(points, 1)
    return float(distances.sum(dtype=np.float64)), clusters[:, 0]


def _array(labels: Labels) -> npt.NDArray[np.int64]:
    return np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels, dtype=np.int64)


def _pairs(counts: npt.NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())
