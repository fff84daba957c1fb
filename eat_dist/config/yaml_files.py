"""YAML that users write: read safely, and never with a key that silently replaces another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eat_dist.errors import ConfigError


class _OneOfEachKey(yaml.SafeLoader):
    """YAML demands that a mapping's keys differ; PyYAML takes the last of equal ones without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | bytes, source: str) -> Any:
    """The content of a YAML document.

    Args:
        text: The document.
        source: What it is, as the beginning of an error's sentence.

    Raises:
        ConfigError: It is not YAML, a mapping that gives a key twice included.
    """
    try:
        return yaml.load(text, Loader=_OneOfEachKey)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # 2024-02-30 is a date to YAML, and none to Python
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path, kind: str) -> tuple[str, Any]:
    """A YAML file's text and content.

    Args:
        path: The file.
        kind: What it should be: ``config``, ``study``, ``space``.

    Raises:
        ConfigError: It cannot be read, or is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the {kind} '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not YAML: {error}") from error
    return text, parse_yaml(text, f"'{path}'")
