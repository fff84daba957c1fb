"""Listing a dataset, and the one line in which that fails."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import SHARED_DATA
from eat_dist.config import DataConfig
from eat_dist.data.datasets import DATASETS
from eat_dist.data.source import Source
from eat_dist.errors import DataError


def needs(path: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (SHARED_DATA / path).exists(), reason=f"there is no {SHARED_DATA / path}")


def source_of(dataset: str, root: Path | str | None = None, **options: Any) -> Source:
    """List a part of a dataset; the warning that it is one has its own test."""
    options = {"subset": dataset not in {"digits", "folder"}, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*taken as a subset")
        return DATASETS[dataset](DataConfig(dataset=dataset, root=root and str(root), **options))


def fault(dataset: str, root: Path | str | None = None, **options: Any) -> str:
    """The one line in which listing fails."""
    with pytest.raises(DataError) as error:
        source_of(dataset, root, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def roles(source: Source) -> dict[str, int]:
    return dict(Counter(item.role for item in source.items))
