"""How good and how robust an ensemble is: embedding and attacking a test set, and the protocols."""

from eat_dist.evaluation.attacks import AttackedBatch, attack_batches
from eat_dist.evaluation.embed import embed_images
from eat_dist.evaluation.protocol import evaluate
from eat_dist.evaluation.references import OBJECTIVES, References

__all__ = [
    "OBJECTIVES",
    "AttackedBatch",
    "References",
    "attack_batches",
    "embed_images",
    "evaluate",
]
