"""One run from its config to its summary: folder, data, tracking, training, evaluation."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load as load_safetensors

from eat_dist import __version__
from eat_dist.attacks import ATTACKS
from eat_dist.checkpoint import Checkpoints
from eat_dist.config import RunConfig, dump_config, override, parse_config
from eat_dist.console import Console
from eat_dist.data.datasets import DATASETS, load_dataset
from eat_dist.data.images import ZeroShotData
from eat_dist.data.splits import Splits, make_splits, to_table
from eat_dist.defenses import DEFENSES
from eat_dist.errors import CheckpointError, ConfigError, StorageError
from eat_dist.evaluation.of_run import evaluate_run
from eat_dist.in_process import choose_device, train_in_process
from eat_dist.losses import LOSSES
from eat_dist.member import MemberResult, Schedule
from eat_dist.models import BACKBONES
from eat_dist.models.ensemble import EnsembleSpec, member_file, save_spec, weights_digest
from eat_dist.provenance import git_state
from eat_dist.report.figures import figure_png, transfer_matrix_figure
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.robustness.transfer import TRANSFER_RULES
from eat_dist.storage import Folder
from eat_dist.tracking import Tracker

SUMMARY_SCHEMA = 1

# Iterations whose numbers go to MLflow, at most; the run folder has all of them.
_TRACKED_ITERATIONS = 1000


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        folder: Where everything is.
        summary: The content of ``summary.json``.
        tracking_uri: MLflow's store, None where tracking is off.
        mlflow_run_id: None where MLflow never answered.
    """

    folder: Folder
    summary: dict[str, Any]
    tracking_uri: str | None
    mlflow_run_id: str | None


def start_run(config: RunConfig, *, run_dir: str | None, overwrite: bool, console: Console) -> Finished:
    """Train, evaluate and record a new run.

    Nothing is written before config, data and cluster have been found good.

    Args:
        config: The run.
        run_dir: Path or URL; default ``runs/NAME-TIME``.
        overwrite: Delete an earlier run in that folder first.
        console: Where progress goes.

    Raises:
        EatError: Anything the user can mend; one line.
    """
    check_names(config)
    now = datetime.datetime.now().astimezone()
    folder = Folder.at(run_dir or f"runs/{config.name}-{now:%Y%m%d-%H%M%S}")
    _check_free(folder, overwrite=overwrite)
    config = _absolute(config)
    data = _load(config, console)
    splits = _splits(config, data)
    _check_cluster(config)
    if overwrite:
        folder.delete()
    folder.create()
    folder.write("config.yaml", dump_config(config).encode())
    table = pa.BufferOutputStream()
    pq.write_table(to_table(splits, data.train.names), table)
    folder.write("splits.parquet", table.getvalue().to_pybytes())
    return _Run(config, folder, data=data, splits=splits, console=console).go(None, resumed=False)


def resume_run(run_dir: str, *, console: Console) -> Finished:
    """Continue a run from its newest good checkpoint, with the config saved in its folder.

    Raises:
        CheckpointError: There is no usable checkpoint.
        EatError: Anything else the user can mend.
    """
    folder = Folder.at(run_dir)
    config = config_of(folder)
    found = Checkpoints(folder.child("checkpoints"), config).newest()
    if found is None:
        raise CheckpointError(
            f"'{folder}' has no checkpoint to resume from; start the run again with --overwrite --run-dir {folder}"
        )
    for line in found.passed_over:
        console.warn(line)
    console.say(f"Resuming from iteration {found.iteration}.")
    data = _load(config, console)
    splits = _splits(config, data)
    _check_cluster(config)
    return _Run(config, folder, data=data, splits=splits, console=console).go(found.mlflow_run_id, resumed=True)


def evaluate_again(run_dir: str, *, protocol: Literal["quick"], console: Console) -> Finished:
    """Evaluate a trained run and rewrite its summary; finished attacks are not repeated."""
    folder = Folder.at(run_dir)
    config = override(config_of(folder), f"evaluation.protocol={protocol}")
    if not folder.exists("summary.json"):
        raise StorageError(f"'{folder}' is not a finished run (no summary.json); resume it first: --resume {folder}")
    earlier = folder.read_json("summary.json")
    results = _evaluate(config, folder, console)
    summary = _summary_with(earlier, config, results)
    folder.write_json("summary.json", summary)
    return Finished(folder, summary, None, earlier["mlflow_run_id"])


