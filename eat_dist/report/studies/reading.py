"""A study folder, read for its tables: ``study.json``, schema 1. Figures are shares in [0, 1]."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from eat_dist.errors import StorageError
from eat_dist.report.record import LENIENT, Figure, valid
from eat_dist.storage import Folder

SCHEMA = 1
STUDY_FILE = "study.json"
Status = Literal["WAITING", "RUNNING", "FINISHED", "FAILED", "INTERRUPTED"]


class _Part(BaseModel):
    model_config = LENIENT


class Run(_Part):
    """One run; ``passes`` and ``training_seconds`` are of all its members and of all its parts."""

    name: str
    row: str
    dataset: str
    seed: int
    status: Status
    run_folder: str = ""
    members: int
    epochs: int
    seconds: Figure = None
    error: str | None = None
    figures: dict[str, Figure] | None = None
    measured: dict[str, str] | None = None
    failed_checks: list[str] | None = None
    withstands_nothing: bool = False
    passes: Figure = None
    training_seconds: Figure = None


class Study(_Part):
    """What was asked for, and what became of each run."""

    schema_: Literal[1] = Field(alias="schema")
    name: str
    datasets: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    rows: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    seeds: list[int]
    budget_row: str | None = None
    command: Any = None
    git: Any = None
    started: Any = None
    seconds: Figure = None
    runs: Annotated[list[Run], Field(min_length=1)]

    def with_status(self, *statuses: Status) -> list[Run]:
        """The runs that ended so, in order."""
        return [run for run in self.runs if run.status in statuses]


def is_study(folder: Folder) -> bool:
    """Whether a folder is that of a study, be it complete or not."""
    return folder.exists(STUDY_FILE)


def read_study(folder: Folder) -> Study:
    """Read a study folder.

    Raises:
        StorageError: The file is missing, damaged, of another schema, or contradicts itself.
    """
    content = folder.read_json(STUDY_FILE)
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise StorageError(f"'{folder}/{STUDY_FILE}': expected schema {SCHEMA}; got {version}")
    study = valid(f"'{folder}/{STUDY_FILE}' is not a study", lambda: Study.model_validate(content))
    twice = [name for name, times in Counter(run.name for run in study.runs).items() if times > 1]
    strange = [run.name for run in study.runs if run.row not in study.rows or run.dataset not in study.datasets]
    if twice or strange:
        why = f"two runs are called '{twice[0]}'" if twice else f"'{strange[0]}' is of no row or dataset of the study"
        raise StorageError(f"'{folder}/{STUDY_FILE}' is damaged: {why}")
    return study
