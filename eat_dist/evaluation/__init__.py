"""How good and how robust an ensemble is: embedding and attacking a test set, and the protocols."""

from eat_dist.evaluation.attacks import OBJECTIVES, AttackedBatch, References, attack_batches
from eat_dist.evaluation.embed import embed_images
from eat_dist.evaluation.protocol import evaluate

__all__ = [
    "OBJECTIVES",
    "AttackedBatch",
    "References",
    "attack_batches",
    "embed_images",
    "evaluate",
]
