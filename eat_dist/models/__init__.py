"""Embedding networks and their fusion."""

from eat_dist.models import bn_inception, convnet, torchvision_nets  # noqa: F401  (registers them)
from eat_dist.models.embedder import Embedder, build_embedder
from eat_dist.models.ensemble import EmbeddingEnsemble, EnsembleSpec, defend, load_ensemble, save_ensemble, undefended
from eat_dist.models.execution import apply_execution
from eat_dist.models.table import BACKBONES

__all__ = [
    "BACKBONES",
    "Embedder",
    "EmbeddingEnsemble",
    "EnsembleSpec",
    "apply_execution",
    "build_embedder",
    "defend",
    "load_ensemble",
    "save_ensemble",
    "undefended",
]
