"""Do the members' disagreements give attacked images away? The detector's figures, and an attacker who knows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sklearn.metrics import roc_auc_score, roc_curve

from eat_dist.attacks import Objective
from eat_dist.evaluation.references import OBJECTIVES, Aimed
from eat_dist.models.disagreement import disagreement
from eat_dist.seeding import generator

# Images compared with the whole set at a time: 128 × 60,000 float32 similarities are 31 MB, a few times a member.
_BLOCK_SIZE = 128


def detection(
    members_clean: Sequence[torch.Tensor],
    members_attacked: Sequence[torch.Tensor],
    *,
    fraction: float = 0.5,
    seed: int,
    block_size: int = _BLOCK_SIZE,
) -> dict[str, float]:
    """How well the disagreement tells attacked from clean images, where the detector has no clean template.

    It sees one set, in which a random part of the images is attacked and the others are clean, and measures each
    image's :func:`eat_dist.models.disagreement.disagreement` on the neighbourhoods inside that very set, the image
    itself left out. Which images are attacked depends on the seed and N alone.

    Args:
        members_clean: M tensors [N, D], each member's embeddings of the clean images; two members or more.
        members_attacked: M tensors [N, D], those of the attacked images, on the same device.
        fraction: The share of attacked images, in (0, 1); ⌊fraction · N + ½⌋ images, at least one on each side.
        seed: Of the evaluation.
        block_size: Images at a time; memory is O(M · block_size · N). No effect but by rounding.

    Returns:
        ``fraction``; ``auroc``, the share of pairs (attacked, clean) with the greater score at the attacked one, ties
        half; ``tpr_at_5_fpr``, the largest share of attacked images found by a threshold that accuses at most 5 % of
        the clean ones; ``mean_clean`` and ``mean_attacked``, the mean scores in [0, 1].

    Raises:
        ValueError: There is one member only, or one side of the mixed set is empty.
    """
    assert len(members_clean) == len(members_attacked), (len(members_clean), len(members_attacked))
    count = len(members_clean[0])
    attacked = choose_attacked(count, fraction=fraction, seed=seed)
    chosen = attacked.to(members_clean[0].device)[:, None]
    mixed = [torch.where(chosen, after, before) for before, after in zip(members_clean, members_attacked, strict=True)]
    scores = _scores(mixed, block_size=block_size)
    false_positives, true_positives, _ = roc_curve(attacked.numpy(), scores.numpy(), drop_intermediate=False)
    return {
        "fraction": fraction,
        "auroc": float(roc_auc_score(attacked.numpy(), scores.numpy())),
        "tpr_at_5_fpr": float(true_positives[false_positives <= 0.05].max()),
        "mean_clean": float(scores[~attacked].mean()),
        "mean_attacked": float(scores[attacked].mean()),
    }


def choose_attacked(count: int, *, fraction: float, seed: int) -> torch.Tensor:
    """[N] bool: the images of the mixed set that are attacked, ⌊fraction · N + ½⌋ of them.

    Raises:
        ValueError: None would be attacked, or all.
    """
    number = math.floor(fraction * count + 0.5)
    if not 0 < number < count:
        raise ValueError(
            f"a detector needs attacked and clean images; a fraction of {fraction:g} attacks {number} of {count}"
        )
    attacked = torch.zeros(count, dtype=torch.bool)
    attacked[torch.randperm(count, generator=generator(seed, "detection"))[:number]] = True
    return attacked


def aware(
    objective: Objective, *, references: Sequence[torch.Tensor], own: torch.Tensor | None = None, weight: float
) -> Objective:
    """The objective of an attacker who knows the detector: objective − weight · disagreement.

    Args:
        objective: Of the fused embedding [B, M·D] (:func:`eat_dist.models.ensemble.fuse`): M unit embeddings of D
            numbers side by side, which this function takes apart again.
        references: M tensors [N, D], the members' clean embeddings of what the attacker takes the mixed set to be.
        own: [B, N] bool, the attacked images' own clean copies, which the mixed set does not hold.
        weight: Of the disagreement, ≥ 0, in units of the objective. 0.03 evades at little cost (docs/metrics.md); with
            1 the attacker serves the detector alone and breaks little.
    """
    references = [embeddings.detach() for embeddings in references]

    def undetected_value(embeddings: torch.Tensor) -> torch.Tensor:
        members = embeddings.chunk(len(references), dim=1)
        return objective(embeddings) - weight * disagreement(members, references, own=own)

    return undetected_value


def undetected(batch: Aimed, *, members: int, base: str = "nearest_negative", weight: float) -> Objective:
    """:func:`aware` of an evaluation objective, with the clean test set as references, on the fused ensemble.

    Args:
        batch: The references are the fused ensemble's.
        members: M, which divides the length of an embedding.
        base: Name in OBJECTIVES.
        weight: See :func:`aware`.

    Raises:
        ConfigError: No objective has that name.
    """
    clean = batch.references.clean
    assert clean.shape[1] % members == 0, (clean.shape, members)
    own = torch.arange(len(clean), device=clean.device) == batch.indices[:, None]
    return aware(OBJECTIVES[base](batch), references=clean.chunk(members, dim=1), own=own, weight=weight)


def _scores(members: Sequence[torch.Tensor], *, block_size: int) -> torch.Tensor:
    """[N] on the CPU: each image's disagreement about the others of the set."""
    count, device = len(members[0]), members[0].device
    positions = torch.arange(count, device=device)
    scores = torch.empty(count)
    for first in range(0, count, block_size):
        chosen = slice(first, first + block_size)
        own = positions[chosen, None] == positions
        scores[chosen] = disagreement([embeddings[chosen] for embeddings in members], members, own=own).cpu()
    return scores
