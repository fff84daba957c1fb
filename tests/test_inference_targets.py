"""Which defense at inference a target is put behind, and the images that one of them mixes with."""

from __future__ import annotations

import pytest
import torch

from eat_dist.config import DataConfig, InferenceConfig, load_config
from eat_dist.data.images import LabelledImages
from eat_dist.data.load import load_dataset
from eat_dist.errors import ConfigError
from eat_dist.inference import defenses_of
from eat_dist.models import EmbeddingEnsemble, defend
from eat_dist.runs.defended import drawn_pool, with_defense
from eat_dist.runs.target import Target
from evaluation_cases import untrained

JPEG = InferenceConfig(name="input_transform", transforms=("jpeg",))


def test_the_pool_is_drawn_from_the_training_set_by_the_seed_alone() -> None:
    train = load_dataset(DataConfig()).train
    assert isinstance(train, LabelledImages)
    settings = ["inference.name=mixup_inference", "inference.pool=60"]
    pool = drawn_pool(load_config(None, settings), train)
    again = drawn_pool(load_config(None, [*settings, "ensemble.split.rule=disjoint"]), train)
    other = drawn_pool(load_config(None, [*settings, "seed=1"]), train)
    assert pool is not None
    assert again is not None
    assert other is not None
    assert (pool.shape, pool.dtype) == ((60, 1, 8, 8), torch.uint8)
    assert torch.equal(pool, again)
    places = [
        [int((train.images == image).flatten(1).all(dim=1).nonzero()[0]) for image in images]
        for images in (pool, other)
    ]
    for found in places:
        assert len(set(found)) == 60
        assert found == sorted(found)
        assert len(set(train.labels[found].tolist())) == train.num_classes
        assert found[-1] > len(train) // 2
    assert places[0] != places[1]

    assert drawn_pool(load_config(None, []), train) is None
    with pytest.raises(ConfigError, match=rf"at most the {len(train)} training images; got 100000"):
        drawn_pool(load_config(None, [settings[0], "inference.pool=100000"]), train)


def behind(target: Target, *assignments: str) -> str:
    """The name of the defense that a target is put behind, after a look at the model itself."""
    found = with_defense(target, load_config(None, list(assignments)))
    assert isinstance(found.model, EmbeddingEnsemble)
    assert len(found.model.members) == 2
    names = {defense.settings["name"] for defense in defenses_of([found.model])} or {"none"}
    assert names == {found.inference.name}
    return found.inference.name


def test_a_run_is_put_behind_what_its_config_says_and_anything_else_behind_what_it_was_saved_with() -> None:
    bart = "inference.name=bart"
    bare, saved = untrained(2), defend(untrained(2), JPEG)
    assert behind(Target("run", "a", bare)) == "none"
    assert behind(Target("run", "a", bare), bart) == "bart"
    assert behind(Target("run", "a", saved, inference=JPEG)) == "none"
    assert behind(Target("run", "a", saved, inference=JPEG), bart) == "bart"
    assert behind(Target("mlflow", "models:/a/1", saved, inference=JPEG)) == "input_transform"
    assert behind(Target("mlflow", "models:/a/1", saved, inference=JPEG), bart) == "bart"
    assert behind(Target("weights", "a.safetensors", bare)) == "none"
    assert behind(Target("weights", "a.safetensors", bare), bart) == "bart"


def test_a_defense_that_a_model_is_behind_already_is_not_put_around_it_again() -> None:
    saved = Target("run", "a", defend(untrained(2), JPEG), inference=JPEG)
    config = load_config(None, ["inference={name: input_transform, transforms: [jpeg]}"])
    assert with_defense(saved, config) is saved
    other = with_defense(saved, load_config(None, ["inference={name: input_transform, transforms: [bit_depth]}"]))
    assert len(defenses_of([other.model])) == 2
    assert {tuple(defense.settings["transforms"]) for defense in defenses_of([other.model])} == {("bit_depth",)}
