"""The figures of one set of embeddings, by the names that results use."""

from __future__ import annotations

import statistics

import torch

from eat_dist.metrics import ami, hits_at_k, kmeans_labels, map_at_r, nmi, pairwise_f1
from eat_dist.seeding import derive_seed

RECALL_KS = (1, 2, 4, 8)

Figures = dict[str, float | None]


def retrieval_figures(
    query: torch.Tensor, gallery: torch.Tensor, *, labels: torch.Tensor
) -> tuple[Figures, torch.Tensor]:
    """Queries against a gallery of the same N images, each query's own image left out.

    Args:
        query: [N, D], clean or attacked.
        gallery: [N, D].
        labels: [N] int64, of both.

    Returns:
        ``r_at_1``, ``r_at_2``, ``r_at_4``, ``r_at_8`` and ``map_at_r``; and [N] bool, the queries that R@1
        counts.
    """
    own = torch.arange(len(labels))
    hits = hits_at_k(query, labels, gallery, labels, ks=RECALL_KS, exclude_self=own)
    figures: Figures = {f"r_at_{k}": share(column) for k, column in zip(RECALL_KS, hits.T, strict=True)}
    figures["map_at_r"] = map_at_r(query, labels, gallery, labels, exclude_self=own)
    return figures, hits[:, 0]


def clustering_figures(
    embeddings: torch.Tensor, *, labels: torch.Tensor, num_classes: int, runs: int, seed: int
) -> Figures:
    """k-means with K = number of classes, ``runs`` times.

    Returns:
        ``nmi``, ``ami`` and ``f1``, means over the runs, and ``nmi_std``, ``ami_std`` and ``f1_std``, their
        standard deviations (n − 1; 0 for one run).
    """
    clusterings = [
        kmeans_labels(embeddings, num_classes, seed=derive_seed(seed, "evaluation", "kmeans", run))
        for run in range(runs)
    ]
    figures: Figures = {}
    for name, figure in (("nmi", nmi), ("ami", ami), ("f1", pairwise_f1)):
        values = [figure(labels, clusters) for clusters in clusterings]
        figures[name] = statistics.fmean(values)
        figures[f"{name}_std"] = statistics.stdev(values) if runs > 1 else 0.0
    return figures


def share(hits: torch.Tensor) -> float:
    """The share of true entries, of a count that floats hold exactly."""
    return int(hits.sum()) / len(hits)
