"""Training classes held out to choose settings by, so that test classes never take part in a choice."""

from __future__ import annotations

import torch

from eat_dist.data.images import ImageSet
from eat_dist.errors import DataError
from eat_dist.seeding import generator

# What a split leaves on each side: retrieval among one class says nothing.
_FEWEST_CLASSES = 2


def held_out(train: ImageSet, share: float, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split whole classes off a training set.

    round(share·C) classes, at least two, leaving at least two; drawn among those with two images or more, for a class
    with one image has nothing to be retrieved. A function of the classes, ``share`` and ``seed`` alone, so that every
    process makes the same split.

    Args:
        train: C classes.
        share: In (0, 1).
        seed: ``data.validation_seed``.

    Returns:
        The set that is trained on, and the validation set: every image of it is a query against all others.

    Raises:
        DataError: There are too few classes.
    """
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    candidates = (counts >= 2).nonzero().squeeze(1)
    wanted = max(_FEWEST_CLASSES, min(round(share * train.num_classes), train.num_classes - _FEWEST_CLASSES))
    if train.num_classes < 2 * _FEWEST_CLASSES or len(candidates) < wanted:
        raise DataError(
            f"data.validation_share {share:g} holds out {wanted} of {train.num_classes} training classes "
            f"({len(candidates)} with two images or more); at least {_FEWEST_CLASSES} must be left on each side. "
            "Lower data.validation_share (0: none) or add classes."
        )
    order = torch.randperm(len(candidates), generator=generator(seed, "validation classes"))
    validation = sorted(candidates[order[:wanted]].tolist())
    rest = sorted(set(range(train.num_classes)) - set(validation))
    return train.of_classes(rest), train.of_classes(validation)
