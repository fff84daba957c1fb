"""Name → component. One table per kind of component; adding one is one decorated definition."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from eat_dist.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of components of one kind, looked up by the name that configs use.

    Args:
        kind: What the entries are, in words, for the error message ("attack", "dataset").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a component under ``name``. A name used twice is a programming error."""

        def add(component: T) -> T:
            assert name not in self._entries, f"{self.kind} '{name}' is registered twice"
            self._entries[name] = component
            return component

        return add

    def __getitem__(self, name: str) -> T:
        """Look a component up.

        Raises:
            ConfigError: No such name; the message lists the known ones and the nearest.
        """
        if name in self._entries:
            return self._entries[name]
        nearest = difflib.get_close_matches(name, self._entries, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise ConfigError(f"no {self.kind} is called '{name}'; known: {', '.join(sorted(self._entries))}.{hint}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def own_options(
    kind: str, name: str, *, section: str, defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """A component's own options: those that are set, its defaults for the others.

    Args:
        kind: As a :class:`Registry` has it.
        name: Of the component.
        section: Of the config that chooses it by ``name`` and has its options.
        defaults: Of the options that it takes.
        given: The options that are set.

    Raises:
        ConfigError: One is set that it does not take.
    """
    foreign = [f"{section}.{option} = {_told(value)}" for option, value in given.items() if option not in defaults]
    if foreign:
        takes = f"takes the options {', '.join(defaults)}" if defaults else "has no options"
        raise ConfigError(
            f"the {kind} '{name}' {takes}; got {', '.join(foreign)}. Leave that out, or choose another {section}.name."
        )
    return {**defaults, **given}


def _told(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
