"""What every section of a run is made of: strictness, and how numbers are read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """Understand ``8/255`` and YAML's ``1e-3`` (a string to YAML 1.1) as numbers."""
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            number = float(numerator) / float(denominator) if slash else float(value)
        except (ValueError, ZeroDivisionError):
            return value
        return number
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PerChannel = Annotated[
    tuple[Number, ...],
    BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else (value,)),
    Field(strict=False, min_length=1),
]


class Section(BaseModel):
    """A section: unknown keys are errors, values have their type, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
