"""eat_dist: ensemble adversarial training for deep metric learning, distributed over Ray."""

__version__ = "0.1.0"
