"""How good and how robust a model is: attacking a test set, figures, sanity checks, and the protocols."""

from eat_dist.evaluation.protocol import evaluate
from eat_dist.evaluation.references import OBJECTIVES, References
from eat_dist.evaluation.victim import Alone, Victim, Workers

__all__ = ["OBJECTIVES", "Alone", "References", "Victim", "Workers", "evaluate"]
