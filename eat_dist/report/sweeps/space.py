"""The search space as axes: where on [0, 1] a setting lies, and what is written beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from eat_dist.config.base import Number

Scale = Literal["linear", "log", "category"]
_RANGES: dict[str, Scale] = {"uniform": "linear", "integer": "linear", "log_uniform": "log"}
_LISTS = ("choice", "grid")
_NUMBER: TypeAdapter[float] = TypeAdapter(Number)
# Labels nearer than this share of the axis would touch.
_APART = 0.17


@dataclass(frozen=True)
class Parameter:
    """One key of the config that the sweep varies.

    Attributes:
        key: ``section.key``.
        scale: How its axis runs. Categories, and the values of a list, lie evenly spaced in the order given.
        low: Lowest value of a range; above 0 on a log scale.
        high: Highest value of a range.
        categories: What a list holds, as given, in words.
        identities: The same by value, so that ``8/255`` is the number it means.
        spec: The space as given, in words.
        condition: When it applies, in words; empty: always.
        whole: Whether its values are whole numbers.
    """

    key: str
    scale: Scale
    low: float = 0.0
    high: float = 1.0
    categories: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    spec: str = ""
    condition: str = ""
    whole: bool = False

    @property
    def ordered(self) -> bool:
        """Whether its values have an order: a range, or a list of rising or falling numbers."""
        if self.scale != "category":
            return True
        values = [as_number(text) for text in self.categories]
        if any(value is None for value in values):
            return False
        return values in (sorted(values, key=float), sorted(values, key=float, reverse=True))  # type: ignore[arg-type]

    def position(self, value: Any) -> float:
        """Where a value lies, 0 the low end, 1 the high one."""
        if self.scale == "category":
            return self._place(self.identities.index(_identity(value)))
        number = as_number(value)
        if number is None:
            raise ValueError(f"expected a number for {self.key}; got {written(value)}")
        if self.high == self.low:
            return 0.5
        if self.scale == "log":
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels: every category, or the ends of the range and round values between them."""
        if self.scale == "category":
            return [(self._place(index), name) for index, name in enumerate(self.categories)]
        ends = [self.low, self.high] if self.high > self.low else [self.low]
        return spaced([(self.position(value), f"{value:.3g}") for value in [*ends, *self._round_values()]])

    def label(self, value: Any) -> str:
        """A value as the space has it, else short."""
        if self.scale == "category":
            return self.categories[self.identities.index(_identity(value))]
        return written(value)

    def _place(self, index: int) -> float:
        return 0.5 if len(self.categories) == 1 else index / (len(self.categories) - 1)

    def _round_values(self) -> list[float]:
        if self.high <= self.low:
            return []
        if self.scale == "log":
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        return round_values(self.low, self.high, whole=self.whole)


def round_values(low: float, high: float, *, whole: bool = False) -> list[float]:
    """A few round numbers inside [low, high]."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  (half a second, once a report)

    found = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1).tick_values(low, high)
    return [float(value) for value in found if low <= value <= high]


def spaced(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks, in the order of importance given, without those that would touch an earlier one; then by position."""
    kept: list[tuple[float, str]] = []
    for place, label in ticks:
        if all(abs(place - other) >= _APART for other, _ in kept):
            kept.append((place, label))
    return sorted(kept)


def read_space(space: Mapping[str, Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> tuple[Parameter, ...]:
    """Make the axes of a space.

    An axis also reaches the values that trials had outside of the space, as when the base config's own were tried.

    Args:
        space: For each key one of ``uniform``, ``log_uniform``, ``integer`` (two ends) or ``choice``, ``grid`` (a
            list), and ``when``: other keys and the value, or values, with which it applies.
        settings: Those of every trial.

    Raises:
        ValueError: A specification or a value does not fit; one line.
    """
    return tuple(_parameter(key, spec, [own[key] for own in settings if key in own]) for key, spec in space.items())


def written(value: Any) -> str:
    """A setting as YAML would have it on one line, numbers with four digits: ``0.003162``, ``true``, ``[16, 32]``."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_number(value: Any) -> float | None:
    """A number, also one written as ``8/255`` or ``1e-3``; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return _NUMBER.validate_python(value)
    except ValidationError:
        return None


def _parameter(key: str, spec: Mapping[str, Any], values: Sequence[Any]) -> Parameter:
    kinds = [kind for kind in (*_RANGES, *_LISTS) if kind in spec]
    if len(kinds) != 1 or not isinstance(spec[kinds[0]], list) or not spec[kinds[0]]:
        expected = ", ".join((*_RANGES, *_LISTS))
        raise ValueError(f"expected one of {expected} with a list for {key}; got {written(dict(spec))}")
    kind, listed = kinds[0], spec[kinds[0]]
    text = f"{kind} {', '.join(map(written, listed))}"
    condition = _condition(key, spec.get("when") or {})
    if kind in _LISTS:
        names: dict[str, str] = {}
        for value in [*listed, *values]:
            names.setdefault(_identity(value), written(value))
        return Parameter(
            key, "category", categories=tuple(names.values()), identities=tuple(names), spec=text, condition=condition
        )
    numbers = [as_number(value) for value in [*listed, *values]]
    known = [number for number in numbers if number is not None]
    if len(listed) != 2 or len(known) != len(numbers):
        raise ValueError(f"expected two numbers for {key}, and numbers in the trials; got {written(dict(spec))}")
    low, high = min(known), max(known)
    if _RANGES[kind] == "log" and low <= 0:
        raise ValueError(f"expected numbers above 0 for {key}, whose scale is logarithmic; got {low:g}")
    return Parameter(key, _RANGES[kind], low, high, spec=text, condition=condition, whole=kind == "integer")


def _condition(key: str, when: Any) -> str:
    """``when``: other keys, each with a value or a list of them."""
    if not hasattr(when, "items"):
        raise ValueError(f"expected keys with their values under {key}.when; got {written(when)}")
    listed = {other: values if isinstance(values, list) else [values] for other, values in when.items()}
    return " and ".join(f"{other} is {' or '.join(map(written, values))}" for other, values in listed.items())


def _identity(value: Any) -> str:
    number = as_number(value)
    return written(value) if number is None else repr(number)
