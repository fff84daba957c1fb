"""What the records of sweeps and studies share when they are read: leniency, and one line where it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, ValidationError

from eat_dist.errors import StorageError

_Read = TypeVar("_Read")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(_finite)]
"""A number; one that is not finite counts as not measured."""


LENIENT = ConfigDict(extra="ignore", frozen=True)
"""Of a JSON object: unknown keys are ignored."""


def valid(what: str, read: Callable[[], _Read]) -> _Read:
    """What ``read`` returns.

    Args:
        what: The beginning of the error: which file is not what.
        read: Validates.

    Raises:
        StorageError: It is not valid; with the first place and why.
    """
    try:
        return read()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise StorageError(f"{what}: {where}: {first['msg']}") from error
