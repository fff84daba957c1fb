"""Which part of the training set each member sees: the diversity that EAT gets from data.

That the set is split at random into N parts and each member trains on a combination of them is the paper's;
the rules are ours. All of them are functions of the labels, the config and the seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from eat_dist.config import SplitConfig
from eat_dist.errors import ConfigError, DataError
from eat_dist.seeding import generator

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Splits:
    """The training set's N_images images in parts, and what each of M members sees.

    Attributes:
        part_of: [N_images] int64, the part 0 … N − 1 of each image; all 0 under ``bootstrap``, which has one
            part.
        parts_of_member: For each member its parts, ascending.
        indices: For each member the images it sees, ascending; under ``bootstrap`` some more than once.
        labels: [N_images] int64, the class of each image.
    """

    part_of: Indices
    parts_of_member: tuple[tuple[int, ...], ...]
    indices: tuple[Indices, ...]
    labels: Indices


def make_splits(labels: npt.ArrayLike | torch.Tensor, config: SplitConfig, *, members: int, seed: int) -> Splits:
    """Split the training set and deal its parts to the members.

    Parts are made by sample (each part gets ⌊n/N⌋ or ⌈n/N⌉ of a class's n images, the remainders dealt so
    that whole parts differ by at most one image as well) or by class (likewise with whole classes). Then

    - ``all``: every member takes every part;
    - ``leave_one_out``: member i all but part i mod N;
    - ``k_of_n``: k parts each, every part taken equally often up to one, combinations different while they
      last;
    - ``disjoint``: member i parts i, i + M, …;
    - ``bootstrap``: no parts; from each class of n images every member draws n with replacement.

    Args:
        labels: [N_images] class of each image.
        config: The rule; N is ``parts``, by default max(members, 2).
        members: M.
        seed: The run's.

    Raises:
        ConfigError: Under the rule some images would be seen by no member, or some member would see none.
        DataError: There are fewer images or classes than parts to fill, or a member sees fewer than two
            classes.
    """
    assert members >= 1, members
    given = np.asarray(labels, dtype=np.int64)
    if config.rule == "bootstrap":
        part_of = np.zeros(len(given), dtype=np.int64)
        parts_of_member: tuple[tuple[int, ...], ...] = ((0,),) * members
        indices = tuple(_bootstrap(given, member=member, seed=seed) for member in range(members))
    else:
        parts = config.parts or max(members, 2)
        parts_of_member = _deal(config, parts=parts, members=members)
        part_of = _parts(given, parts, by=config.by, seed=seed)
        if config.rule != "all":
            _check_filled(part_of, parts, by=config.by)
        indices = tuple(np.flatnonzero(np.isin(part_of, own)) for own in parts_of_member)
        assert len(np.unique(np.concatenate(indices))) == len(given), "the members together must see every image"
    for member, seen in enumerate(indices):
        classes = len(np.unique(given[seen]))
        if classes < 2:
            raise DataError(
                f"member {member} sees {classes} class{'' if classes == 1 else 'es'} in {len(seen)} images; "
                f"it needs at least two to compare. Use fewer members or parts, or ensemble.split.by: sample."
            )
    return Splits(part_of, parts_of_member, indices, given)


def to_table(splits: Splits, names: Sequence[str]) -> pa.Table:
    """The splits as a table with a row an image, to be saved with the run.

    Args:
        splits: From :func:`make_splits`.
        names: Of the N_images images, in the order of the labels.

    Returns:
        Columns ``name``, ``label``, ``part`` and, for each member, ``member_0`` … with how often it sees the
        image (0 or 1; more under ``bootstrap``).
    """
    assert len(names) == len(splits.labels), (len(names), len(splits.labels))
    columns = {
        "name": pa.array(names, pa.string()),
        "label": pa.array(splits.labels),
        "part": pa.array(splits.part_of),
    }
    for member, seen in enumerate(splits.indices):
        columns[f"member_{member}"] = pa.array(np.bincount(seen, minlength=len(names)))
    return pa.table(columns)


def _parts(labels: Indices, parts: int, *, by: str, seed: int) -> Indices:
    """[N_images] part of each image."""
    classes = np.unique(labels)
    if by == "class":
        part_of_class = np.empty(len(classes), dtype=np.int64)
        part_of_class[_shuffled(len(classes), seed, "class")] = np.arange(len(classes)) % parts
        return np.asarray(part_of_class[np.searchsorted(classes, labels)])
    part_of = np.empty(len(labels), dtype=np.int64)
    dealt = 0
    for label in classes:
        own = np.flatnonzero(labels == label)
        # A class is dealt on from the part where the one before it stopped: no part collects the remainders.
        part_of[own[_shuffled(len(own), seed, "sample", int(label))]] = (dealt + np.arange(len(own))) % parts
        dealt += len(own)
    return part_of


def _deal(config: SplitConfig, *, parts: int, members: int) -> tuple[tuple[int, ...], ...]:
    """The parts of each member."""
    if config.rule == "all":
        return (tuple(range(parts)),) * members
    if config.rule == "leave_one_out":
        if members == 1:
            raise ConfigError(
                "ensemble.split.rule 'leave_one_out' with one member would leave its part out for good; "
                "use at least two members, or the rule 'all'"
            )
        return tuple(tuple(part for part in range(parts) if part != member % parts) for member in range(members))
    if config.rule == "disjoint":
        if parts < members:
            raise ConfigError(
                f"ensemble.split.rule 'disjoint' needs at least as many parts as members; got {parts} and "
                f"{members}. Use parts {members} or more."
            )
        return tuple(tuple(range(member, parts, members)) for member in range(members))
    return _combinations(parts, config.parts_per_member or parts - 1, members=members)


def _combinations(parts: int, k: int, *, members: int) -> tuple[tuple[int, ...], ...]:
    """k parts for each member: those taken least, and a combination not dealt yet where there is a choice."""
    if k > parts:
        raise ConfigError(f"ensemble.split.parts_per_member must be at most parts = {parts}; got {k}")
    if members * k < parts:
        raise ConfigError(
            f"ensemble.split.rule 'k_of_n' cannot cover {parts} parts with {members} members of {k}: "
            f"{parts - members * k} would be seen by nobody. Use parts_per_member {-(-parts // members)} or "
            f"more, or parts {members * k} or fewer."
        )
    taken = [0] * parts
    dealt: list[tuple[int, ...]] = []
    for _ in range(members):
        # Counts differ by at most one: either all rarer parts fit in and others fill up, or k of the rarer.
        rarer = [part for part in range(parts) if taken[part] == min(taken)]
        fixed, choice = ([], rarer) if k <= len(rarer) else (rarer, [p for p in range(parts) if p not in rarer])
        options = (tuple(sorted([*fixed, *more])) for more in itertools.combinations(choice, k - len(fixed)))
        # At most `members` options are passed over, however many combinations there are.
        chosen = next((option for option in options if option not in dealt), None)
        dealt.append(chosen or tuple(sorted([*fixed, *choice[: k - len(fixed)]])))
        for part in dealt[-1]:
            taken[part] += 1
    return tuple(dealt)


def _bootstrap(labels: Indices, *, member: int, seed: int) -> Indices:
    drawn = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        source = generator(seed, "split", "bootstrap", member, int(label))
        drawn.append(own[torch.randint(len(own), (len(own),), generator=source).numpy()])
    return np.sort(np.concatenate(drawn))


def _check_filled(part_of: Indices, parts: int, *, by: str) -> None:
    empty = int(np.sum(np.bincount(part_of, minlength=parts) == 0))
    if empty:
        what = "classes" if by == "class" else "images"
        raise DataError(
            f"{empty} of the {parts} parts would be empty: the training set has too few {what}. "
            f"Set ensemble.split.parts to {parts - empty} or less."
        )


def _shuffled(count: int, seed: int, *key: int | str) -> Indices:
    order = torch.randperm(count, generator=generator(seed, "split", *key)).numpy()
    return np.asarray(order, dtype=np.int64)
