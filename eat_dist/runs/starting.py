"""A run begins, or goes on from a checkpoint: what is checked and written before it trains."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pyarrow.parquet as pq

from eat_dist.checkpoint import Checkpoints
from eat_dist.config import RunConfig, dump_config
from eat_dist.console import Console
from eat_dist.data.images import ZeroShotData
from eat_dist.data.splits import Splits, to_table
from eat_dist.errors import CheckpointError
from eat_dist.runs.checks import (
    check_cluster,
    check_free,
    check_model,
    check_names,
    check_same_data,
    clear,
    load_data,
    splits_of,
    with_absolute_paths,
)
from eat_dist.runs.defended import check_pool
from eat_dist.runs.lease import check_not_held, holding
from eat_dist.runs.run import Finished, Run
from eat_dist.runs.saved import config_of
from eat_dist.storage import Folder


def start_run(
    config: RunConfig, *, run_dir: str | None, overwrite: bool, console: Console, parent_run_id: str | None = None
) -> Finished:
    """Train, evaluate and record a new run.

    No file but the folder's lease is written before config, data and cluster have been found good.

    Args:
        config: The run.
        run_dir: Path or URL; default ``runs/NAME-TIME``.
        overwrite: Delete an earlier run in that folder first.
        console: Where progress goes.
        parent_run_id: The MLflow run of the sweep or study that this is a trial of. A trial is not registered.

    Raises:
        StorageError: Somebody else works on that folder (:mod:`eat_dist.runs.lease`).
        EatError: Anything else the user can mend; one line.
    """
    check_names(config)
    now = datetime.datetime.now().astimezone()
    folder = Folder.at(run_dir or f"runs/{config.name}-{now:%Y%m%d-%H%M%S}")
    check_not_held(folder)
    check_free(folder, overwrite=overwrite)
    with holding(folder):
        return start_in(folder, config, overwrite=overwrite, console=console, parent_run_id=parent_run_id)


def start_in(
    folder: Folder, config: RunConfig, *, overwrite: bool, console: Console, parent_run_id: str | None = None
) -> Finished:
    """:func:`start_run` in a folder that this process holds."""
    check_free(folder, overwrite=overwrite)
    config = with_absolute_paths(config)
    placed, data = load_data(config, console)
    check_model(config, data)
    splits = splits_of(config, data)
    check_cluster(config)
    if overwrite:
        clear(folder)
    write_first_files(folder, config, data, splits)
    run = Run(placed, folder, data=data, splits=splits, console=console, parent_run_id=parent_run_id)
    return run.go(None, resumed=False)


def resume_run(run_dir: str, *, console: Console, parent_run_id: str | None = None) -> Finished:
    """Continue a run from its newest good checkpoint, with the config saved in its folder.

    ``parent_run_id`` is as in :func:`start_run`.

    Raises:
        CheckpointError: There is no usable checkpoint.
        StorageError: Somebody else works on that folder.
        EatError: Anything else the user can mend.
    """
    folder = Folder.at(run_dir)
    config_of(folder)
    check_not_held(folder)
    with holding(folder):
        return resume_in(folder, config_of(folder), console=console, parent_run_id=parent_run_id)


def resume_in(folder: Folder, config: RunConfig, *, console: Console, parent_run_id: str | None = None) -> Finished:
    """:func:`resume_run` in a folder that this process holds."""
    found = Checkpoints(folder.child("checkpoints"), config).newest()
    if found is None:
        raise CheckpointError(
            f"'{folder}' has no checkpoint to resume from; start the run again with --overwrite "
            f"--run-dir {folder.argument}"
        )
    folder.create()  # which it is; but whether it can still be written, nobody should learn after an epoch
    for line in found.passed_over:
        console.warn(line)
    console.say(f"Resuming from iteration {found.iteration}.")
    placed, data = load_data(config, console)
    check_same_data(folder, data)
    check_pool(config, data.train)
    splits = splits_of(config, data)
    check_cluster(config)
    run = Run(placed, folder, data=data, splits=splits, console=console, parent_run_id=parent_run_id)
    # A checkpoint knows what was known when the members started; MLflow may have answered later.
    return run.go(found.mlflow_run_id or folder.read_json("run.json").get("mlflow_run_id"), resumed=True)


def write_first_files(folder: Folder, config: RunConfig, data: ZeroShotData, splits: Splits) -> None:
    """``config.yaml`` and ``splits.parquet``."""
    folder.create()
    folder.write("config.yaml", dump_config(config).encode())
    table = pa.BufferOutputStream()
    pq.write_table(to_table(splits, data.train.names), table)
    folder.write("splits.parquet", table.getvalue().to_pybytes())
