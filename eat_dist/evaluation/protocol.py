"""The protocol ``quick``: PGD with three objectives, on the fused ensemble and on each member alone.

What it writes into its folder:

    parts/ensemble-clean.json, parts/member_0-pgd20-displacement.json, …   one finished measurement each
    results.json                                                          what :func:`evaluate` returns
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from eat_dist.attacks import Ball
from eat_dist.attacks.ball import Norm
from eat_dist.config import EvaluationConfig
from eat_dist.data.images import ImageSet
from eat_dist.evaluation.attacks import attack_batches
from eat_dist.evaluation.embed import embed_batch, embed_images
from eat_dist.evaluation.figures import Retrieval, clustering_figures, share
from eat_dist.evaluation.parts import resumed
from eat_dist.evaluation.references import References
from eat_dist.models.ensemble import EmbeddingEnsemble, weights_digest
from eat_dist.storage import Folder

# Raise it when a figure changes its meaning: parts of an older schema are measured again.
SCHEMA = 2

Progress = Callable[[str, int, int], None]
"""Called as ``on_progress(part, done, total)``: images attacked so far and in all, over all parts."""


def evaluate(
    ensemble: EmbeddingEnsemble,
    test: ImageSet,
    *,
    config: EvaluationConfig,
    norm: Norm,
    epsilon: float,
    seed: int,
    folder: Folder,
    device: torch.device | str,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the ensemble and each of its members, clean and attacked white-box on its own embedding.

    docs/evaluation.md defines the figures; they are in [0, 1] unless it says otherwise. Every image is attacked. Which
    queries search which gallery follows from the test set (:class:`eat_dist.evaluation.figures.Retrieval`), and the
    R@K are named accordingly.

    One seed gives one result on one machine, whether interrupted or not; finished parts are taken as they are
    if all that they depend on is the same (:func:`eat_dist.evaluation.parts.resumed`). With ε = 0 the
    attacked figures are the clean ones. Models compute in float32. The set is decoded once for the clean
    embeddings of all models, and once for each attack on each.

    Args:
        ensemble: Not changed; a copy is moved to ``device``.
        test: Classes unseen in training, two or more, each with two images or more, and each query's with one in the
            gallery.
        config: Steps, batch size and k-means seeds. Its ``protocol`` must be ``quick``; its ``epsilon`` is
            not read.
        norm: Of the attack's ball.
        epsilon: Its radius in pixel units. The step is 2.5·ε/steps (Madry et al. 2017).
        seed: Of the attacks' starts, the wrong classes and k-means.
        folder: Where parts and results go.
        device: Where to compute.
        on_progress: Called after each attacked batch and after each part, also of one that was there already.

    Returns:
        What ``results.json`` holds: ``{"schema", "protocol", "norm", "epsilon", "num_steps", "seed", "images",
        "classes", "retrieval", "queries", "gallery", "ensemble": {"clean": {…}, "attacked": {"pgd20/displacement":
        {…}, …}, "worst": {…}}, "members": [the same for each]}``. With one member the ensemble is that member,
        measured once; without ``config.members`` the list is empty.

    Raises:
        StorageError: The folder cannot be written.
        ValueError: A model's embeddings are not finite, or a query has no other image of its class to find.
    """
    assert config.protocol == "quick", config.protocol
    # Channels-last convolutions take a quarter off an attack's time on a CPU.
    copied = copy.deepcopy(ensemble).to(torch.device(device), torch.float32).to(memory_format=torch.channels_last)
    models: dict[str, nn.Module] = {"ensemble": copied}
    if config.members and len(copied.members) > 1:
        models |= {f"member_{rank}": member for rank, member in enumerate(copied.members)}
    total = len(models) * len(config.objectives) * len(test)
    done = 0

    def progress(part: str, images: int) -> None:
        nonlocal done
        done += images
        if on_progress is not None:
            on_progress(part, done, total)

    settings = _Settings(models, test, Retrieval.of(test), config, Ball(norm, epsilon), seed, folder, device, progress)
    measured = {name: _measure(_Target(name, model, settings)) for name, model in models.items()}
    results = {
        "schema": SCHEMA,
        "protocol": config.protocol,
        "norm": norm,
        "epsilon": epsilon,
        "num_steps": config.num_steps,
        "seed": seed,
        "images": len(test),
        "classes": test.num_classes,
        "retrieval": settings.retrieval.kind,
        "queries": len(settings.retrieval.queries),
        "gallery": len(settings.retrieval.gallery),
        "ensemble": measured["ensemble"],
        "members": [measured[f"member_{rank}"] for rank in range(len(models) - 1)]
        or [measured["ensemble"]] * (len(copied.members) == 1),
    }
    folder.write_json("results.json", results)
    return results


