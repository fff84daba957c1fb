"""A run's model behind its defense at inference, or behind another one."""

from __future__ import annotations

from dataclasses import replace

import torch

from eat_dist.config import RunConfig
from eat_dist.data.images import ImageSet
from eat_dist.data.load import load_dataset
from eat_dist.errors import ConfigError
from eat_dist.inference import needs_pool, options_of
from eat_dist.inference.table import NONE
from eat_dist.models import defend, undefended
from eat_dist.runs.target import Target
from eat_dist.seeding import generator


def check_pool(config: RunConfig, train: ImageSet) -> None:
    """Check that there are as many training images as the config's defense at inference mixes with.

    Raises:
        ConfigError: There are fewer.
    """
    if needs_pool(config.inference) and (count := options_of(config.inference)["pool"]) > len(train):
        raise ConfigError(f"inference.pool must be at most the {len(train)} training images; got {count}")


def drawn_pool(config: RunConfig, train: ImageSet) -> torch.Tensor | None:
    """The images that the config's defense at inference mixes with: uint8 [P, C, H, W]; None where it needs none.

    Drawn uniformly and without repeats from the whole training set, whatever the members' splits, by the run's seed.

    Raises:
        ConfigError: There are fewer.
    """
    if not needs_pool(config.inference):
        return None
    check_pool(config, train)
    count = options_of(config.inference)["pool"]
    order = torch.randperm(len(train), generator=generator(config.seed, "inference", "pool"))
    images = train.batch(order[:count].sort().values, "cpu").images
    return (images * 255).round().to(torch.uint8)


def with_defense(target: Target, config: RunConfig) -> Target:
    """A target behind the defense of the config's section ``inference``.

    A run is put behind what its config says, whatever it was saved with: ``none`` takes its own off. Anything else
    keeps the defense it was saved with unless the config names one.

    Raises:
        ConfigError: As :func:`drawn_pool`.
        DataError: The training set that the defense draws its images from cannot be read.
    """
    wanted = config.inference
    if wanted == target.inference or (wanted.name == NONE and target.kind != "run"):
        return target
    pool = drawn_pool(config, load_dataset(config.data).train) if needs_pool(wanted) else None
    return replace(target, model=defend(undefended(target.model), wanted, pool=pool), inference=wanted)
