"""The ensemble as ``mlflow.pyfunc.load_model`` sees it; imports no MLflow.

The model's ``MLmodel`` file names this module (``loader_module``) and MLflow calls :func:`_load_pyfunc`. The
model is then this code and a folder of safetensors and JSON: nothing in it is ever unpickled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eat_dist.models.ensemble import EmbeddingEnsemble, load_ensemble


class EnsembleModel:
    """Embeds batches of images on the CPU.

    Args:
        ensemble: In evaluation mode.
    """

    def __init__(self, ensemble: EmbeddingEnsemble) -> None:
        self.ensemble = ensemble

    def predict(self, images: npt.NDArray[np.float32], params: dict[str, Any] | None = None) -> npt.NDArray[np.float32]:
        """[B, C, H, W] in [0, 1] → [B, M·D] of length 1; ``params``, MLflow's, has no effect."""
        with torch.inference_mode():
            # A copy: MLflow may hand over a read-only array, which torch does not wrap without a warning.
            embeddings = self.ensemble(torch.tensor(images, dtype=torch.float32))
        return np.asarray(embeddings.numpy(), dtype=np.float32)


def _load_pyfunc(path: str) -> EnsembleModel:
    """MLflow's entry point.

    Args:
        path: The folder that :func:`eat_dist.models.save_ensemble` wrote.

    Raises:
        StorageError: A file is missing, damaged, or does not fit the architecture.
    """
    return EnsembleModel(load_ensemble(path))
