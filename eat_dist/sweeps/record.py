"""What became of each trial: ``trials.json``, a list of plain JSON objects, rewritten whole after every event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from eat_dist.errors import StorageError
from eat_dist.spaces import Settings
from eat_dist.storage import Folder
from eat_dist.sweeps.objectives import front

Status = Literal["RUNNING", "FINISHED", "PRUNED", "FAILED", "INTERRUPTED"]
TRIALS = "trials.json"


@dataclass
class Trial:
    """One trial.

    Attributes:
        id: Its folder's name.
        number: From 0, in the order in which settings were chosen.
        status: FINISHED: trained to the last epoch; PRUNED: stopped at a rung.
        run_folder: Relative to the sweep's.
        settings: Config key → value, the parameters that exist.
        results: ``epoch``, ``objectives`` and ``figures`` of each rung reached.
        seconds: Wall clock, all its parts.
        error: One line, of a failed one.
        mlflow_run_id: Of the child run.
    """

    id: str
    number: int
    status: Status
    run_folder: str
    settings: Settings
    results: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    mlflow_run_id: str | None = None

    @property
    def epoch(self) -> int:
        """Epochs that it was measured after."""
        return self.results[-1]["epoch"] if self.results else 0

    @property
    def objectives(self) -> dict[str, float]:
        """The last ones; empty before the first."""
        return dict(self.results[-1]["objectives"]) if self.results else {}

    @property
    def unfinished(self) -> bool:
        """Whether a resumed sweep goes on with it."""
        return self.status in ("RUNNING", "INTERRUPTED")


def write_trials(folder: Folder, trials: Sequence[Trial]) -> None:
    """Write ``trials.json``."""
    folder.write_json(TRIALS, [asdict(trial) for trial in trials])


def read_trials(folder: Folder) -> list[Trial]:
    """Read ``trials.json``; none where it is not there.

    Raises:
        StorageError: It is damaged.
    """
    if not folder.exists(TRIALS):
        return []
    known = {entry.name for entry in fields(Trial)}
    try:
        return [
            Trial(**{name: value for name, value in entry.items() if name in known})
            for entry in folder.read_json(TRIALS)
        ]
    except (TypeError, AttributeError) as error:
        raise StorageError(f"'{folder}/{TRIALS}' is damaged: {error}") from error


def ranked(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Best first: finished ones by the first objective, then the others by how far they came and how good they were."""

    def key(trial: Trial) -> tuple[Any, ...]:
        value = trial.objectives.get(objectives[0], 0.0)
        return (trial.status != "FINISHED", trial.status == "FAILED", -trial.epoch, -value, trial.number)

    return sorted(trials, key=key)


def winners(trials: Sequence[Trial], objectives: Sequence[str]) -> tuple[str | None, list[str]]:
    """The best finished trial (None: none finished, or two objectives) and the Pareto front (empty: one objective)."""
    finished = {
        trial.id: [trial.objectives[name] for name in objectives] for trial in trials if trial.status == "FINISHED"
    }
    if len(objectives) > 1:
        return None, front(finished)
    return max(finished, key=lambda name: finished[name][0], default=None), []


def objective_history(trials: Sequence[Trial], objective: str) -> list[tuple[str, int, float]]:
    """(trial, epoch, value) of all reports, trial by trial."""
    return [(trial.id, entry["epoch"], entry["objectives"][objective]) for trial in trials for entry in trial.results]


def result_of(epoch: int, objectives: Mapping[str, float], figures: Mapping[str, float]) -> dict[str, Any]:
    """An entry of ``results``."""
    return {"epoch": epoch, "objectives": dict(objectives), "figures": dict(figures)}
