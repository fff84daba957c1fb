"""What a run says of itself to MLflow, besides its figures: tags, datasets, means by epoch (docs/tracking.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eat_dist import __version__
from eat_dist.config import ClusterConfig, DataConfig, RunConfig
from eat_dist.data.images import ImageSet
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.runs.summary import flat_figures, measured_with, step_metrics
from eat_dist.schedule import Schedule
from eat_dist.storage import Folder
from eat_dist.tracking import DatasetRecord, Tracker

MEASURED = "evaluation."
"""What the tags of :func:`eat_dist.evaluation.measured.measurement` begin with."""
FAILED = f"{MEASURED}failed_checks"
"""The tag with the names of the sanity checks that failed, empty where none did."""

_QUOTED = ("r_at_1", "map_at_r", "nmi", "f1")  # figures that a registered version carries


def run_tags(config: RunConfig, folder: Folder, git: Mapping[str, str]) -> dict[str, str]:
    """What runs are found and told apart by. The cluster, if there is one, is joined."""
    return {
        "defense": config.defense.name,
        "inference": config.inference.name,
        "dataset": config.data.dataset,
        "backbone": config.model.backbone,
        "run_folder": str(folder),
        "eat_dist": __version__,
        **{f"git.{name}": value for name, value in git.items()},
        **_cluster_tags(config.cluster),
    }


def dataset_record(config: DataConfig, images: ImageSet, sha256: str, *, testing: bool) -> DatasetRecord:
    """A set of images in words."""
    held_out = config.validation_share > 0  # then the measured classes are the training set's own
    source = (config.test_root if testing and not held_out else None) or config.root or config.shards
    return DatasetRecord(
        name=config.dataset,
        context="training" if not testing else "validation" if held_out else "testing",
        sha256=sha256,
        source=source,
        images=len(images),
        classes=images.num_classes,
        image_shape=images.image_shape,
    )


def log_figures(tracker: Tracker, summary: dict[str, Any]) -> None:
    """Send a summary's figures, and as tags what they were measured with: params cannot change, an evaluation may."""
    tracker.log_metrics(flat_figures(summary), step=int(summary.get("iterations", 0)))
    if measured := measured_with(summary):
        failed = ", ".join(summary["evaluation"]["failed_checks"] or ())
        tracker.log_tags({f"{MEASURED}{name}": value for name, value in measured.items()} | {FAILED: failed})


def version_tags(figures: Mapping[str, float], tags: Mapping[str, str]) -> dict[str, str]:
    """What a registered version of a run's ensemble carries: of the run's tags and final figures the telling ones."""
    about = ("dataset", "defense", "backbone", "run_folder", "eat_dist", "git.commit", "git.dirty")
    telling = {
        name: f"{value:.4f}"
        for name, value in figures.items()
        # Of an attack the worst over its objectives: the figures of each would be dozens.
        if name.startswith(("clean/", "attacked/", "worst/"))
        and name.count("/") <= 2
        and name.rpartition("/")[2] in _QUOTED
    }
    return {name: tags[name] for name in about if name in tags} | telling


class EpochMeans:
    """Means of what an epoch's iterations measured, made as the iterations come in.

    Args:
        schedule: How iterations make epochs.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._epoch = 0
        self._values: dict[str, list[float]] = {}

    def add(self, ensemble: EnsembleStatistics) -> tuple[int, dict[str, float]] | None:
        """Take an iteration in.

        Args:
            ensemble: Merged; ``iteration`` counts those done.

        Returns:
            Where this iteration ends an epoch: the epochs done, and ``epoch/clean_loss`` (means over members and
            iterations), ``epoch/member_0/clean_loss`` …; what was never measured is left out. Else None.
        """
        epoch = self.schedule.epoch(ensemble.iteration - 1)
        if epoch != self._epoch:  # the rest of the last one was lost with the coordinator
            self._epoch, self._values = epoch, {}
        for name, value in step_metrics(ensemble).items():
            self._values.setdefault(f"epoch/{name.removeprefix('ensemble/')}", []).append(value)
        if ensemble.iteration % self.schedule.iterations_per_epoch:
            return None
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values = {}
        return epoch + 1, means


def _cluster_tags(config: ClusterConfig) -> dict[str, str]:
    if config.backend == "local":
        return {"cluster": "local"}
    from eat_dist.cluster.about import cluster_tags  # noqa: PLC0415  (an in-process run needs no Ray)

    return cluster_tags(config)
