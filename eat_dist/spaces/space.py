"""A search space: parameters, each a config key with the values it may take, some only where another has given ones."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eat_dist.seeding import derive_seed

Settings = dict[str, Any]
"""Config key (``section.key``) → value, JSON-ready."""


@dataclass(frozen=True)
class Uniform:
    """A number in [low, high]; ``log``: its logarithm is uniform."""

    low: float
    high: float
    log: bool = False

    def draw(self, source: random.Random) -> float:
        """A value at random."""
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
            return min(max(value, self.low), self.high)  # exp and log round
        return source.uniform(self.low, self.high)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values whose validity tells that of all."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Integer:
    """A whole number in [low, high], both included."""

    low: int
    high: int

    def draw(self, source: random.Random) -> int:
        """A value at random."""
        return source.randint(self.low, self.high)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values whose validity tells that of all."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def draw(self, source: random.Random) -> Any:
        """A value at random."""
        return source.choice(self.values)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values."""
        return self.values


Domain = Uniform | Integer | Choice


@dataclass(frozen=True)
class Parameter:
    """One key that is varied.

    Attributes:
        key: ``section.key`` of the run's config.
        domain: Its values.
        when: Key of another parameter → the values with which this one exists. Elsewhere the key keeps the value of the
            base config.
    """

    key: str
    domain: Domain
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def exists(self, settings: Mapping[str, Any]) -> bool:
        """Whether it exists beside these settings of the parameters before it."""
        return all(key in settings and settings[key] in values for key, values in self.when)


@dataclass(frozen=True)
class Space:
    """What a sweep varies.

    Attributes:
        name: For people.
        parameters: Each after those that its ``when`` names.
        given: Key → its entry as the YAML has it.
    """

    name: str
    parameters: tuple[Parameter, ...]
    given: Mapping[str, Any]

    def choose(self, pick: Callable[[Parameter], Any]) -> Settings:
        """Settings of one trial: ``pick`` is asked for each parameter that exists, in order."""
        settings: Settings = {}
        for parameter in self.parameters:
            if parameter.exists(settings):
                settings[parameter.key] = pick(parameter)
        return settings

    def draw(self, *seed: int | str) -> Settings:
        """Settings at random; a function of the seed alone, and of each key by itself."""
        return self.choose(lambda parameter: parameter.domain.draw(random.Random(derive_seed(*seed, parameter.key))))

    def grid(self) -> Iterator[Settings]:
        """Every combination of the values, the last parameter varying fastest.

        Only for a space of choices and integers.
        """
        return self._product(_all_values)

    def extremes(self) -> Iterator[Settings]:
        """Every combination of bounds and choices."""
        return self._product(lambda domain: domain.extremes)

    def _product(self, values: Callable[[Domain], Sequence[Any]]) -> Iterator[Settings]:
        def extend(settings: Settings, rest: Sequence[Parameter]) -> Iterator[Settings]:
            if not rest:
                yield settings
            elif not rest[0].exists(settings):
                yield from extend(settings, rest[1:])
            else:
                for value in values(rest[0].domain):
                    yield from extend({**settings, rest[0].key: value}, rest[1:])

        return extend({}, self.parameters)

    @property
    def continuous(self) -> tuple[str, ...]:
        """Keys that a grid cannot enumerate."""
        return tuple(parameter.key for parameter in self.parameters if isinstance(parameter.domain, Uniform))

    def grid_size(self, limit: int) -> int:
        """Combinations of :meth:`grid`; counting stops at ``limit``."""
        return sum(1 for _ in itertools.islice(self.grid(), limit))


def _all_values(domain: Domain) -> Sequence[Any]:
    assert not isinstance(domain, Uniform), domain
    return range(domain.low, domain.high + 1) if isinstance(domain, Integer) else domain.values