@dataclass(frozen=True)
class _Settings:
    """What all parts of an evaluation share; see :func:`evaluate`."""

    models: Mapping[str, nn.Module]
    test: ImageSet
    retrieval: Retrieval
    config: EvaluationConfig
    ball: Ball
    seed: int
    folder: Folder
    device: torch.device | str
    progress: Callable[[str, int], None]

    @property
    def step_size(self) -> float:
        """Pixel units."""
        return 2.5 * self.ball.epsilon / self.config.num_steps

    @cached_property
    def clean(self) -> dict[str, torch.Tensor]:
        """For each model its clean embeddings [N, D]; only computed if some part has to be measured."""
        found = embed_images(
            list(self.models.values()), self.test, batch_size=self.config.batch_size, device=self.device
        )
        return dict(zip(self.models, found, strict=True))

    @cached_property
    def clean_fingerprint(self) -> dict[str, Any]:
        """What a clean figure depends on, beside the model."""
        return {
            "schema": SCHEMA,
            "test_set": self.test.digest(),
            "images": len(self.test),
            "classes": self.test.num_classes,
            "seed": self.seed,
            "kmeans_seeds": self.config.kmeans_seeds,
        }

    @property
    def attack_fingerprint(self) -> dict[str, Any]:
        """What an attacked figure depends on, beside the model and the objective."""
        return self.clean_fingerprint | {
            "norm": self.ball.norm,
            "epsilon": self.ball.epsilon,
            "num_steps": self.config.num_steps,
            "step_size": self.step_size,
        }


@dataclass(frozen=True)
class _Target:
    """An attacked model."""

    name: str
    model: nn.Module
    settings: _Settings

    @property
    def clean(self) -> torch.Tensor:
        """[N, D] clean embeddings."""
        return self.settings.clean[self.name]

    @cached_property
    def references(self) -> References:
        """What the objectives compare with."""
        return References.of(self.clean, self.settings.test, seed=self.settings.seed)

    @cached_property
    def digest(self) -> str:
        """Of parameters and all buffers: the input normalisation is a buffer that no state dict has."""
        return weights_digest([dict(self.model.named_parameters()) | dict(self.model.named_buffers())])

    def part(self, key: str, fingerprint: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part ``key`` of this target, found or measured."""
        file = f"parts/{self.name}-{key.replace('/', '-')}.json"
        own = {"part": f"{self.name} {key}", "weights": self.digest, **fingerprint}
        return resumed(self.settings.folder, file, fingerprint=own, measure=measure)


def _measure(target: _Target) -> dict[str, Any]:
    """The entry of one target in the results."""
    settings = target.settings
    clean = target.part("clean", settings.clean_fingerprint, lambda: _figures_and_bits(target, target.clean))
    attacked = {
        f"pgd{settings.config.num_steps}/{objective}": _attacked_part(target, objective, clean["retrieved"])
        for objective in settings.config.objectives
    }
    return {
        "clean": clean["figures"],
        "attacked": {key: part["figures"] for key, part in attacked.items()},
        "worst": _worst(clean, list(attacked.values())),
    }


def _attacked_part(target: _Target, objective: str, retrieved_clean: str) -> dict[str, Any]:
    settings = target.settings
    key = f"pgd{settings.config.num_steps}/{objective}"
    attacked = 0

    def report(images: int) -> None:
        nonlocal attacked
        attacked += images
        settings.progress(f"{target.name} {key}", images)

    part = target.part(
        key,
        settings.attack_fingerprint,
        lambda: _measure_attack(target, objective, retrieved_clean=retrieved_clean, report=report),
    )
    report(len(settings.test) - attacked)
    return part


def _measure_attack(
    target: _Target, objective: str, *, retrieved_clean: str, report: Callable[[int], None]
) -> dict[str, Any]:
    settings = target.settings
    order = float("inf") if settings.ball.norm == "linf" else 2
    embeddings, largest = [], 0.0
    for batch in attack_batches(
        target.model,
        settings.test,
        objective=objective,
        references=target.references,
        ball=settings.ball,
        num_steps=settings.config.num_steps,
        step_size=settings.step_size,
        batch_size=settings.config.batch_size,
        seed=settings.seed,
        device=settings.device,
    ):
        embeddings.append(embed_batch(target.model, batch.adversarial))
        offsets = (batch.adversarial - batch.clean).flatten(1)
        largest = max(largest, float(torch.linalg.vector_norm(offsets, ord=order, dim=1).max()))
        report(len(batch.indices))
    attacked = torch.cat(embeddings)

    part = _figures_and_bits(target, attacked)
    pairs = zip(retrieved_clean, part["retrieved"], strict=True)
    kept = [after == "1" for before, after in pairs if before == "1"]
    part["figures"] |= {
        "r_at_1_all_attacked": share(settings.retrieval.hits(attacked, attacked, ks=[1])),
        "success_rate": 1 - sum(kept) / len(kept) if kept else None,
        "mean_displacement": float((attacked - target.clean).norm(dim=1).mean()),
        "largest_perturbation": largest,
    }
    return part


def _figures_and_bits(target: _Target, embeddings: torch.Tensor) -> dict[str, Any]:
    """A part: the figures of [N, D] embeddings, and the queries that R@1 counts as Q bits "0110…"."""
    settings = target.settings
    figures, hits = settings.retrieval.figures(embeddings, target.clean)
    figures |= clustering_figures(
        embeddings,
        labels=settings.test.labels,
        num_classes=settings.test.num_classes,
        runs=settings.config.kmeans_seeds,
        seed=settings.seed,
    )
    return {"figures": figures, "retrieved": "".join("1" if hit else "0" for hit in hits.tolist())}


def _worst(clean: Mapping[str, Any], attacked: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    survival = zip(clean["retrieved"], *(part["retrieved"] for part in attacked), strict=True)
    survived = [all(bit == "1" for bit in bits) for bits in survival]
    return {"r_at_1": sum(survived) / len(survived)} | {
        name: min(part["figures"][name] for part in attacked) for name in ("nmi", "ami", "f1")
    }
