"""The same command given again, after a crash or by a scheduler: it goes on where the run stands."""

from __future__ import annotations

from pydantic import BaseModel

from eat_dist.checkpoint import Checkpoints, deciding
from eat_dist.config import RunConfig, dump_config, flat
from eat_dist.console import Console
from eat_dist.errors import CheckpointError
from eat_dist.runs.checks import check_free, check_names, with_absolute_paths
from eat_dist.runs.lease import check_not_held, holding
from eat_dist.runs.run import Finished
from eat_dist.runs.saved import config_of
from eat_dist.runs.starting import resume_in, start_in
from eat_dist.runs.summary import summary_of
from eat_dist.storage import Folder


def resume_or_start(config: RunConfig, *, run_dir: str, console: Console, parent_run_id: str | None = None) -> Finished:
    """Bring a run to its end, whatever an earlier attempt in its folder came to.

    ========================================  ==========================================================
    what is in the folder                     what happens
    ========================================  ==========================================================
    nothing                                   the run starts
    a run without a completed checkpoint      it is deleted, and the run starts
    a run with one, of the same config        it goes on from there, with the given config
    a finished run of the same config         nothing: what came out is reported
    a run with another config                 an error that names the differing keys
    ========================================  ==========================================================

    Configs are the same when nothing differs that decides the weights (docs/configuration.md, "What may change").
    ``parent_run_id`` is as in :func:`eat_dist.runs.starting.start_run`.

    Raises:
        CheckpointError: The configs differ, or there are checkpoints but none is usable.
        StorageError: Somebody else works on that folder, or it holds something that is no run.
        EatError: Anything else the user can mend.
    """
    check_names(config)
    folder = Folder.at(run_dir)
    check_not_held(folder)
    check_free(folder, overwrite=True)
    with holding(folder):
        check_free(folder, overwrite=True)
        return _go_on(folder, with_absolute_paths(config), console, parent_run_id)


def _go_on(folder: Folder, config: RunConfig, console: Console, parent_run_id: str | None) -> Finished:
    if not folder.exists("config.yaml"):
        return start_in(folder, config, overwrite=False, console=console, parent_run_id=parent_run_id)
    saved = config_of(folder)
    checkpoints = Checkpoints(folder.child("checkpoints"), saved)
    if not folder.exists("summary.json") and checkpoints.newest() is None:
        console.say("An earlier attempt ended before its first checkpoint; starting again.")
        return start_in(folder, config, overwrite=True, console=console, parent_run_id=parent_run_id)
    differing = differences(saved, config)
    if differing:
        raise CheckpointError(
            f"'{folder}' holds a run with another configuration: {'; '.join(differing)}. Give the configuration it "
            f"was started with, another --run-dir, or --overwrite in place of --resume-or-start"
        )
    if folder.exists("summary.json"):
        return _finished(folder, saved, config, console)
    folder.write("config.yaml", dump_config(config).encode())  # what may change is taken from the new command
    return resume_in(folder, config, console=console, parent_run_id=parent_run_id)


def _finished(folder: Folder, saved: RunConfig, config: RunConfig, console: Console) -> Finished:
    console.say(f"'{folder}' is finished; nothing is left to do.")
    if saved.measured != config.measured:
        console.warn(f"its evaluation had other settings; measure anew with: eat-dist evaluate {folder}")
    summary = summary_of(folder)
    return Finished(folder, summary, None, summary["mlflow_run_id"])


def differences(saved: RunConfig, given: RunConfig) -> list[str]:
    """Keys that decide the weights and differ: ``attack.epsilon is 0.2 there and 0.1 here``."""
    return differing_keys(deciding(saved), deciding(given))


def differing_keys(there: BaseModel, here: BaseModel) -> list[str]:
    """Keys in which two configs, or two sections of one kind, differ, in words."""
    before = dict(flat(there.model_dump(mode="json")))
    return [
        f"{key} is {before[key]} there and {value} here"
        for key, value in flat(here.model_dump(mode="json"))
        if before[key] != value
    ]
