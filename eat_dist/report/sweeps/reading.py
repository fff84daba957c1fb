"""A sweep folder, read for the report: ``sweep.json`` and ``trials.json``, schema 1.

Figures and objectives are shares in [0, 1], of the validation classes. A figure that is not finite counts as not
measured: one diverged trial must not hide the others. Unknown keys are ignored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from eat_dist.errors import StorageError
from eat_dist.report.record import LENIENT, Figure, valid
from eat_dist.report.sweeps.space import Parameter, read_space
from eat_dist.storage import Folder

SCHEMA = 1
SWEEP_FILE, TRIALS_FILE, READY_FILE = "sweep.json", "trials.json", "best.yaml"
Status = Literal["FINISHED", "PRUNED", "FAILED", "RUNNING", "INTERRUPTED"]


class _Part(BaseModel):
    model_config = LENIENT


class Objective(_Part):
    """What the sweep makes large (``max``) or small (``min``)."""

    name: str
    direction: Literal["max", "min"]


class Result(_Part):
    """What a trial had reached after an epoch (a count: the first epoch is 1)."""

    epoch: int
    objectives: dict[str, Figure]
    figures: dict[str, Figure] = {}


class Trial(_Part):
    """One trial. A conditional setting that does not apply is not in ``settings``."""

    id: str
    number: int
    status: Status
    run_folder: str = ""
    settings: dict[str, Any] = {}
    results: tuple[Result, ...] = ()
    seconds: Figure = None
    error: str | None = None


class About(_Part):
    """What was asked for. ``best`` and ``pareto`` are the sweep's own word; the report looks for itself."""

    schema_: Literal[1] = Field(alias="schema")
    name: str
    base_config: dict[str, Any] = {}
    space: dict[str, dict[str, Any]]
    search: str = ""
    scheduler: str = ""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1, max_length=2)]
    trials_requested: int | None = None
    concurrent: Any = None
    seed: int = 0
    validation_share: Figure = None
    evaluation_epsilon: Figure = None
    command: Any = None
    git: Any = None
    started: Any = None
    seconds: Figure = None
    best: str | None = None
    pareto: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was found.

    Attributes:
        about: What was asked for.
        parameters: The space, in the order given.
        trials: By number; at least one.
        ready: Name of the config of the best trial, for all training classes, in the folder; empty if it is not there.
    """

    about: About
    parameters: tuple[Parameter, ...]
    trials: tuple[Trial, ...]
    ready: str = ""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """One, or two in the mode that looks for a front."""
        return self.about.objectives

    def with_status(self, *statuses: Status) -> list[Trial]:
        """The trials that ended so, by number."""
        return [trial for trial in self.trials if trial.status in statuses]


def is_sweep(folder: Folder) -> bool:
    """Whether a folder is that of a sweep, be it complete or not."""
    return folder.exists(SWEEP_FILE) or folder.exists(TRIALS_FILE)


def read_sweep(folder: Folder) -> Sweep:
    """Read a sweep folder.

    Raises:
        StorageError: A file is missing, damaged, of another schema, or contradicts the other.
    """
    for name in (SWEEP_FILE, TRIALS_FILE):
        if not folder.exists(name):
            raise StorageError(
                f"'{folder}' is no whole sweep folder: it lacks {name}; start the sweep again with the same command"
            )
    content = folder.read_json(SWEEP_FILE)
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise StorageError(f"'{folder}/{SWEEP_FILE}': expected schema {SCHEMA}; got {version}")
    about = valid(f"'{folder}/{SWEEP_FILE}' is not a sweep", lambda: About.model_validate(content))
    listed = TypeAdapter(list[Trial])
    rows = folder.read_json(TRIALS_FILE)
    trials = valid(f"'{folder}/{TRIALS_FILE}' is no list of trials", lambda: listed.validate_python(rows))
    if not trials:
        raise StorageError(f"'{folder}' has no trials yet; report it once the first has begun")
    for what, values in (("id", [trial.id for trial in trials]), ("number", [trial.number for trial in trials])):
        twice = [value for value, times in Counter(values).items() if times > 1]
        if twice:
            raise StorageError(f"'{folder}/{TRIALS_FILE}' is damaged: two trials have the {what} {twice[0]}")
    strange = [(trial, key) for trial in trials for key in trial.settings if key not in about.space]
    if strange:
        trial, key = strange[0]
        raise StorageError(f"'{folder}/{TRIALS_FILE}': trial {trial.number} sets {key}, which {SWEEP_FILE} lacks")
    ordered = tuple(sorted(trials, key=lambda trial: trial.number))
    try:
        parameters = read_space(about.space, [trial.settings for trial in ordered])
    except ValueError as error:
        raise StorageError(f"'{folder}/{SWEEP_FILE}': {error}") from error
    return Sweep(about, parameters, ordered, READY_FILE if folder.exists(READY_FILE) else "")
