"""One run from its config to its summary: checks, training, evaluation, records."""

from eat_dist.runs.run import Finished, config_of, evaluate_again, resume_run, start_run

__all__ = ["Finished", "config_of", "evaluate_again", "resume_run", "start_run"]