def config_of(folder: Folder) -> RunConfig:
    """The config saved in a run folder.

    Raises:
        StorageError: It is not a run folder.
    """
    if not folder.exists("config.yaml"):
        raise StorageError(f"'{folder}' is not a run folder: it has no config.yaml")
    try:
        values = yaml.safe_load(folder.read("config.yaml"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{folder}/config.yaml' is not YAML: {' '.join(str(error).split())}") from error
    return parse_config(values, source=f"{folder}/config.yaml")


def check_names(config: RunConfig) -> None:
    """Find every component that the config names.

    Raises:
        ConfigError: All unknown names in one message.
    """
    tables = (
        (DATASETS, config.data.dataset),
        (BACKBONES, config.model.backbone),
        (LOSSES, config.loss.name),
        (ATTACKS, config.attack.name),
        (DEFENSES, config.defense.name),
        (TRANSFER_RULES, config.defense.transfer_rule),
    )
    faults = []
    for table, name in tables:
        try:
            table[name]
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))


class _Run:
    """The part that new and resumed runs share."""

    def __init__(
        self, config: RunConfig, folder: Folder, *, data: ZeroShotData, splits: Splits, console: Console
    ) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.splits = splits
        self.console = console
        self.schedule = Schedule.of(config, splits)
        self.last: EnsembleStatistics | None = None

    def go(self, mlflow_run_id: str | None, *, resumed: bool) -> Finished:
        config, git = self.config, git_state(Path.cwd())
        tags = {
            "defense": config.defense.name,
            "dataset": config.data.dataset,
            "backbone": config.model.backbone,
            "run_folder": str(self.folder),
            "eat_dist": __version__,
        } | {f"git.{name}": value for name, value in git.items()}
        run_name = Path(self.folder.path).name
        tracker = Tracker.start(config, run_name=run_name, tags=tags, resume_run_id=mlflow_run_id)
        tracker.log_params(config.model_dump(mode="json"))
        tracker.log_text(dump_config(config), "config.yaml")
        self.folder.write_json("run.json", {"schema": 1, "eat_dist": __version__, "git": git, "tags": tags})
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        with tempfile.TemporaryDirectory() as copy:
            try:
                finished = self._train_and_evaluate(tracker, Path(copy), resumed=resumed)
                status = "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                tracker.close(status)
        return finished

    def _train_and_evaluate(self, tracker: Tracker, copy: Path, *, resumed: bool) -> Finished:
        config, folder = self.config, self.folder
        begin = time.perf_counter()
        with self.console.training(self.schedule) as show:
            results = self._train(tracker, show)
        seconds = time.perf_counter() - begin
        for line in () if resumed else results[0].passed_over:
            self.console.warn(line)
        shape = tuple(self.data.train.images.shape[1:])
        spec = EnsembleSpec(config.model, (shape[0], shape[1], shape[2]), config.ensemble.members, self.data.inverted)
        save_spec(folder.child("model"), spec)
        digest = weights_digest(
            [load_safetensors(folder.read(f"model/{member_file(rank)}")) for rank in range(spec.members)]
        )
        if self.last is not None:
            figure = transfer_matrix_figure(self.last.transfer_matrix)
            tracker.log_figure(figure, "figures/transfer_matrix.png")
            folder.write("figures/transfer_matrix.png", figure_png(figure))
        summary: dict[str, Any] = {
            "schema": SUMMARY_SCHEMA,
            "name": config.name,
            "dataset": config.data.dataset,
            "defense": config.defense.name,
            "transfer_rule": config.defense.transfer_rule if config.defense.name == "eat" else None,
            "members_trained": config.ensemble.members,
            "seed": config.seed,
            "epochs": config.train.epochs,
            "iterations": results[0].iterations,
            "passes": results[0].passes,
            "seconds": round(seconds, 3),
            "resumed_from_iteration": results[0].resumed_from,
            "weights_sha256": digest,
            "skipped_images": list(self.data.skipped),
            "mlflow_run_id": tracker.run_id,
        }
        if config.evaluation.protocol != "none":
            summary = _summary_with(summary, config, _evaluate(config, folder, self.console))
        folder.write_json("summary.json", summary)
        tracker.log_metrics(_flat_figures(summary), step=self.schedule.iterations)
        tracker.log_text((folder.read("summary.json")).decode(), "summary.json")
        for name in folder.child("model").names():
            (copy / name).write_bytes(folder.read(f"model/{name}"))
        tracker.log_ensemble(str(copy), spec.image_shape)
        return Finished(folder, summary, tracker.uri, tracker.run_id)

    def _train(self, tracker: Tracker, show: Callable[[EnsembleStatistics], None]) -> list[MemberResult]:
        every = max(1, self.schedule.iterations // _TRACKED_ITERATIONS)

        def on_iteration(ensemble: EnsembleStatistics) -> None:
            self.last = ensemble
            show(ensemble)
            if ensemble.iteration % every == 0 or ensemble.iteration == self.schedule.iterations:
                tracker.log_metrics(_step_metrics(ensemble), step=ensemble.iteration)

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
        )


