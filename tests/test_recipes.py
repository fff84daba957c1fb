"""The checked-in configs of the published benchmarks are the official Proxy Anchor recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from eat_dist.config import RunConfig, load_config
from eat_dist.data.datasets import DATASETS
from eat_dist.models import BACKBONES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# dataset: learning rate, epochs between decays, factor, BatchNorm frozen (README of the official code, BN-Inception)
OFFICIAL = {
    "cub200": (1e-4, 10, 0.5, True),
    "cars196": (1e-4, 20, 0.5, True),
    "sop": (6e-4, 20, 0.25, False),
    "inshop": (6e-4, 20, 0.25, False),
}


def recipe(name: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_recipe_differs_from_the_others_only_where_the_official_one_does(name: str) -> None:
    config = recipe(name)
    optimiser = config.optimiser

    found = (
        optimiser.learning_rate,
        optimiser.step_epochs,
        optimiser.step_factor,
        config.model.freeze_batch_norm,
    )
    assert found == OFFICIAL[name]
    assert config.data.dataset == name


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_recipe_has_the_official_settings_that_all_datasets_share(name: str) -> None:
    config = recipe(name)

    data = config.data
    assert (data.sampler, data.batch_size, data.augmentation) == ("shuffle", 180, "crop_flip")
    assert (data.image_size, data.resize) == (224, 256)
    assert (config.model.backbone, config.model.embedding_dim, config.model.weights) == (
        "bn_inception",
        512,
        "imagenet",
    )
    assert (config.loss.name, config.loss.alpha, config.loss.margin) == ("proxy_anchor", None, None)
    optimiser = config.optimiser
    assert (optimiser.schedule, optimiser.weight_decay, optimiser.clip_value) == ("step", 1e-4, 10)
    assert optimiser.proxy_learning_rate_factor == 100
    assert (config.train.epochs, config.train.warmup_epochs) == (60, 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_names_components_that_exist(path: Path) -> None:
    config = load_config(path)

    assert config.data.dataset in DATASETS
    assert config.model.backbone in BACKBONES
    assert config.name == path.stem
