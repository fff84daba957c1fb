"""The figures of one set of embeddings, by the names that results use."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from eat_dist.data.images import ImageSet
from eat_dist.metrics import ami, hits_at_k, kmeans_labels, nmi, pairwise_f1, search
from eat_dist.seeding import derive_seed

Figures = dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Which of a test set's N images are searched for among which.

    Attributes:
        kind: ``all_against_all``: each image is a query against all others (CUB, Cars, SOP: Song et al. 2016).
            ``query_gallery``: queries against a gallery apart from them (In-Shop: Liu et al. 2016).
        ks: The K of R@K that are usual there.
        labels: [N] int64, the class of each image.
        queries: [Q] int64, positions of the queries in the test set, ascending.
        gallery: [G] int64, those of the gallery.
    """

    kind: Literal["all_against_all", "query_gallery"]
    ks: tuple[int, ...]
    labels: torch.Tensor
    queries: torch.Tensor
    gallery: torch.Tensor

    @classmethod
    def of(cls, images: ImageSet) -> Retrieval:
        """By the roles that a test set states."""
        if images.is_query is None:
            everything = torch.arange(len(images))
            return cls("all_against_all", (1, 2, 4, 8), images.labels, everything, everything)
        queries, gallery = (role.nonzero().squeeze(1) for role in (images.is_query, ~images.is_query))
        return cls("query_gallery", (1, 10, 20, 30), images.labels, queries, gallery)

    def figures(self, searching: torch.Tensor, searched: torch.Tensor) -> tuple[Figures, torch.Tensor]:
        """Search the gallery once, on the embeddings' device.

        Args:
            searching: [N, D] embeddings of all images; the queries' are used.
            searched: [N, D] embeddings of all images; the gallery's are used.

        Returns:
            ``r_at_K`` for each K of ``ks`` and ``map_at_r``; and [Q] bool, the queries that R@1 counts.
        """
        found = search(*self._sides(searching, searched), ks=self.ks, exclude_self=self._own)
        figures: Figures = {f"r_at_{k}": share(column) for k, column in zip(self.ks, found.hits.T, strict=True)}
        figures["map_at_r"] = float(found.average_precision.mean())
        return figures, found.hits[:, 0]

    def hits(self, searching: torch.Tensor, searched: torch.Tensor, *, ks: Sequence[int]) -> torch.Tensor:
        """[Q, len(ks)] bool: which queries find their class among the K nearest. Embeddings as :meth:`figures`."""
        return hits_at_k(*self._sides(searching, searched), ks=ks, exclude_self=self._own)

    def retrieved(self, attacked: torch.Tensor, indices: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Which of some attacked images still find their class first (R@1) among the clean gallery.

        The bits of :meth:`figures` for a part of the images, so an attack can leave alone those that it has won.

        Args:
            attacked: [B, D] embeddings of attacked images.
            indices: [B] int64, their positions in the test set.
            clean: [N, D] clean embeddings of all images, on the device of ``attacked``; the gallery's are used. An
                image's own clean copy is left out.

        Returns:
            [B] bool on the device of ``attacked``. True for an image that is no query: nothing is asked of it.
        """
        assert len(attacked) == len(indices), (attacked.shape, indices.shape)
        assert len(clean) == len(self.labels), (clean.shape, self.labels.shape)
        indices = indices.cpu()
        asked = torch.isin(indices, self.queries)
        positions = indices[asked]
        gallery = clean if self.kind == "all_against_all" else clean[self.gallery]
        hits = hits_at_k(
            attacked[asked.to(attacked.device)],
            self.labels[positions],
            gallery,
            self.labels[self.gallery],
            ks=[1],
            exclude_self=positions if self.kind == "all_against_all" else None,
        )
        found = torch.ones(len(indices), dtype=torch.bool)
        found[asked] = hits.squeeze(1)
        return found.to(attacked.device)

    @property
    def _own(self) -> torch.Tensor | None:
        """[Q] the place of each query in the gallery, if it is there."""
        return self.queries if self.kind == "all_against_all" else None

    def _sides(
        self, searching: torch.Tensor, searched: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        assert len(searching) == len(searched) == len(self.labels), (searching.shape, searched.shape, self.labels.shape)
        return searching[self.queries], self.labels[self.queries], searched[self.gallery], self.labels[self.gallery]


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
