"""One run from its config to its summary: folder, data, tracking, training, evaluation."""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load as load_safetensors

from eat_dist import __version__
from eat_dist.checkpoint import Checkpoints
from eat_dist.config import RunConfig, dump_config
from eat_dist.console import Console
from eat_dist.data.images import ZeroShotData
from eat_dist.data.splits import Splits, to_table
from eat_dist.errors import CheckpointError
from eat_dist.in_process import train_in_process
from eat_dist.member import MemberResult
from eat_dist.models.ensemble import EnsembleSpec, member_file, save_spec, weights_digest
from eat_dist.provenance import git_state
from eat_dist.report.figures import figure_png, transfer_matrix_figure
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.runs.checks import (
    check_cluster,
    check_free,
    check_names,
    check_same_data,
    check_weights,
    clear,
    digests,
    load_data,
    splits_of,
    with_absolute_paths,
)
from eat_dist.runs.defended import drawn_pool
from eat_dist.runs.evaluation import Subject, evaluate_subject, evaluation_folder
from eat_dist.runs.lease import check_not_held, holding
from eat_dist.runs.saved import config_of
from eat_dist.runs.summary import flat_figures, step_metrics, summary_of_training, summary_with
from eat_dist.runs.tracked import EpochMeans, dataset_record, log_figures, run_tags, version_tags
from eat_dist.schedule import Schedule
from eat_dist.storage import Folder
from eat_dist.tracking import Status, Tracker

# Iterations whose numbers go to MLflow, at most; the run folder has all of them.
_TRACKED_ITERATIONS = 1000

# Difference of the members' shares of time spent waiting from which on the slowest is named.
_UNEQUAL = 0.2


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        folder: Where everything is.
        summary: The content of ``summary.json``.
        tracking_uri: MLflow's store, None where tracking is off.
        mlflow_run_id: None where MLflow never answered.
        mlflow_missing: Records that MLflow does not have.
        registered: ``models:/NAME/VERSION``, None where nothing was registered.
    """

    folder: Folder
    summary: dict[str, Any]
    tracking_uri: str | None
    mlflow_run_id: str | None
    mlflow_missing: int = 0
    registered: str | None = None


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
    check_weights(config, data)
    splits = splits_of(config, data)
    check_cluster(config)
    if overwrite:
        clear(folder)
    write_first_files(folder, config, data, splits)
    run = _Run(placed, folder, data=data, splits=splits, console=console, parent_run_id=parent_run_id)
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
    splits = splits_of(config, data)
    check_cluster(config)
    run = _Run(placed, folder, data=data, splits=splits, console=console, parent_run_id=parent_run_id)
    return run.go(found.mlflow_run_id, resumed=True)


def write_first_files(folder: Folder, config: RunConfig, data: ZeroShotData, splits: Splits) -> None:
    """``config.yaml`` and ``splits.parquet``."""
    folder.create()
    folder.write("config.yaml", dump_config(config).encode())
    table = pa.BufferOutputStream()
    pq.write_table(to_table(splits, data.train.names), table)
    folder.write("splits.parquet", table.getvalue().to_pybytes())


def complete_ensemble(folder: Folder, config: RunConfig, data: ZeroShotData) -> tuple[EnsembleSpec, str]:
    """Write ``model/ensemble.json`` beside the members' weights; the second value is the digest of them all."""
    spec = EnsembleSpec(
        config.model,
        data.train.image_shape,
        config.ensemble.members,
        inverted=data.inverted,
        resize=data.resize,
        inference=config.inference,
    )
    save_spec(folder.child("model"), spec, pool=drawn_pool(config, data.train))
    weights = [load_safetensors(folder.read(f"model/{member_file(rank)}")) for rank in range(spec.members)]
    return spec, weights_digest(weights)


