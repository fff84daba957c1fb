"""What became of each run: ``study.json``, rewritten whole after every event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from eat_dist.config import RunConfig
from eat_dist.errors import StorageError
from eat_dist.evaluation.measured import evaluation_of, failed_checks, measurement
from eat_dist.evaluation.running import SCHEMA as EVALUATION_SCHEMA
from eat_dist.history import read_history
from eat_dist.runs.evaluation import evaluation_folder
from eat_dist.runs.summary import figures_of, summary_of, withstands_nothing
from eat_dist.storage import Folder
from eat_dist.studies.plan import StudyRun

SCHEMA = 1
STATE = "study.json"
Status = Literal["WAITING", "RUNNING", "FINISHED", "FAILED", "INTERRUPTED"]


@dataclass
class Record:
    """One run.

    Attributes:
        name: Of its folder.
        row: Label.
        dataset: Label.
        seed: Of the run.
        status: What became of it.
        run_folder: Relative to the study's.
        members: M.
        epochs: Of the whole run.
        seconds: Wall clock of all its parts, evaluation and what was lost included.
        error: One line, of a failed one.
        mlflow_run_id: Of the child run.
        figures: :data:`eat_dist.runs.summary.FIGURES`; None before it is finished, as all that follows.
        measured: What they were measured with.
        failed_checks: Names of the sanity checks that failed; None where the protocol has none.
        withstands_nothing: The training attack misplaced images to the end as often as chance would.
        passes: Forward-backward passes over a batch, over all members, as counted.
        training_seconds: Time of the iterations that made the weights.
    """

    name: str
    row: str
    dataset: str
    seed: int
    status: Status
    run_folder: str
    members: int
    epochs: int
    seconds: float = 0.0
    error: str | None = None
    mlflow_run_id: str | None = None
    figures: dict[str, float] | None = None
    measured: dict[str, str] | None = None
    failed_checks: list[str] | None = None
    withstands_nothing: bool = False
    passes: float | None = None
    training_seconds: float | None = None

    @classmethod
    def of(cls, run: StudyRun) -> Record:
        """A run that has not begun."""
        config = run.config
        return cls(
            name=run.name,
            row=run.row,
            dataset=run.dataset,
            seed=run.seed,
            status="WAITING",
            run_folder=run.folder,
            members=config.ensemble.members,
            epochs=config.train.epochs,
        )

    def finish(self, folder: Folder, config: RunConfig) -> None:
        """Take what came out from the run's folder.

        Raises:
            StorageError: Its summary, or the evaluation of the study's protocol, is not there, or that is of an older
                form, whose figures mean something else.
        """
        summary = summary_of(folder)
        # The run's own summary is of the protocol evaluated last, which may have been another since.
        evaluated = evaluation_folder(folder, config)
        results = evaluated.read_json("summary.json")
        version = results.get("schema") if isinstance(results, dict) else None
        if version != EVALUATION_SCHEMA:
            there = f"'{evaluated.child('summary.json')}' is of schema {version}"
            raise StorageError(f"{there}, and this eat_dist measures schema {EVALUATION_SCHEMA}")
        self.figures = figures_of(results["ensemble"])
        self.measured = measurement(evaluation_of(results), results["ensemble"]["attacked"], seed=summary["seed"])
        self.failed_checks = failed_checks(results)
        self.withstands_nothing = withstands_nothing(summary)
        self.passes = round(summary["passes"] * summary["members_trained"], 3)
        self.training_seconds = _seconds_of_iterations(folder)
        self.mlflow_run_id = summary["mlflow_run_id"]
        self.status, self.error = "FINISHED", None


def earlier_records(folder: Folder) -> dict[str, Record]:
    """What an earlier call wrote, by the runs' names; nothing where there is none.

    Raises:
        StorageError: It is damaged, or of another version.
    """
    if not folder.exists(STATE):
        return {}
    content = read_state(folder)
    known = {entry.name for entry in fields(Record)}
    try:
        listed = [Record(**{name: value for name, value in run.items() if name in known}) for run in content["runs"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"'{folder}/{STATE}' is damaged: {error!r} is missing or of the wrong kind") from error
    return {record.name: record for record in listed}


def read_state(folder: Folder) -> dict[str, Any]:
    """``study.json``.

    Raises:
        StorageError: It is not there, damaged, or of another version.
    """
    content = folder.read_json(STATE)
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise StorageError(f"'{folder}/{STATE}': expected schema {SCHEMA}; got {version}")
    assert isinstance(content, dict)
    return content


def write_state(folder: Folder, about: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write ``study.json``."""
    folder.write_json(STATE, {"schema": SCHEMA, **about, "runs": [asdict(record) for record in records]})


def _seconds_of_iterations(folder: Folder) -> float | None:
    """Wall clock of member 0's iterations, resumed parts included, each once; None where none is on record.

    The times on record are each of the iteration before, so one is missing, and one more for each resumption: those
    count as the mean of the others.
    """
    history = read_history(folder.child("statistics"))
    times = [
        milliseconds
        for member, milliseconds in zip(history["member"].to_pylist(), history["iteration_ms"].to_pylist(), strict=True)
        if member == 0
    ]
    known = [time for time in times if time > 0]
    return round(sum(known) / 1000 * len(times) / len(known), 3) if known else None
