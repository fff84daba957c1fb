"""The figures of a run under their stable names (docs/run_folder.md): in ``summary.json`` and in MLflow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from eat_dist.config import RunConfig
from eat_dist.errors import StorageError
from eat_dist.evaluation.measured import evaluation_of, measurement
from eat_dist.history import last_fooled_rate, read_history, waiting_shares
from eat_dist.member import MemberResult
from eat_dist.metrics.spared import counted_figure
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.storage import Folder

SUMMARY_SCHEMA = 1
FIGURES = ("clean/r_at_1", "clean/nmi", "worst/r_at_1", "worst/nmi")
"""What runs are compared by, under the names of ``summary.json``; ``worst``: the worst of all attacks."""
_NEEDED = ("name", "seed", "weights_sha256", "passes", "members_trained", "mlflow_run_id")


def summary_of_training(
    config: RunConfig,
    folder: Folder,
    results: Sequence[MemberResult],
    *,
    seconds: float,
    weights_sha256: str,
    classes: int,
    skipped: Sequence[str],
    mlflow_run_id: str | None,
) -> dict[str, Any]:
    """What ``summary.json`` says of a run before it is evaluated; ``results`` by rank, ``classes`` trained on."""
    history = read_history(folder.child("statistics"))
    waited, fooled = waiting_shares(history, config.ensemble.members), last_fooled_rate(history)
    return {
        "schema": SUMMARY_SCHEMA,
        "name": config.name,
        "dataset": config.data.dataset,
        "defense": config.defense.name,
        "transfer_rule": config.defense.transfer_rule if config.defense.name == "eat" else None,
        "members_trained": config.ensemble.members,
        "seed": config.seed,
        "epochs": config.train.epochs,
        "iterations": results[0].iterations,
        "passes": round(results[0].passes, 3),
        "seconds": round(seconds, 3),
        "fooled_rate": None if fooled is None else round(fooled, 4),
        "fooled_by_chance": round(1 - 1 / classes, 4),
        "resumed_from_iteration": results[0].resumed_from,
        "weights_sha256": weights_sha256,
        "waiting_share": [round(share, 4) for share in waited],
        "peak_memory_mib": [round(result.peak_memory / 2**20) for result in results],
        "loading": results[0].loading,
        "nodes_of_a_member": [result.nodes for result in results],
        "skipped_images": list(skipped),
        "mlflow_run_id": mlflow_run_id,
    }


def summary_of(folder: Folder) -> dict[str, Any]:
    """``summary.json`` of a finished run.

    Raises:
        StorageError: It is not there, or not what this eat_dist writes.
    """
    content = folder.read_json("summary.json")
    version = content.get("schema") if isinstance(content, dict) else type(content).__name__
    lacking = [] if version != SUMMARY_SCHEMA else [name for name in _NEEDED if name not in content]
    if version != SUMMARY_SCHEMA or lacking:
        what = f"without {', '.join(lacking)}" if lacking else f"expected schema {SUMMARY_SCHEMA}; got {version}"
        raise StorageError(f"'{folder.child('summary.json')}' is not the summary of a run: {what}")
    return dict(content)


def summary_with(summary: dict[str, Any], config: RunConfig, results: dict[str, Any]) -> dict[str, Any]:
    """The summary with the evaluation's figures under their stable names (docs/run_folder.md)."""
    measured = {"inference": results["inference"], **results["ensemble"], "members": results["members"]}
    return summary | {"evaluation": evaluation_of(results), **measured}


def withstands_nothing(summary: Mapping[str, Any]) -> bool:
    """Whether the training attack misplaced images in the last epoch (nearly) as often as chance would."""
    fooled, chance = summary.get("fooled_rate"), summary.get("fooled_by_chance")
    return fooled is not None and chance is not None and fooled >= 0.95 * chance


def step_metrics(ensemble: EnsembleStatistics) -> dict[str, float]:
    """What MLflow gets of one iteration; what was not measured is left out."""
    metrics: dict[str, float | None] = {"ensemble/shared_vulnerability": ensemble.shared_vulnerability}
    for entry in ensemble.members:
        for name in ("clean_loss", "adversarial_loss", "fooled_rate", "displacement", "gradient_norm"):
            metrics[f"member_{entry.member}/{name}"] = getattr(entry, name)
    for name in ("clean_loss", "adversarial_loss", "fooled_rate"):
        values = [value for entry in ensemble.members if (value := getattr(entry, name)) is not None]
        metrics[f"ensemble/{name}"] = sum(values) / len(values) if values else None
    return {name: value for name, value in metrics.items() if value is not None}


def flat_figures(summary: dict[str, Any]) -> dict[str, float]:
    """``clean/r_at_1``, ``attacked/pgd20/nmi``, ``attacked/pgd20/displacement/nmi``, ``member_0/clean/f1`` …"""
    flat: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                # MLflow's names have no @.
                walk(f"{prefix}/{name.replace('@', '/from_')}" if prefix else name, inner)
        elif isinstance(value, (int, float)):
            flat[prefix] = float(value)

    measured = [("", summary)] + [(f"member_{rank}/", entry) for rank, entry in enumerate(summary.get("members", []))]
    for prefix, entry in measured:
        for part in ("clean", "attacked", "worst"):
            walk(f"{prefix}{part}", entry.get(part, {}))
        walk(f"{prefix}attacked", _worst_of_each_attack(entry.get("attacked", {})))
    for rank, mebibytes in enumerate(summary.get("peak_memory_mib", [])):
        flat[f"member_{rank}/peak_memory_mib"] = float(mebibytes)
    return flat


def figures_of(ensemble: Mapping[str, Any]) -> dict[str, float]:
    """:data:`FIGURES` of an evaluation's entry ``ensemble``."""
    return {name: float(ensemble[part][figure]) for name in FIGURES for part, figure in [name.split("/")]}


def measured_with(summary: Mapping[str, Any]) -> dict[str, str]:
    """What the figures of a summary were measured with (:func:`measurement`); empty where nothing was measured."""
    about = summary.get("evaluation")
    return {} if about is None else measurement(about, summary["attacked"], seed=summary.get("seed"))


def _worst_of_each_attack(attacked: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Attack → its lowest figures over all its objectives, of those where lower is worse."""
    lowest: dict[str, dict[str, float]] = {}
    for key, figures in attacked.items():
        worst = lowest.setdefault(key.partition("/")[0], {})
        for name in figures:
            value = counted_figure(figures, name).value
            if value is not None and (name in ("map_at_r", "nmi", "ami", "f1") or re.fullmatch(r"r_at_\d+", name)):
                worst[name] = min(value, worst.get(name, value))
    return lowest
