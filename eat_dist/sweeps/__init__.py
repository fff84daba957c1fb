"""A sweep: many runs with other settings, measured on validation classes, and the best of them as a config."""

from eat_dist.sweeps.plan import SweepPlan
from eat_dist.sweeps.sweep import Swept, resume_sweep, start_sweep

__all__ = ["SweepPlan", "Swept", "resume_sweep", "start_sweep"]
