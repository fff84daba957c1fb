"""The datasets by name, and the form they share."""

from __future__ import annotations

from collections.abc import Callable

from eat_dist.config import DataConfig
from eat_dist.data.source import Source
from eat_dist.registry import Registry

Lister = Callable[[DataConfig], Source]
"""Finds and checks a dataset's files in their original layout; DataError where something is missing."""

DATASETS: Registry[Lister] = Registry("dataset")
