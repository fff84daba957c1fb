"""What every section of a run is made of: strictness, and how numbers are read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from eat_dist.credentials import holds_credentials


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


def _without_credentials(uri: str) -> str:
    if holds_credentials(uri):
        raise ValueError(
            "the URI holds credentials, which would be printed and stored with the run. Of a server give them by "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; a database's URI by "
            "MLFLOW_TRACKING_URI in place of this key"
        )
    return uri


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PerChannel = Annotated[
    tuple[Number, ...],
    BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else (value,)),
    Field(strict=False, min_length=1),
]
StoreUri = Annotated[str, AfterValidator(_without_credentials)]


class Section(BaseModel):
    """A section: unknown keys are errors, values have their type, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
