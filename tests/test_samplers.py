"""Both samplers: what a pass holds, and that any position can be reached at once."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import pytest
import torch

from eat_dist.config import DataConfig
from eat_dist.data.samplers import ClassBalancedSampler, Sampler, ShuffleSampler, make_sampler
from eat_dist.errors import ConfigError, DataError

# 13 images: class 3 has 6, class 5 has 4, class 8 has 3; not contiguous, as in a split by class.
LABELS = np.array([3, 5, 8, 3, 5, 8, 3, 5, 8, 3, 5, 3, 3])


def samplers(seed: int = 0) -> dict[str, Sampler]:
    return {
        "shuffle": ShuffleSampler(LABELS, batch_size=4, seed=seed),
        "class_balanced": ClassBalancedSampler(LABELS, batch_size=4, images_per_class=2, seed=seed),
        "class_balanced, small class": ClassBalancedSampler(LABELS, batch_size=10, images_per_class=5, seed=seed),
        "class_balanced, few classes": ClassBalancedSampler(LABELS, batch_size=8, images_per_class=2, seed=seed),
    }


SIZES = dict(zip(samplers(), (4, 4, 10, 8), strict=True))


@pytest.mark.parametrize("name", samplers())
def test_random_access_equals_sequential_reading(name: str) -> None:
    reader = samplers()[name]
    sequential = [reader.batch_indices(position) for position in range(40)]
    reader = samplers()[name]
    for position in np.random.default_rng(0).permutation(40):
        assert np.array_equal(reader.batch_indices(int(position)), sequential[position])
        assert np.array_equal(samplers()[name].batch_indices(int(position)), sequential[position])


@pytest.mark.parametrize("name", samplers())
def test_batches_are_full_int64_and_differ_between_seeds(name: str) -> None:
    batches = [samplers()[name].batch_indices(position) for position in range(10)]
    assert all(batch.dtype == np.int64 and batch.shape == (SIZES[name],) for batch in batches)
    others = [samplers(seed=1)[name].batch_indices(position) for position in range(10)]
    assert not all(np.array_equal(one, other) for one, other in zip(batches, others, strict=True))


def test_every_index_appears_once_in_each_shuffle_pass_and_none_is_dropped() -> None:
    sampler = ShuffleSampler(LABELS, batch_size=4, seed=0)
    stream = np.concatenate([sampler.batch_indices(position) for position in range(13)])  # 52 = 4 passes of 13
    passes = stream.reshape(4, 13)
    assert np.array_equal(np.sort(passes, axis=1), np.tile(np.arange(13), (4, 1)))
    assert len({tuple(order) for order in passes.tolist()}) == 4


def test_an_epoch_rounds_up_to_whole_batches() -> None:
    assert ShuffleSampler(LABELS, batch_size=4, seed=0).batches_per_epoch == 4
    assert ShuffleSampler(LABELS, batch_size=13, seed=0).batches_per_epoch == 1
    assert ClassBalancedSampler(LABELS, batch_size=6, images_per_class=3, seed=0).batches_per_epoch == 3


@pytest.mark.parametrize("window", range(2, 12))
def test_a_shuffled_batch_never_repeats_an_image_where_the_documented_bound_holds(window: int) -> None:
    for count in range(window, 26):
        sampler = ShuffleSampler(np.arange(count) % 2, batch_size=window, seed=count)
        repeats = sum(len(set(sampler.batch_indices(p).tolist())) < window for p in range(3 * count))
        assert repeats == 0 or count < 2 * window - gcd(count, window), (count, window)


def test_a_set_smaller_than_the_batch_repeats_images_evenly() -> None:
    batch = ShuffleSampler([0, 0, 1], batch_size=7, seed=0).batch_indices(0)
    assert sorted(np.bincount(batch).tolist()) == [2, 2, 3]


def test_a_class_balanced_batch_holds_each_of_its_classes_equally_often() -> None:
    labels = np.repeat(np.arange(7), 6)
    sampler = ClassBalancedSampler(labels, batch_size=12, images_per_class=4, seed=0)
    for position in range(70):
        batch = sampler.batch_indices(position)
        classes, counts = np.unique(labels[batch], return_counts=True)
        assert len(classes) == 3
        assert counts.tolist() == [4, 4, 4]


def test_every_class_is_visited_once_a_pass() -> None:
    labels = np.repeat(np.arange(7), 6)
    sampler = ClassBalancedSampler(labels, batch_size=6, images_per_class=2, seed=0)
    visits = np.concatenate([labels[sampler.batch_indices(position)][::2] for position in range(7)])
    assert np.array_equal(np.sort(visits.reshape(3, 7), axis=1), np.tile(np.arange(7), (3, 1)))


def test_every_image_of_a_class_is_drawn_equally_often() -> None:
    # 30 batches of 2 classes are 20 passes over the 3 classes, so 20 visits of 2 images: 40 draws a class.
    sampler = ClassBalancedSampler(LABELS, batch_size=4, images_per_class=2, seed=0)
    drawn = np.bincount(np.concatenate([sampler.batch_indices(p) for p in range(30)]), minlength=13)
    assert set(drawn[LABELS == 3]) <= {6, 7}  # 40 / 6
    assert set(drawn[LABELS == 5]) == {10}  # 40 / 4
    assert set(drawn[LABELS == 8]) <= {13, 14}  # 40 / 3


def test_a_class_smaller_than_images_per_class_repeats_its_images_but_misses_none() -> None:
    sampler = ClassBalancedSampler([0, 0, 0, 0, 0, 1, 1], batch_size=10, images_per_class=5, seed=0)
    for position in range(20):
        counts = np.bincount(sampler.batch_indices(position), minlength=7)
        assert counts[:5].tolist() == [1, 1, 1, 1, 1]
        assert sorted(counts[5:].tolist()) == [2, 3]


def test_fewer_classes_than_a_batch_holds_repeat() -> None:
    labels = np.array([0] * 8 + [1] * 8)
    batch = ClassBalancedSampler(labels, batch_size=8, images_per_class=2, seed=0).batch_indices(0)
    assert np.bincount(labels[batch]).tolist() == [4, 4]
    assert len(set(batch.tolist())) == 8  # two visits of a class go on in its stream


def test_the_cached_order_cannot_be_changed_through_a_batch() -> None:
    sampler = ShuffleSampler(LABELS, batch_size=4, seed=0)
    first = sampler.batch_indices(0)
    kept = first.copy()
    first[:] = -1
    assert np.array_equal(sampler.batch_indices(0), kept)


@pytest.mark.parametrize("sampler", ["class_balanced", "shuffle"])
def test_a_split_of_one_class_is_refused(sampler: Any) -> None:
    config = DataConfig(sampler=sampler, batch_size=4, images_per_class=2)
    with pytest.raises(DataError, match="at least two classes"):
        make_sampler(config, [4, 4, 4], seed=0)


def test_a_batch_that_is_no_multiple_of_images_per_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 and 4"):
        ClassBalancedSampler(LABELS, batch_size=10, images_per_class=4, seed=0)


def test_the_config_chooses_the_sampler_and_tensors_are_taken_as_labels() -> None:
    labels = torch.from_numpy(LABELS)
    balanced = make_sampler(DataConfig(batch_size=4, images_per_class=2), labels, seed=0)
    shuffled = make_sampler(DataConfig(sampler="shuffle", batch_size=4), labels, seed=0)
    assert isinstance(balanced, ClassBalancedSampler)
    assert isinstance(shuffled, ShuffleSampler)
    assert np.array_equal(balanced.batch_indices(3), samplers()["class_balanced"].batch_indices(3))
