"""A space against the config it varies, before anything starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from eat_dist.config import RunConfig, configured
from eat_dist.errors import ConfigError, EatError
from eat_dist.spaces.space import Choice, Settings, Space

# Combinations of bounds and choices that are tried; of a larger space as many are drawn instead.
_MOST_COMBINATIONS = 1000
_MOST_SHOWN = 5


def check_space(
    space: Space, base: RunConfig, *, check: Callable[[RunConfig], None] = lambda config: None
) -> tuple[Space, tuple[RunConfig, ...]]:
    """Try bounds and choices: each by itself for type and range, then their combinations on the base config.

    Args:
        space: What is varied.
        base: The config of which it varies keys.
        check: What else a config must pass; raises EatError.

    Returns:
        The space with its choices as the config understands them (``8/255`` is a number), and the configs tried.

    Raises:
        ConfigError: One message with the faults.
    """
    understood = _understood(space)
    faults: dict[str, Settings] = {}
    tried = []
    for settings in _combinations(understood):
        try:
            config = configured(base, settings)
            check(config)
        except EatError as error:
            faults.setdefault(str(error).removeprefix("config: "), settings)
        else:
            tried.append(config)
    if faults:
        shown = [
            f"{fault} (e.g. {', '.join(f'{key}={value}' for key, value in settings.items())})"
            for fault, settings in itertools.islice(faults.items(), _MOST_SHOWN)
        ]
        more = f"; and {len(faults) - _MOST_SHOWN} more" if len(faults) > _MOST_SHOWN else ""
        raise ConfigError(
            f"the space '{space.name}' allows settings that cannot hold together: {'; '.join(shown)}{more}. Narrow it, "
            "or make a parameter conditional with 'when'"
        )
    return understood, tuple(tried)


def _understood(space: Space) -> Space:
    faults: list[str] = []
    # By key: a value as the YAML has it, and as the config understands it.
    values: dict[str, list[tuple[Any, Any]]] = {}
    for parameter in space.parameters:
        adapter = _adapter(parameter.key)
        values[parameter.key] = []
        for value in parameter.domain.extremes:
            try:
                meant = adapter.dump_python(adapter.validate_python(value), mode="json")
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                hint = "; use 'integer'" if "integer" in message and not isinstance(parameter.domain, Choice) else ""
                faults.append(f"{parameter.key}: {message[0].lower()}{message[1:]}; got {value!r}{hint}")
            else:
                values[parameter.key].append((value, meant))
    if faults:
        raise ConfigError(f"space '{space.name}': " + "; ".join(faults))

    def meaning(key: str, value: Any) -> Any:
        return next(meant for given, meant in values[key] if given == value)

    parameters = []
    for parameter in space.parameters:
        when = tuple((key, tuple(meaning(key, value) for value in wanted)) for key, wanted in parameter.when)
        domain = parameter.domain
        if isinstance(domain, Choice):
            domain = Choice(tuple(meant for _, meant in values[parameter.key]))
        parameters.append(replace(parameter, domain=domain, when=when))
    return replace(space, parameters=tuple(parameters))


def _adapter(key: str) -> TypeAdapter[Any]:
    """Type and range of one key, without what its neighbours demand of it."""
    model: type[BaseModel] = RunConfig
    *sections, name = key.split(".")
    for section in sections:
        inner = model.model_fields[section].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    field = model.model_fields[name]
    annotated: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return TypeAdapter(annotated, config=ConfigDict(strict=True))


def _combinations(space: Space) -> Iterator[Settings]:
    first = list(itertools.islice(space.extremes(), _MOST_COMBINATIONS + 1))
    if len(first) <= _MOST_COMBINATIONS:
        yield from first
        return
    at_the_bounds = replace(
        space, parameters=tuple(replace(one, domain=Choice(one.domain.extremes)) for one in space.parameters)
    )
    for number in range(_MOST_COMBINATIONS):
        yield at_the_bounds.draw("space check", number)
