"""What is found out before a study writes anything: data, budget, and whether earlier results are of this study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eat_dist.config import RunConfig
from eat_dist.console import Console
from eat_dist.data.images import ZeroShotData
from eat_dist.errors import CheckpointError, EatError
from eat_dist.report.studies.wording import NEAR_ENOUGH
from eat_dist.runs.checks import check_model, check_same_data, load_data, splits_of
from eat_dist.runs.resubmitted import differences, differing_keys
from eat_dist.runs.saved import config_of
from eat_dist.schedule import Schedule
from eat_dist.storage import Folder
from eat_dist.studies.budget import equal_passes
from eat_dist.studies.plan import StudyRun, kinds
from eat_dist.studies.reading import Study

Loaded = Mapping[str, tuple[RunConfig, ZeroShotData]]
"""Dataset → a config of it that names its shards, and the images."""

_MOST_SHOWN = 3


def load_all(runs: Sequence[StudyRun], console: Console) -> Loaded:
    """Each dataset once, and whether every row fits it.

    Raises:
        EatError: A dataset is missing or damaged, or a row's splits or weights do not go with it.
    """
    found: dict[str, tuple[RunConfig, ZeroShotData]] = {}
    for (dataset, row), run in kinds(runs).items():
        if dataset not in found:
            found[dataset] = load_data(run.config, console)
        _, data = found[dataset]
        try:
            splits_of(run.config, data)
            check_model(run.config, data)
        except EatError as error:
            raise type(error)(f"row '{row}' on {dataset}: {error}") from error
    return found


def with_equal_passes(runs: Sequence[StudyRun], data: Loaded, study: Study, console: Console) -> list[StudyRun]:
    """The runs with the epochs that the study's budget gives them; what whole epochs miss by much is said."""
    assert study.budget_row is not None

    def iterations_per_epoch(run: StudyRun) -> int:
        return Schedule.of(run.config, splits_of(run.config, data[run.dataset][1])).iterations_per_epoch

    allotted = equal_passes(
        runs,
        reference=study.budget_row,
        own_epochs={row for row, settings in study.rows.items() if "train.epochs" in settings},
        iterations_per_epoch=iterations_per_epoch,
    )
    for (dataset, row), got in allotted.items():
        if abs(got.share - 1) > NEAR_ENOUGH:
            console.warn(
                f"row '{row}' on {dataset} takes {got.share:.2f} × the passes of '{study.budget_row}' with its "
                f"{got.epochs} epochs"
            )
    return [run.with_epochs(allotted[run.kind].epochs) for run in runs]


def check_earlier(folder: Folder, runs: Sequence[StudyRun], data: Loaded) -> None:
    """Results that are there must be of the same configs and images.

    Raises:
        CheckpointError: They are not; with the runs and keys that differ.
    """
    faults = []
    for run in runs:
        here = folder.child(run.folder)
        finished = here.exists("summary.json")
        if not here.exists("config.yaml") or not (finished or here.exists("checkpoints")):
            continue  # nothing is lost with it
        saved = config_of(here)
        unlike = differences(saved, run.config)
        if finished:
            unlike += [f"evaluation.{text}" for text in differing_keys(saved.measured, run.config.measured)]
        if unlike:
            faults.append(f"{run.name}: {', '.join(unlike)}")
        elif here.exists("run.json"):
            check_same_data(here, data[run.dataset][1])
    if faults:
        more = f"; and {len(faults) - _MOST_SHOWN} more" if len(faults) > _MOST_SHOWN else ""
        raise CheckpointError(
            f"the study has changed since '{folder}' was begun: {'; '.join(faults[:_MOST_SHOWN])}{more}. Rows, "
            f"datasets and seeds may be added; else give another --study-dir, or delete the folders of these runs"
        )
