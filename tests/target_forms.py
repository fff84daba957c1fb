"""What the tests of targets share: where they look, how one is opened, and the line in which that fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eat_dist.config import ModelConfig, RunConfig
from eat_dist.errors import ConfigError, EatError
from eat_dist.models.ensemble import EmbeddingEnsemble, EnsembleSpec, save_ensemble
from eat_dist.runs.target import Target, open_target
from eat_dist.tracking.store import ENVIRONMENT

MODEL = ModelConfig(widths=(4, 8), embedding_dim=6)


@contextlib.contextmanager
def alone_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, not on the module path, and no MLflow variables; all is restored after."""
    for name in [*os.environ, *ENVIRONMENT, "MLFLOW_TRACKING_URI", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"]:
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, "")  # remembers the value, absent or not, and restores it
            monkeypatch.delenv(name)
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def opened(
    text: str | Path, *, config: RunConfig | None = None, normalise: bool = False, tracking_uri: str | None = None
) -> Target:
    return open_target(str(text), config=config, normalise=normalise, tracking_uri=tracking_uri)


def fault(text: str | Path, expected: type[EatError] = ConfigError, **options: Any) -> str:
    with pytest.raises(EatError) as error:
        opened(text, **options)
    assert type(error.value) is expected
    message = str(error.value)
    assert "\n" not in message
    return message


def ensemble_in(folder: Path, *, members: int = 3, channels: int = 1, inverted: bool = False) -> EmbeddingEnsemble:
    torch.manual_seed(0)
    spec = EnsembleSpec(MODEL, (channels, 8, 8), members=members, inverted=inverted)
    ensemble = spec.build().eval()
    save_ensemble(folder, ensemble, spec=spec)
    return ensemble


def some_images(channels: int = 1) -> torch.Tensor:
    return torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def embedded(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        output: torch.Tensor = model(images)
    return output
