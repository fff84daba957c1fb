"""Which part each image is in, which parts each member takes, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from eat_dist.config import SplitConfig
from eat_dist.data.splits import Splits, make_splits, to_table
from eat_dist.errors import ConfigError, DataError

LABELS = np.repeat(np.arange(6), [7, 4, 9, 5, 6, 11])  # 42 images
PART_RULES = ("all", "leave_one_out", "k_of_n", "disjoint")


def splits(labels: Any, rule: Any, *, members: int, seed: int = 0, **options: Any) -> Splits:
    return make_splits(labels, SplitConfig(rule=rule, **options), members=members, seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_of_three_and_two_images_in_two_parts_by_hand(seed: int) -> None:
    """Class 0 has 3 images: part 0 gets two, part 1 one. Dealing goes on at part 1, so class 1 gives it
    one and then part 0 one: 3 and 2 images. Member 0 leaves out part 0 and member 1 part 1."""
    made = splits([0, 0, 0, 1, 1], "leave_one_out", members=2, seed=seed)
    assert sorted(made.part_of[:3].tolist()) == [0, 0, 1]
    assert sorted(made.part_of[3:].tolist()) == [0, 1]
    assert np.bincount(made.part_of).tolist() == [3, 2]
    assert made.parts_of_member == ((1,), (0,))
    assert made.indices[0].tolist() == [i for i in range(5) if made.part_of[i] == 1]
    assert made.indices[1].tolist() == [i for i in range(5) if made.part_of[i] == 0]


@pytest.mark.parametrize("parts", [2, 3, 4, 5])
def test_parts_by_sample_share_every_class_and_the_whole_evenly(parts: int) -> None:
    made = splits(LABELS, "all", members=2, parts=parts)
    for label, size in enumerate(np.bincount(LABELS)):
        counts = np.bincount(made.part_of[label == LABELS], minlength=parts)
        assert set(counts.tolist()) <= {size // parts, -(-size // parts)}
    assert np.ptp(np.bincount(made.part_of, minlength=parts)) <= 1


def test_parts_by_class_keep_classes_whole_and_share_them_evenly() -> None:
    made = splits(LABELS, "disjoint", members=3, by="class")
    part_of_class = [set(made.part_of[label == LABELS].tolist()) for label in range(6)]
    assert all(len(part) == 1 for part in part_of_class)
    assert np.bincount([part.pop() for part in part_of_class]).tolist() == [2, 2, 2]


@pytest.mark.parametrize("by", ["sample", "class"])
@pytest.mark.parametrize("rule", PART_RULES)
def test_members_see_exactly_their_parts_and_together_everything(rule: str, by: str) -> None:
    made = splits(LABELS, rule, members=3, by=by)
    for parts, indices in zip(made.parts_of_member, made.indices, strict=True):
        assert indices.dtype == np.int64
        assert indices.tolist() == [i for i in range(42) if made.part_of[i] in parts]
    assert sorted(set(np.concatenate(made.indices).tolist())) == list(range(42))


def test_by_sample_every_member_sees_every_class() -> None:
    for indices in splits(LABELS, "disjoint", members=4).indices:
        assert sorted(set(LABELS[indices].tolist())) == list(range(6))


def test_all_gives_every_member_the_whole_set() -> None:
    made = splits(LABELS, "all", members=2)
    assert made.parts_of_member == ((0, 1), (0, 1))
    assert all(indices.tolist() == list(range(42)) for indices in made.indices)


def test_one_member_sees_all_in_two_parts() -> None:
    assert splits(LABELS, "all", members=1).parts_of_member == ((0, 1),)


def test_leave_one_out_wraps_round_when_there_are_more_members_than_parts() -> None:
    assert splits(LABELS, "leave_one_out", members=4, parts=3).parts_of_member == (
        (1, 2),
        (0, 2),
        (0, 1),
        (1, 2),
    )


def test_disjoint_deals_parts_round_robin_and_no_image_twice() -> None:
    made = splits(LABELS, "disjoint", members=2, parts=5)
    assert made.parts_of_member == ((0, 2, 4), (1, 3))
    assert len(np.concatenate(made.indices)) == 42


def test_k_of_n_of_four_by_hand() -> None:
    """{0, 1}, then the rarer {2, 3}; all equal again, so the first new pair {0, 2}, leaving {1, 3}; …"""
    made = splits(LABELS, "k_of_n", members=6, parts=4, parts_per_member=2)
    assert made.parts_of_member == ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))


@pytest.mark.parametrize("parts", [2, 3, 5, 6])
def test_k_of_n_covers_evenly_with_k_different_parts_each(parts: int) -> None:
    for k, members in itertools.product(range(1, parts + 1), range(1, 9)):
        if members * k < parts:
            continue
        made = splits(np.tile(LABELS, 2), "k_of_n", members=members, parts=parts, parts_per_member=k)
        assert all(len(set(own)) == k for own in made.parts_of_member)
        taken = np.bincount(np.concatenate(made.parts_of_member), minlength=parts)
        assert np.ptp(taken) <= 1
        assert taken.sum() == members * k


def test_k_of_n_leaves_one_out_by_default() -> None:
    own = splits(LABELS, "k_of_n", members=3).parts_of_member
    assert sorted(own) == [(0, 1), (0, 2), (1, 2)]


def test_bootstrap_draws_as_many_from_each_class_as_it_has_with_repeats() -> None:
    made = splits(LABELS, "bootstrap", members=3)
    assert set(made.part_of.tolist()) == {0}
    assert made.parts_of_member == ((0,), (0,), (0,))
    for indices in made.indices:
        assert np.array_equal(np.bincount(LABELS[indices]), np.bincount(LABELS))
        assert len(set(indices.tolist())) < 42
    assert not np.array_equal(made.indices[0], made.indices[1])


@pytest.mark.parametrize("rule", [*PART_RULES, "bootstrap"])
def test_the_seed_decides_everything(rule: str) -> None:
    first, again, other = (splits(LABELS, rule, members=3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.part_of, again.part_of)
    assert all(np.array_equal(a, b) for a, b in zip(first.indices, again.indices, strict=True))
    if rule == "bootstrap":
        assert not np.array_equal(first.indices[0], other.indices[0])
    else:
        assert not np.array_equal(first.part_of, other.part_of)


def refused(kind: type[Exception], labels: Any, rule: str, *, members: int, **options: Any) -> str:
    with pytest.raises(kind) as error:
        splits(labels, rule, members=members, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rules_that_would_lose_images_are_refused() -> None:
    message = refused(ConfigError, LABELS, "k_of_n", members=2, parts=5, parts_per_member=2)
    assert "cannot cover 5 parts with 2 members of 2: 1 would be seen by nobody" in message
    assert "parts_per_member 3 or more, or parts 4 or fewer" in message
    assert "one member" in refused(ConfigError, LABELS, "leave_one_out", members=1)
    assert "at most parts = 2; got 3" in refused(ConfigError, LABELS, "k_of_n", members=2, parts=2, parts_per_member=3)


def test_disjoint_with_fewer_parts_than_members_is_refused() -> None:
    assert "got 2 and 3" in refused(ConfigError, LABELS, "disjoint", members=3, parts=2)


def test_a_member_with_one_class_is_named() -> None:
    labels = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # five classes for three members: two, two and one
    assert "member 2 sees 1 class in 2 images" in refused(DataError, labels, "disjoint", members=3, by="class")


def test_parts_that_would_be_empty_are_refused() -> None:
    message = refused(DataError, LABELS, "leave_one_out", members=3, parts=8, by="class")
    assert "2 of the 8 parts would be empty" in message
    assert "ensemble.split.parts to 6 or less" in message


def test_the_table_counts_who_sees_what_and_survives_parquet(tmp_path: Path) -> None:
    made = splits(LABELS, "bootstrap", members=2)
    names = [f"image{index}" for index in range(42)]
    pq.write_table(to_table(made, names), tmp_path / "splits.parquet")
    table = pq.read_table(tmp_path / "splits.parquet")
    assert table.column_names == ["name", "label", "part", "member_0", "member_1"]
    assert table["name"].to_pylist() == names
    assert table["label"].to_pylist() == LABELS.tolist()
    for member in range(2):
        counts = table[f"member_{member}"].to_pylist()
        assert sum(counts) == 42
        assert np.array_equal(np.repeat(np.arange(42), counts), made.indices[member])
