"""MLflow as a view of a run. The only room that imports mlflow."""

from eat_dist.tracking.lifecycle import PARENT_TAG, Status, end_run
from eat_dist.tracking.sending import DatasetRecord
from eat_dist.tracking.tracker import Tracker

__all__ = ["PARENT_TAG", "DatasetRecord", "Status", "Tracker", "end_run"]
