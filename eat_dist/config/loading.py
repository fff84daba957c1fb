"""YAML in, YAML out, and every fault in one message."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from eat_dist.config.sections import RunConfig
from eat_dist.config.yaml_files import parse_yaml, read_yaml
from eat_dist.errors import ConfigError


def parse_config(values: Any, *, source: str = "config") -> RunConfig:
    """Check a nested mapping and fill in the defaults.

    Raises:
        ConfigError: One message with every fault: unknown keys (with the nearest known one) and bad values.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of sections (data:, model:, …), got {type(values).__name__}")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = [_fault(detail) for detail in error.errors()]
        # Sections are compared only when each is valid, so compare them with the faulty values at their defaults.
        try:
            RunConfig.model_validate(_without(values, [detail["loc"] for detail in error.errors()]))
        except ValidationError as more:
            faults += [fault for detail in more.errors() if (fault := _fault(detail)) not in faults]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from error


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (default: all defaults) and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: The file is missing, is not YAML, or the result is not a valid config.
    """
    source = "config" if path is None else str(path)
    values: Any = {}
    if path is not None:
        values = read_yaml(path, "config")[1] or {}
    if isinstance(values, dict):
        for override in overrides:
            _apply(values, override)
    return parse_config(values, source=source)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: RunConfig, *assignments: str) -> RunConfig:
    """A copy of ``config`` with ``section.key=value`` assignments applied and everything checked again."""
    values = config.model_dump(mode="json")
    for assignment in assignments:
        _apply(values, assignment)
    return parse_config(values)


def read_assignment(assignment: str) -> tuple[str, Any]:
    """``section.key=value`` as key and value.

    Raises:
        ConfigError: It is of another form, or the value is not YAML.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set takes section.key=value, e.g. attack.epsilon=8/255; got '{assignment}'")
    return path.strip(), parse_yaml(text, f"--set {assignment}: the value")


def configured(base: RunConfig, settings: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """The base config with settings, ``section.key`` → value, everything checked again.

    Raises:
        ConfigError: A key is not known, a value is bad, or they cannot hold together.
    """
    values = base.model_dump(mode="json")
    for key, value in settings.items():
        try:
            _assign(values, key, value)
        except ConfigError as error:
            raise ConfigError(f"{source}: {key}: {error}") from error
    return parse_config(values, source=source)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as ``section.key`` and value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _apply(values: dict[str, Any], assignment: str) -> None:
    key, value = read_assignment(assignment)
    try:
        _assign(values, key, value)
    except ConfigError as error:
        raise ConfigError(f"--set {assignment}: {error}") from error


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{section}' is a value, not a section")
        target = inner
    target[name] = copy.deepcopy(value)


def _without(values: dict[str, Any], locations: Sequence[Sequence[int | str]]) -> dict[str, Any]:
    """A copy of nested settings without those at the given locations (all of it where a location is the root)."""
    if any(not location for location in locations):
        return {}
    kept: dict[str, Any] = {}
    for key, value in values.items():
        inner = [location[1:] for location in locations if location[0] == key]
        if isinstance(value, dict) and all(inner):
            kept[key] = _without(value, inner)
        elif not inner:
            kept[key] = value
    return kept


def _fault(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    given = detail.get("input")
    if detail["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(path.split(".")[-1], _known_keys(detail["loc"][:-1]), n=1)
        return f"unknown key '{path}'" + (f" (did you mean '{nearest[0]}'?)" if nearest else "")
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{path}: {message}" if path else message
    wanted = detail["msg"][0].lower() + detail["msg"][1:]
    shown = f"; got {given!r}" if not isinstance(given, (dict, BaseModel)) else "; got a section"
    return f"{path}: {wanted}{shown}"


def _known_keys(location: Sequence[int | str]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
