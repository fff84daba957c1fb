"""One run from good data to its summary: tracking, training, evaluation."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors

from eat_dist import __version__
from eat_dist.config import RunConfig
from eat_dist.console import Console
from eat_dist.data.images import ZeroShotData
from eat_dist.data.splits import Splits
from eat_dist.errors import StorageError
from eat_dist.in_process import train_in_process
from eat_dist.member import MemberResult
from eat_dist.models.ensemble import EnsembleSpec, member_file, save_spec, weights_digest
from eat_dist.provenance import git_state
from eat_dist.report.figures import figure_png, transfer_matrix_figure
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.runs.checks import (
    digests,
)
from eat_dist.runs.defended import drawn_pool
from eat_dist.runs.evaluation import Subject, evaluate_subject, evaluation_folder
from eat_dist.runs.summary import flat_figures, step_metrics, summary_of_training, summary_with, withstands_nothing
from eat_dist.runs.tracked import EpochMeans, dataset_record, log_figures, run_tags, version_tags
from eat_dist.schedule import Schedule
from eat_dist.storage import Folder
from eat_dist.tracking import Status, Tracker

# Iterations whose numbers go to MLflow, at most; the run folder has all of them.
_TRACKED_ITERATIONS = 1000

# Iterations from which on a training may be expected to have learnt something.
_LONG_ENOUGH = 500

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


class Run:
    """The part that new and resumed runs share: :meth:`go` trains, evaluates and records."""

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
        self.about: dict[str, Any] = {}  # the content of run.json

    def go(self, mlflow_run_id: str | None, *, resumed: bool) -> Finished:
        """Train, evaluate and record.

        Args:
            mlflow_run_id: The run in MLflow to go on with; None makes a new one.
            resumed: There is a checkpoint to go on from, and what it passes over has been said.
        """
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
            except (KeyboardInterrupt, SystemExit):  # the latter is SIGTERM, as Ray has it for callers from Python
                status = "KILLED"
                raise
            finally:
                tracker.close(status)
                self._note_mlflow_run(tracker)
        if summary["mlflow_run_id"] != tracker.run_id:  # MLflow has answered only now
            summary["mlflow_run_id"] = tracker.run_id
            self.folder.write_json("summary.json", summary)
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
        self.about = {"schema": 1, **about, "data": sums, "mlflow_run_id": tracker.run_id}
        self.folder.write_json("run.json", self.about)

    def _note_mlflow_run(self, tracker: Tracker) -> None:
        """Put an answer of MLflow that came late on record: a resumed run goes on with that MLflow run."""
        if self.about and tracker.run_id != self.about["mlflow_run_id"]:
            content = self.about | {"mlflow_run_id": tracker.run_id}
            with contextlib.suppress(StorageError):  # MLflow ends no run; it is tried again
                self.folder.write_json("run.json", content)
                self.about = content

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
            classes=self.data.train.num_classes,
            skipped=self.data.skipped,
            mlflow_run_id=tracker.run_id,
        )
        self._name_the_slowest(summary["waiting_share"])
        self._warn_of_nothing_learnt(summary)
        if config.evaluation.protocol != "none":
            measured = evaluate_subject(
                Subject(str(folder), config),
                evaluation_folder(folder, config),
                workers=1,
                command=f"eat-dist evaluate {folder.argument} --protocol {config.evaluation.protocol}",
                console=self.console,
            )
            summary = summary_with(summary, config, measured)
        summary["mlflow_run_id"] = tracker.run_id  # which may have been answered meanwhile
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

    def _warn_of_nothing_learnt(self, summary: dict[str, Any]) -> None:
        if summary["iterations"] >= _LONG_ENOUGH and withstands_nothing(summary):
            self.console.warn(
                f"in the last epoch the training attack misplaced {100 * summary['fooled_rate']:.0f} % of the images, "
                f"as chance would ({100 * summary['fooled_by_chance']:.0f} %): nothing was learnt that withstands it. "
                f"Try another optimiser.learning_rate, more epochs or a smaller attack.epsilon"
            )

    def _train(self, tracker: Tracker, show: Callable[[EnsembleStatistics], None]) -> list[MemberResult]:
        every = max(1, self.schedule.iterations // _TRACKED_ITERATIONS)
        epochs = EpochMeans(self.schedule)

        def on_iteration(ensemble: EnsembleStatistics) -> None:
            self.last = ensemble
            self._note_mlflow_run(tracker)
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
