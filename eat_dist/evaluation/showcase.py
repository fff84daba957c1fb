"""A few images and embeddings, clean and under the strongest attack: what the report shows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch.nn import functional

from eat_dist.errors import StorageError
from eat_dist.evaluation.crafting import Craft, Crafted
from eat_dist.evaluation.plan import ENSEMBLE, Part, Plan
from eat_dist.evaluation.victim import Victim, Workers
from eat_dist.seeding import generator
from eat_dist.storage import Folder

# Embeddings on the map, images in the strip, neighbours of each.
MAPPED, SHOWN, NEIGHBOURS = 300, 6, 3


def write_showcase(
    folder: Folder,
    victim: Victim,
    workers: Workers,
    plan: Plan,
    results: Mapping[str, Any],
    *,
    models: str,
    learn: Callable[[], Mapping[str, torch.Tensor]],
) -> None:
    """Attack a few images once more and keep them; nothing is done where they are kept already.

    ``showcase.safetensors`` holds ``clean_embeddings`` and ``attacked_embeddings`` [S, D], ``labels`` [S],
    ``clean_images`` and ``attacked_images`` [K, C, H, W], ``neighbours_before`` and ``neighbours_after``
    [K, 3, C, H, W] (clean gallery images), ``right_before`` and ``right_after`` [K, 3] uint8. ``showcase.json`` holds
    ``attack``, ``names`` of the K images and ``classes``, the names of the labels.

    Args:
        folder: Of the evaluation.
        victim: In this process.
        workers: Who attacks.
        plan: Of the evaluation.
        results: Of the evaluation; they say which attack was strongest.
        models: What tells the ensemble from others.
        learn: Gives the clean embeddings, to this process and the workers.
    """
    part = _strongest(plan, results)
    about = {"attack": part.key(ENSEMBLE), "epsilon": part.epsilon, "seed": victim.seed}
    about |= {"models": models, "test_set": victim.test.digest()}
    if _kept(folder) == about:
        return
    clean = learn()[ENSEMBLE]
    queries = victim.retrieval.queries
    order = torch.randperm(len(queries), generator=generator(victim.seed, "evaluation", "showcase"))
    chosen = queries[order[:MAPPED]]
    crafted: list[Crafted] = list(workers.map(Craft(part, with_images=True), _batches(chosen)))
    attacked = torch.cat([batch.embeddings[ENSEMBLE] for batch in crafted])
    images = torch.cat([batch.images for batch in crafted if batch.images is not None])
    before, after = (_neighbours(victim, embeddings, chosen, clean) for embeddings in (clean[chosen], attacked))
    labels = victim.test.labels
    right_before, right_after = (labels[found] == labels[chosen, None] for found in (before, after))
    # First those that the attack turns from right to wrong, then any.
    ranking = (right_before[:, 0].int() - right_after[:, 0].int()).argsort(descending=True, stable=True)
    shown = ranking[:SHOWN]
    tensors = {
        "clean_embeddings": clean[chosen],
        "attacked_embeddings": attacked,
        "labels": labels[chosen],
        "clean_images": _images(victim, chosen[shown]),
        "attacked_images": images[shown],
        "neighbours_before": torch.stack([_images(victim, row) for row in before[shown]]),
        "neighbours_after": torch.stack([_images(victim, row) for row in after[shown]]),
        "right_before": right_before[shown].to(torch.uint8),
        "right_after": right_after[shown].to(torch.uint8),
    }
    folder.write("showcase.safetensors", save_safetensors({k: v.contiguous() for k, v in tensors.items()}))
    names = [victim.test.names[index] for index in chosen[shown].tolist()]
    folder.write_json("showcase.json", about | {"names": names, "classes": list(victim.test.class_names)})


def _batches(indices: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(indices, 64))


def _strongest(plan: Plan, results: Mapping[str, Any]) -> Part:
    """The attack on the fused ensemble after which the fewest queries are retrieved, without its restarts."""
    attacked = results["ensemble"]["attacked"]
    parts = [part for part in plan.main if part.source == ENSEMBLE]
    strongest = min(parts, key=lambda part: float(attacked[part.key(ENSEMBLE)]["r_at_1"]))
    return replace(strongest, restarts=1)


def _kept(folder: Folder) -> dict[str, Any] | None:
    """What the showcase in the folder is of; None where there is none, or a damaged one."""
    try:
        kept = folder.read_json("showcase.json")
    except StorageError:
        return None
    return {name: value for name, value in kept.items() if name not in ("names", "classes")}


def _neighbours(victim: Victim, embeddings: torch.Tensor, chosen: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """[S, 3] the gallery images nearest to each embedding; never the image itself."""
    gallery = victim.retrieval.gallery
    similarities = functional.normalize(embeddings, dim=1) @ functional.normalize(clean[gallery], dim=1).T
    similarities[gallery[None, :] == chosen[:, None]] = float("-inf")
    return gallery[similarities.topk(min(NEIGHBOURS, len(gallery) - 1), dim=1).indices]


def _images(victim: Victim, indices: torch.Tensor) -> torch.Tensor:
    return victim.test.batch(indices, "cpu").images
