"""MLflow as a view of a run. The only room that imports mlflow."""

from eat_dist.tracking.tracker import Tracker

__all__ = ["Tracker"]
