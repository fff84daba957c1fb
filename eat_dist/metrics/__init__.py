"""Figures of embeddings: retrieval (R@K, mAP@R) and clustering (k-means; NMI, AMI, pairwise F1)."""

from eat_dist.metrics.clustering import ami, nmi, pairwise_f1
from eat_dist.metrics.kmeans import kmeans_labels
from eat_dist.metrics.retrieval import Found, hits_at_k, map_at_r, recall_at_k, search

__all__ = [
    "Found",
    "ami",
    "hits_at_k",
    "kmeans_labels",
    "map_at_r",
    "nmi",
    "pairwise_f1",
    "recall_at_k",
    "search",
]