def _check_free(folder: Folder, *, overwrite: bool) -> None:
    if not folder.exists() or not folder.names():
        return
    if not overwrite:
        raise StorageError(
            f"'{folder}' exists; choose another --run-dir, continue it with --resume {folder}, or replace it "
            f"with --overwrite"
        )
    if not folder.exists("config.yaml"):
        raise StorageError(f"'{folder}' is not a run folder (no config.yaml), so --overwrite leaves it alone")


def _absolute(config: RunConfig) -> RunConfig:
    """``data.root`` as every worker must see it, whatever folder it starts in."""
    root = config.data.root
    if root is None or "://" in root:
        return config
    return config.model_copy(
        update={"data": config.data.model_copy(update={"root": str(Path(root).expanduser().absolute())})}
    )


def _load(config: RunConfig, console: Console) -> ZeroShotData:
    data = load_dataset(config.data)
    console.say(
        f"{config.data.dataset}: {len(data.train)} images of {data.train.num_classes} classes to train, "
        f"{len(data.test)} of {data.test.num_classes} other classes to test"
    )
    if data.skipped:
        console.warn(f"{len(data.skipped)} undecodable images are left out, e.g. {data.skipped[0]}")
    return data


def _splits(config: RunConfig, data: ZeroShotData) -> Splits:
    return make_splits(data.train.labels, config.ensemble.split, members=config.ensemble.members, seed=config.seed)


def _check_cluster(config: RunConfig) -> None:
    """Whether the members can be placed, before anything is written."""
    if config.cluster.backend == "local":
        choose_device(config.cluster)
        return
    from eat_dist.cluster.train import plan_placement  # noqa: PLC0415  (an in-process run needs no Ray)

    plan_placement(config)


def _evaluate(config: RunConfig, folder: Folder, console: Console) -> dict[str, Any]:
    if config.cluster.backend == "ray":
        from eat_dist.cluster.evaluate import evaluate_on_gpu_worker  # noqa: PLC0415  (as above)

        results = evaluate_on_gpu_worker(config, folder, console.say)
        if results is not None:
            return results
    # Half of the cores: on a core that something else wants, OpenMP's threads wait for each other by spinning, and an
    # evaluation on all of them takes 25 times as long (measured on two cores) for the little that a second one gains.
    torch.set_num_threads(config.cluster.threads_per_member or max(1, (os.cpu_count() or 1) // 2))
    with console.evaluating() as progress:
        return evaluate_run(folder, config, device=choose_device(config.cluster), on_progress=progress)


def _summary_with(summary: dict[str, Any], config: RunConfig, results: dict[str, Any]) -> dict[str, Any]:
    """The summary with the evaluation's figures under their stable names (docs/run_folder.md)."""
    about = {key: results[key] for key in ("protocol", "norm", "epsilon", "num_steps", "images", "classes")}
    return summary | {"evaluation": about, **results["ensemble"], "members": results["members"]}


def _step_metrics(ensemble: EnsembleStatistics) -> dict[str, float]:
    metrics: dict[str, float | None] = {"ensemble/shared_vulnerability": ensemble.shared_vulnerability}
    for entry in ensemble.members:
        for name in ("clean_loss", "adversarial_loss", "fooled_rate", "displacement", "gradient_norm"):
            metrics[f"member_{entry.member}/{name}"] = getattr(entry, name)
    for name in ("clean_loss", "adversarial_loss", "fooled_rate"):
        values = [value for entry in ensemble.members if (value := getattr(entry, name)) is not None]
        metrics[f"ensemble/{name}"] = sum(values) / len(values) if values else None
    return {name: value for name, value in metrics.items() if value is not None}


def _flat_figures(summary: dict[str, Any]) -> dict[str, float]:
    """``clean/r_at_1``, ``attacked/pgd20/…/nmi``, ``member_0/clean/f1`` …"""
    flat: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}/{name}" if prefix else name, inner)
        elif isinstance(value, (int, float)):
            flat[prefix] = float(value)

    for part in ("clean", "attacked", "worst"):
        walk(part, summary.get(part, {}))
        for rank, member in enumerate(summary.get("members", [])):
            walk(f"member_{rank}/{part}", member[part])
    return flat
