"""Search spaces: which settings a sweep varies, and between which values."""

from eat_dist.spaces.check import check_space
from eat_dist.spaces.reading import load_space, parse_space
from eat_dist.spaces.space import Choice, Integer, Parameter, Settings, Space, Uniform

__all__ = [
    "Choice",
    "Integer",
    "Parameter",
    "Settings",
    "Space",
    "Uniform",
    "check_space",
    "load_space",
    "parse_space",
]
