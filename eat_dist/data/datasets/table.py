"""The datasets by name, and the form they share."""

from __future__ import annotations

from collections.abc import Callable

from eat_dist.config import DataConfig
from eat_dist.data.images import ZeroShotData
from eat_dist.registry import Registry

Loader = Callable[[DataConfig], ZeroShotData]
"""Reads a whole dataset into memory; DataError where something is missing or damaged."""

DATASETS: Registry[Loader] = Registry("dataset")
