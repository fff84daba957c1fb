"""Spaces as YAML (docs/sweeps.md): read, typed, and every fault in one message."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from eat_dist.config import RunConfig, read_yaml
from eat_dist.config.base import Number
from eat_dist.errors import ConfigError
from eat_dist.spaces.space import Choice, Domain, Integer, Parameter, Space, Uniform

_KINDS = ("uniform", "log_uniform", "integer", "choice", "grid")
_NUMBER: TypeAdapter[float] = TypeAdapter(Number)

# Where trials of one sweep must agree, because their figures are compared: what is measured, on which images, how.
_FIXED_SECTIONS = ("evaluation", "cluster", "tracking", "checkpoint")
_FIXED_KEYS = {
    "name": "the sweep names its trials",
    "seed": "the luckiest seed is no setting; give the sweep another --seed",
    "attack.norm": "an attack of another norm is no comparison",
    "train.epochs": "trials are compared epoch by epoch",
    **dict.fromkeys(
        (
            "data.dataset",
            "data.root",
            "data.test_root",
            "data.shards",
            "data.subset",
            "data.on_bad_image",
            "data.train_share",
            "data.class_seed",
            "data.validation_share",
            "data.validation_seed",
        ),
        "all trials are measured on the same images",
    ),
}


def load_space(path: str | Path) -> Space:
    """Read a space from a YAML file.

    Raises:
        ConfigError: It is missing, no YAML, or not a space; every fault in one message.
    """
    return parse_space(read_yaml(path, "space")[1], name=Path(path).stem, source=str(path))


def parse_space(values: Any, *, name: str, source: str) -> Space:
    """Check a mapping of config keys to entries; which values a key may take is up to :func:`check_space`.

    Raises:
        ConfigError: One message with every fault.
    """
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            f"{source}: expected config keys with their values, e.g. 'attack.epsilon: {{uniform: [2/255, 8/255]}}'; "
            f"got {'nothing' if not values else type(values).__name__}"
        )
    faults: list[str] = []
    parameters: list[Parameter] = []
    for key, entry in values.items():
        if fault := _fault_of_key(str(key)):
            faults.append(fault)
            continue
        try:
            parameters.append(_parameter(str(key), entry, before=parameters))
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(f"{source}: " + "; ".join(faults))
    return Space(name, tuple(parameters), {str(key): entry for key, entry in values.items()})


def _fault_of_key(key: str) -> str | None:
    section = key.split(".", 1)[0]
    if key in _FIXED_KEYS:
        return f"'{key}' cannot be varied: {_FIXED_KEYS[key]}"
    if section in _FIXED_SECTIONS:
        return f"'{key}' cannot be varied: all trials of a sweep share the section '{section}'"
    known = list(_known_keys(RunConfig))
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return f"unknown key '{key}'" + (f" (did you mean '{nearest[0]}'?)" if nearest else "")
    return None


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _parameter(key: str, entry: Any, *, before: list[Parameter]) -> Parameter:
    if not isinstance(entry, dict):
        raise ConfigError(f"{key}: expected one of {', '.join(_KINDS)}, e.g. '{{choice: [a, b]}}'; got {entry!r}")
    unknown = [str(name) for name in entry if name not in (*_KINDS, "when")]
    kinds = [name for name in _KINDS if name in entry]
    if unknown or len(kinds) != 1:
        what = f"unknown {', '.join(unknown)}" if unknown else f"got {', '.join(kinds) or 'none'}"
        raise ConfigError(f"{key}: expected exactly one of {', '.join(_KINDS)}, and perhaps 'when'; {what}")
    domain = _domain(key, kinds[0], entry[kinds[0]])
    return Parameter(key, domain, _when(key, entry.get("when"), before=before))


def _domain(key: str, kind: str, values: Any) -> Domain:
    if kind in ("choice", "grid"):
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{key}: {kind} takes a list of one or more values; got {values!r}")
        if any(first == second for first, second in itertools.combinations(values, 2)):
            raise ConfigError(f"{key}: {kind} lists a value twice: {values!r}")
        return Choice(tuple(values))
    if not isinstance(values, list) or len(values) != 2:
        raise ConfigError(f"{key}: {kind} takes [low, high]; got {values!r}")
    if kind == "integer":
        if any(type(value) is not int for value in values):
            raise ConfigError(f"{key}: integer takes whole numbers; got {values!r}")
        domain: Domain = Integer(*values)
    else:
        domain = Uniform(_number(key, values[0]), _number(key, values[1]), log=kind == "log_uniform")
    assert not isinstance(domain, Choice)
    if domain.low >= domain.high:
        raise ConfigError(f"{key}: {kind} needs low below high; got {values!r}")
    if isinstance(domain, Uniform) and domain.log and domain.low <= 0:
        raise ConfigError(f"{key}: log_uniform needs numbers above 0; got {values!r}")
    return domain


def _number(key: str, value: Any) -> float:
    try:
        return _NUMBER.validate_python(value, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{key}: expected a number such as 0.1, 8/255 or 1e-3; got {value!r}") from error


def _when(key: str, when: Any, *, before: list[Parameter]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if when is None:
        return ()
    if not isinstance(when, Mapping) or not when:
        raise ConfigError(f"{key}: when takes keys above it with their values, e.g. {{defense.transfer_rule: relay}}")
    conditions = []
    for other, value in when.items():
        values = tuple(value) if isinstance(value, list) else (value,)
        parent = next((parameter for parameter in before if parameter.key == other), None)
        if parent is None:
            raise ConfigError(f"{key}: when names '{other}', which is not a (valid) key above it in the space")
        if not isinstance(parent.domain, Choice):
            raise ConfigError(f"{key}: when names '{other}', which is no choice")
        missing = [one for one in values if one not in parent.domain.values]
        if missing:
            raise ConfigError(
                f"{key}: when expects '{other}' to be {missing[0]!r}, which it never is; its values: "
                f"{', '.join(map(repr, parent.domain.values))}"
            )
        conditions.append((str(other), values))
    return tuple(conditions)
