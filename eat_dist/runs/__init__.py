"""One run from its config to its summary: checks, training, evaluation, records."""

from eat_dist.runs.again import Evaluated, evaluate_target
from eat_dist.runs.resubmitted import resume_or_start
from eat_dist.runs.run import Finished
from eat_dist.runs.saved import config_of
from eat_dist.runs.starting import resume_run, start_run

__all__ = ["Evaluated", "Finished", "config_of", "evaluate_target", "resume_or_start", "resume_run", "start_run"]
