"""The figures of one attack: from attacked embeddings to what a part's file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from eat_dist.data.images import ImageSet
from eat_dist.evaluation.crafting import Crafted
from eat_dist.evaluation.detector import detection
from eat_dist.evaluation.figures import Figures, Retrieval, clustering_figures, share
from eat_dist.evaluation.plan import ENSEMBLE, Part
from eat_dist.seeding import generator

# Stands in a part's bits for a query that was not attacked.
NOT_ATTACKED = "-"

# Of so many classes or fewer a perfect attack on every image leaves more of NMI than seeds differ by (20: 0.017).
FEW_CLASSES = 20


@dataclass(frozen=True)
class Measure:
    """Computes figures of embeddings of one test set.

    Attributes:
        test: N images.
        retrieval: Its queries and gallery.
        clean: Clean embeddings [N, D] by model, on the CPU.
        members: M.
        kmeans_seeds: k-means runs averaged.
        seed: Of the evaluation.
    """

    test: ImageSet
    retrieval: Retrieval
    clean: Mapping[str, torch.Tensor]
    members: int
    kmeans_seeds: int
    seed: int

    def clean_part(self, name: str) -> dict[str, Any]:
        """``figures`` and ``retrieved`` (Q bits "0110…", the queries that R@1 counts) of a model's clean embeddings."""
        return self._whole(self.clean[name], name)

    def attacked_part(
        self,
        part: Part,
        crafted: Sequence[Crafted],
        indices: torch.Tensor,
        *,
        retrieved_clean: Mapping[str, str],
        fractions: Sequence[float] = (),
        detected: bool = False,
    ) -> dict[str, Any]:
        """What the part's file holds.

        Args:
            part: Which attack.
            crafted: What it left, in batches.
            indices: [A] int64, the attacked images, in the order of ``crafted``.
            retrieved_clean: The bits of each target's clean part.
            fractions: Attacked shares below 1 at which the first target's set is clustered, too.
            detected: Whether to try the detector of attacked images; the part is on the ensemble and all images.

        Returns:
            ``targets`` (name → ``figures``, ``retrieved``), ``mean_value``, ``median_distance`` and, where measured,
            ``finite_slopes``, ``fractions`` and ``detection``; JSON-ready.
        """
        distances = torch.cat([batch.distances for batch in crafted])
        about: dict[str, Any] = {
            "images": len(indices),
            "mean_value": float(torch.cat([batch.values for batch in crafted]).double().mean()),
            "median_distance": float(distances.median()),
            "targets": {},
        }
        attacked = {name: torch.cat([batch.embeddings[name] for batch in crafted]) for name in part.targets}
        for name, embeddings in attacked.items():
            whole = len(indices) == len(self.test)
            found = self._whole(embeddings, name) if whole else self._sampled(embeddings, name, indices)
            if whole:
                hits = self.retrieval.hits(embeddings, embeddings, ks=[1])
                found["figures"]["r_at_1_all_attacked"] = share(hits)
                found["figures"] |= self._spared(embeddings, name)
            pairs = zip(retrieved_clean[name], found["retrieved"], strict=True)
            kept = [after == "1" for before, after in pairs if before == "1" and after != NOT_ATTACKED]
            found["figures"] |= {
                "success_rate": 1 - sum(kept) / len(kept) if kept else None,
                "mean_displacement": float((embeddings - self.clean[name][indices]).norm(dim=1).mean()),
                "largest_perturbation": float(distances.max()),
            }
            about["targets"][name] = found
        if part.slopes:
            slopes = torch.cat([batch.slopes for batch in crafted if batch.slopes is not None])
            about["finite_slopes"] = float((slopes > 0).double().mean())  # NaN is not above 0
        first = attacked[part.targets[0]]
        if fractions:
            about["fractions"] = [self._fraction(first, part.targets[0], share) for share in fractions]
        if detected:
            about["detection"] = self._detection(first)
        return about

    @cached_property
    def order(self) -> torch.Tensor:
        """[N] the images in a random order; its first round(f·N) are those attacked at fraction f."""
        return torch.randperm(len(self.test), generator=generator(self.seed, "evaluation", "fraction"))

    def _whole(self, embeddings: torch.Tensor, name: str) -> dict[str, Any]:
        figures, hits = self.retrieval.figures(embeddings, self.clean[name])
        return {"figures": figures | self._clustering(embeddings), "retrieved": _bits(hits)}

    def _sampled(self, embeddings: torch.Tensor, name: str, indices: torch.Tensor) -> dict[str, Any]:
        found = self.retrieval.retrieved(embeddings, indices, self.clean[name])
        places = {image: place for place, image in enumerate(self.retrieval.queries.tolist())}
        bits = [NOT_ATTACKED] * len(places)
        for image, hit in zip(indices.tolist(), found.tolist(), strict=True):
            if image in places:
                bits[places[image]] = "1" if hit else "0"
        asked = [bit for bit in bits if bit != NOT_ATTACKED]
        return {"figures": {"r_at_1": asked.count("1") / len(asked) if asked else None}, "retrieved": "".join(bits)}

    def _spared(self, attacked: torch.Tensor, name: str) -> Figures:
        """The clustering figures where one image in C, chosen at random, is left as it is; of few classes alone.

        Sent to a wrong class each, the images still say which class they are not of: NMI is then 1 − ln(C − 1) / ln C,
        all of it with two classes, 0.14 with five. With one in C spared a perfect attack leaves nothing.
        """
        classes = self.test.num_classes
        if classes > FEW_CLASSES:
            return {}
        mixed = self._mixed(attacked, name, 1 - 1 / classes)
        return {f"{figure}_spared": value for figure, value in self._clustering(mixed).items()}

    def _mixed(self, attacked: torch.Tensor, name: str, fraction: float) -> torch.Tensor:
        chosen = self.order[: round(fraction * len(self.order))]
        mixed = self.clean[name].clone()
        mixed[chosen] = attacked[chosen]
        return mixed

    def _fraction(self, attacked: torch.Tensor, name: str, fraction: float) -> dict[str, Any]:
        mixed = self._mixed(attacked, name, fraction)
        hits = self.retrieval.hits(mixed, mixed, ks=[1])
        return {"fraction": fraction, "r_at_1": share(hits), **self._clustering(mixed)}

    def _detection(self, attacked: torch.Tensor) -> dict[str, Any]:
        """The fused embeddings hold the members', divided by √M."""
        return detection(self._by_member(self.clean[ENSEMBLE]), self._by_member(attacked), fraction=0.5, seed=self.seed)

    def _by_member(self, fused: torch.Tensor) -> list[torch.Tensor]:
        return [part * math.sqrt(self.members) for part in fused.chunk(self.members, dim=1)]

    def _clustering(self, embeddings: torch.Tensor) -> Figures:
        return clustering_figures(
            embeddings,
            labels=self.test.labels,
            num_classes=self.test.num_classes,
            runs=self.kmeans_seeds,
            seed=self.seed,
        )


def _bits(hits: torch.Tensor) -> str:
    return "".join("1" if hit else "0" for hit in hits.tolist())
