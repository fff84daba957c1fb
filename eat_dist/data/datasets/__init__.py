"""Datasets, one file each, all split by class: tested on classes that training never saw."""

from eat_dist.config import DataConfig
from eat_dist.data.datasets import digits, omniglot  # noqa: F401  (registers them)
from eat_dist.data.datasets.table import DATASETS, Loader
from eat_dist.data.images import ZeroShotData

__all__ = ["DATASETS", "Loader", "load_dataset"]


def load_dataset(config: DataConfig) -> ZeroShotData:
    """Load the configured dataset; :class:`ZeroShotData` checks it when it is constructed.

    Raises:
        ConfigError: No dataset has that name.
        DataError: Something is missing, damaged or not usable for retrieval on unseen classes.
    """
    return DATASETS[config.dataset](config)
