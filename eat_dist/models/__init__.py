"""Embedding networks and their fusion."""

from eat_dist.models import convnet  # noqa: F401  (registers it)
from eat_dist.models.embedder import Embedder, build_embedder
from eat_dist.models.ensemble import EmbeddingEnsemble, EnsembleSpec, load_ensemble, save_ensemble
from eat_dist.models.table import BACKBONES

__all__ = [
    "BACKBONES",
    "Embedder",
    "EmbeddingEnsemble",
    "EnsembleSpec",
    "build_embedder",
    "load_ensemble",
    "save_ensemble",
]
