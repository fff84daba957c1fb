"""Datasets, one file each, all split by class: tested on classes that training never saw."""

from eat_dist.data.datasets import cars196, cub200, digits, folder, inshop, omniglot, sop  # noqa: F401  (registers)
from eat_dist.data.datasets.table import DATASETS

__all__ = ["DATASETS"]
