"""The Empirical Robustness Score (ERS): ten figures of nine attacks on a ranking, and their mean.

Zhou et al., "Adversarial Attack and Defense in Deep Ranking" (arXiv 2106.03614); Zhou & Patel, "Enhancing Adversarial
Robustness for Deep Metric Learning" (CVPR 2022), whose tables it is for. docs/ers.md defines the figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from eat_dist.attacks import Ball, GradientAttack
from eat_dist.data.images import ImageSet
from eat_dist.evaluation.embed import embed_batch
from eat_dist.evaluation.ers_attacks import ERS_ATTACKS
from eat_dist.evaluation.ers_gallery import Gallery, Pairs
from eat_dist.metrics import hits_at_k
from eat_dist.seeding import generator

EPSILON, STEP_SIZE, NUM_STEPS = 8 / 255, 3 / 255, 32
FIGURES = ("ca_plus", "ca_minus", "qa_plus", "qa_minus", "tma", "es_d", "es_r", "ltm", "gtm", "gtt")
"""What the score is of, in the order of the published tables."""

_SHARED = ("ca_plus", "ca_minus", "qa_plus", "qa_minus", "tma", "es", "gtt")
READINGS: Mapping[str, tuple[str, ...]] = {
    "corrected": (*_SHARED, "ltm", "gtm"),
    "compatible": (*_SHARED, "ltm_compatible", "gtm_compatible"),
}
"""Which runs of ERS_ATTACKS a reading is made of: as meant, and as the public code has it."""

Measured = Mapping[str, Sequence[float]]
"""What one run found: figure → a number an image."""


def ers_score(figures: Mapping[str, float]) -> float:
    """The score of the ten figures, 0 … 100 for figures in their usual ranges; higher is more robust.

    Mean of 2·CA+, 100 − CA−, 2·QA+, 100 − QA−, 100·(1 − TMA), 50·(2 − ES:D), ES:R, LTM, GTM and GTT (arXiv 2106.03614).
    CA+ and QA+ count twice because a random pair has rank 50 without an attack.

    Args:
        figures: ``ca_plus``, ``ca_minus``, ``qa_plus``, ``qa_minus``, ``es_r``, ``ltm``, ``gtm`` and ``gtt`` in %,
            ``tma`` a cosine, ``es_d`` a distance in [0, 2]. Others are not looked at.
    """
    return statistics.fmean(
        (
            2 * figures["ca_plus"],
            100 - figures["ca_minus"],
            2 * figures["qa_plus"],
            100 - figures["qa_minus"],
            100 * (1 - figures["tma"]),
            50 * (2 - figures["es_d"]),
            figures["es_r"],
            figures["ltm"],
            figures["gtm"],
            figures["gtt"],
        )
    )


def ers(
    model: nn.Module,
    images: ImageSet,
    *,
    clean: torch.Tensor,
    epsilon: float = EPSILON,
    step_size: float = STEP_SIZE,
    num_steps: int = NUM_STEPS,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    sample: int | None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """All runs one after the other, in this process; :func:`run_attack` does one of them, or a part of it.

    Args:
        model: On ``device``; restored.
        images: The test set, N images; all of it is the gallery, whatever roles it states.
        clean: [N, D] the model's embeddings of ``images``.
        epsilon: L∞ radius, pixel units.
        step_size: Pixel units.
        num_steps: At least 1.
        batch_size: Images of one pass. A pass also holds a few [batch_size, N] float32 matrices.
        seed: Of the partners and of the sample.
        device: Where the model is.
        sample: How many of the images are attacked (:func:`ers_sample`); None: all.
        on_progress: Called after each batch as ``on_progress(run, done, total)``, images over all runs.

    Returns:
        As :func:`ers_results`.

    Raises:
        ValueError: An embedding is not finite.
    """
    indices = ers_sample(len(images), sample, seed=seed)
    done, total = 0, len(ERS_ATTACKS) * len(indices)

    def reporting(name: str) -> Callable[[int], None]:
        def report(attacked: int) -> None:
            nonlocal done
            done += attacked
            if on_progress is not None:
                on_progress(name, done, total)

        return report

    measured = {
        name: run_attack(
            name,
            model,
            images,
            clean=clean,
            indices=indices,
            epsilon=epsilon,
            step_size=step_size,
            num_steps=num_steps,
            batch_size=batch_size,
            seed=seed,
            device=device,
            on_progress=reporting(name),
        )
        for name in ERS_ATTACKS
    }
    return ers_results(measured, clean=clean, labels=images.labels, indices=indices)


def ers_sample(count: int, sample: int | None, *, seed: int) -> torch.Tensor:
    """[n] int64 ascending: ``sample`` of ``count`` positions drawn without repeats; all for None or a larger sample."""
    if sample is None or sample >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(seed, "ers", "sample"))[:sample].sort().values


def run_attack(
    name: str,
    model: nn.Module,
    images: ImageSet,
    *,
    clean: torch.Tensor,
    indices: torch.Tensor,
    epsilon: float = EPSILON,
    step_size: float = STEP_SIZE,
    num_steps: int = NUM_STEPS,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    draws: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """One run of ERS_ATTACKS on some of the images.

    What is found of an image depends on that image, on ``clean`` and on its own draws, seeded by (seed, "ers", name,
    position): so the images may be dealt to several workers, whose lists are put together in any one order.

    Args:
        name: In ERS_ATTACKS.
        model: As :func:`ers` has it, and all that follow but these:
        indices: [n] int64, the positions of the images to attack.
        draws: Passes averaged in a step, for models that draw random numbers (EOT).
        on_progress: Called after each batch with the number of its images.

    Returns:
        Figure → n numbers in the order of ``indices``, JSON-ready. Their mean is the figure in the units of the
        published tables; in a share each image counts 0 or 100.

    Raises:
        ValueError: An embedding is not finite.
    """
    run, gallery = ERS_ATTACKS[name], Gallery.of(clean, images.labels, device=device)
    attack = GradientAttack(Ball("linf", epsilon), num_steps=num_steps, step_size=step_size, random_start=False)
    measured: dict[str, list[float]] = {figure: [] for figure in run.measures}
    for chosen in torch.split(indices, batch_size):
        generators = [generator(seed, "ers", name, index) for index in chosen.tolist()]
        positions = chosen.to(device)
        pairs = Pairs(gallery, positions, run.partners(gallery, positions, generators))
        adversarial = run.craft(model, images.batch(chosen, device).images, pairs, attack=attack, draws=draws)
        embeddings = functional.normalize(embed_batch(model, adversarial).to(device), dim=1)
        if not bool(torch.isfinite(embeddings).all()):
            raise ValueError(f"the model's embeddings are not finite under the attack {name}")
        for figure, measure in run.measures.items():
            measured[figure] += measure(pairs, embeddings).tolist()
        if on_progress is not None:
            on_progress(len(chosen))
    return measured


def ers_results(
    measured: Mapping[str, Measured], *, clean: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor
) -> dict[str, Any]:
    """Put the runs together, with the clean R@1 beside them: a collapsed model moves little under an attack.

    Args:
        measured: For every run of ERS_ATTACKS what :func:`run_attack` gave, of the images at ``indices``.
        clean: [N, D] clean embeddings.
        labels: [N] int64.
        indices: [n] int64, the attacked images, n ≥ 1.

    Returns:
        ``{"images": n, "r_at_1": clean R@1 of these images against all others in %, "corrected": {"ers", "ca_plus",
        "ca_minus", "qa_plus", "qa_minus", "tma", "es_d", "es_r", "ltm", "gtm", "gtt"}, "compatible": the same}``,
        JSON-ready.
    """
    hits = hits_at_k(clean[indices], labels[indices], clean, labels, ks=[1], exclude_self=indices)
    results: dict[str, Any] = {"images": len(indices), "r_at_1": 100 * int(hits.sum()) / len(indices)}
    for reading, runs in READINGS.items():
        means = {
            figure: statistics.fmean(measured[run][figure]) for run in runs for figure in ERS_ATTACKS[run].measures
        }
        results[reading] = {"ers": ers_score(means), **{figure: means[figure] for figure in FIGURES}}
    return results