class _Run:
    """The part that new and resumed runs share."""

    def __init__(
        self,
        config: RunConfig,
        folder: Folder,
        *,
        data: ZeroShotData,
        splits: Splits,
        console: Console,
        parent_run_id: str | None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.splits = splits
        self.console = console
        self.parent_run_id = parent_run_id
        self.schedule = Schedule.of(config, splits)
        self.last: EnsembleStatistics | None = None

    def go(self, mlflow_run_id: str | None, *, resumed: bool) -> Finished:
        config, git = self.config, git_state(Path.cwd())
        tags = run_tags(config, self.folder, git)
        tracker = Tracker.start(
            config,
            run_name=Path(self.folder.path).name,
            tags=tags,
            resume_run_id=mlflow_run_id,
            parent_run_id=self.parent_run_id,
        )
        status: Status = "FAILED"
        with tempfile.TemporaryDirectory() as copy:
            try:
                self._introduce(tracker, {"eat_dist": __version__, "git": git, "tags": tags})
                summary = self._train_and_evaluate(tracker, Path(copy), resumed=resumed)
                if config.tracking.register_as is not None and self.parent_run_id is None:
                    tracker.register(config.tracking.register_as, version_tags(flat_figures(summary), tags))
                status = "FINISHED"
            except (KeyboardInterrupt, SystemExit):  # SIGTERM is the latter
                status = "KILLED"
                raise
            finally:
                tracker.close(status)
        return Finished(self.folder, summary, tracker.uri, tracker.run_id, tracker.missing, tracker.registered)

    def _introduce(self, tracker: Tracker, about: dict[str, Any]) -> None:
        """What is on record before training: settings, images and code."""
        config, sums = self.config, digests(self.data)
        tracker.log_params(config.model_dump(mode="json"))
        sets = (("train", self.data.train), ("test", self.data.test))
        tracker.log_datasets(
            [dataset_record(config.data, images, sums[name], testing=name == "test") for name, images in sets]
        )
        tracker.log_text(self.folder.read("config.yaml").decode(), "config.yaml")
        self.folder.write_json("run.json", {"schema": 1, **about, "data": sums, "mlflow_run_id": tracker.run_id})

    def _train_and_evaluate(self, tracker: Tracker, copy: Path, *, resumed: bool) -> dict[str, Any]:
        config, folder = self.config, self.folder
        begin = time.perf_counter()
        with self.console.training(self.schedule) as show:
            results = self._train(tracker, show)
        seconds = time.perf_counter() - begin
        for line in () if resumed else results[0].passed_over:
            self.console.warn(line)
        if apart := [str(rank) for rank, result in enumerate(results) if result.nodes > 1]:
            self.console.warn(
                f"the replicas of member {', '.join(apart)} were on several nodes and talked over the network many "
                f"times an iteration; let cluster.replicas_per_member divide the number of workers that a node holds"
            )
        spec, digest = complete_ensemble(folder, config, self.data)
        if self.last is not None:
            figure = transfer_matrix_figure(self.last.transfer_matrix)
            tracker.log_figure(figure, "figures/transfer_matrix.png")
            folder.write("figures/transfer_matrix.png", figure_png(figure))
        summary = summary_of_training(
            config,
            folder,
            results,
            seconds=seconds,
            weights_sha256=digest,
            skipped=self.data.skipped,
            mlflow_run_id=tracker.run_id,
        )
        self._name_the_slowest(summary["waiting_share"])
        if config.evaluation.protocol != "none":
            measured = evaluate_subject(
                Subject(str(folder), config),
                evaluation_folder(folder, config),
                workers=1,
                command=f"eat-dist evaluate {folder.argument} --protocol {config.evaluation.protocol}",
                console=self.console,
            )
            summary = summary_with(summary, config, measured)
        folder.write_json("summary.json", summary)
        log_figures(tracker, summary)
        tracker.log_text((folder.read("summary.json")).decode(), "summary.json")
        for name in folder.child("model").names():
            (copy / name).write_bytes(folder.read(f"model/{name}"))
        tracker.log_ensemble(str(copy), spec.image_shape, digest=digest)
        return summary

    def _name_the_slowest(self, shares: list[float]) -> None:
        """Say which member held the others up, if one did; ``shares`` of the time that each waited."""
        slowest = shares.index(min(shares))
        if max(shares) - shares[slowest] > _UNEQUAL:
            others = statistics.median(share for rank, share in enumerate(shares) if rank != slowest)
            self.console.say(
                f"Member {slowest} was the slowest: the others waited {100 * others:.0f} % of their time for peers, "
                f"it {100 * shares[slowest]:.0f} %."
            )

    def _train(self, tracker: Tracker, show: Callable[[EnsembleStatistics], None]) -> list[MemberResult]:
        every = max(1, self.schedule.iterations // _TRACKED_ITERATIONS)
        epochs = EpochMeans(self.schedule)

        def on_iteration(ensemble: EnsembleStatistics) -> None:
            self.last = ensemble
            show(ensemble)
            if ensemble.iteration % every == 0 or ensemble.iteration == self.schedule.iterations:
                tracker.log_metrics(step_metrics(ensemble), step=ensemble.iteration)
            if (ended := epochs.add(ensemble)) is not None:
                epoch, means = ended
                tracker.log_metrics(means, step=epoch)

        if self.config.cluster.backend == "local":
            return train_in_process(
                self.config,
                self.data.train,
                splits=self.splits,
                run_folder=self.folder,
                mlflow_run_id=tracker.run_id,
                on_iteration=on_iteration,
            )
        from eat_dist.cluster.train import train_on_ray  # noqa: PLC0415  (an in-process run needs no Ray)

        return train_on_ray(
            self.config,
            num_classes=self.data.train.num_classes,
            run_folder=self.folder,
            mlflow_run_id=tracker.run_id,
            on_iteration=on_iteration,
            on_notice=self.console.warn,
        )
