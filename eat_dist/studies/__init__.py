"""A study: rows of settings × datasets × seeds, each a whole run, and the table that says which row is ahead."""

from eat_dist.studies.reading import Study, load_study
from eat_dist.studies.study import Studied, run_study

__all__ = ["Studied", "Study", "load_study", "run_study"]
