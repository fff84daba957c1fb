"""Study folders as ``eat-dist study`` writes them, from figures given by hand or drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eat_dist.storage import Folder

FIGURES = ("clean/r_at_1", "clean/nmi", "worst/r_at_1", "worst/nmi")
MEASURED = {
    "protocol": "standard",
    "norm": "linf",
    "num_steps": "20",
    "images": "2120",
    "classes": "106",
    "epsilon": "0.1",
    "attacks": "apgd50/displacement",
}
Seeds = Sequence[float | None]
"""A value a seed; None: that run has failed."""


def study_json(
    rows: Mapping[str, Seeds | Mapping[str, Seeds]], *, name: str = "omniglot", **changes: Any
) -> dict[str, Any]:
    """``study.json`` of finished runs.

    Args:
        rows: Row → its values by seed, of every figure alike or by figure; or dataset → rows.
        name: Of the study.
        changes: Keys to replace.
    """
    first = next(iter(rows.values()))
    datasets: Mapping[str, Any] = rows if isinstance(first, Mapping) and set(first) - set(FIGURES) else {"digits": rows}
    runs = []
    for dataset, of_dataset in datasets.items():
        for row, given in of_dataset.items():
            by_figure = given if isinstance(given, Mapping) else dict.fromkeys(FIGURES, given)
            seeds = len(next(iter(by_figure.values())))
            for seed in range(seeds):
                values = {figure: values[seed] for figure, values in by_figure.items()}
                runs.append(run(row, dataset, seed, None if None in values.values() else values))
    labels = dict.fromkeys(row for of_dataset in datasets.values() for row in of_dataset)
    content: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "command": f"eat-dist study configs/studies/{name}.yaml",
        "eat_dist": "0.1.0",
        "git": {"commit": "67c3c17", "dirty": "false"},
        "started": "2026-01-01T12:00:00+00:00",
        "seconds": 5400.0,
        "mlflow_run_id": None,
        "datasets": {dataset: {"name": dataset, "data": {"dataset": dataset}} for dataset in datasets},
        "rows": {row: {"defense.name": row} for row in labels},
        "seeds": sorted({one["seed"] for one in runs}),
        "budget_row": None,
        "runs": runs,
    }
    return content | changes


def run(row: str, dataset: str, seed: int, figures: Mapping[str, float | None] | None) -> dict[str, Any]:
    """One run; without figures it has failed."""
    name = f"{row}-{dataset}-s{seed}"
    made: dict[str, Any] = {
        "name": name,
        "row": row,
        "dataset": dataset,
        "seed": seed,
        "status": "FINISHED",
        "run_folder": f"runs/{name}",
        "members": 3,
        "epochs": 25,
        "seconds": 120.0 + seed,
        "error": None,
        "mlflow_run_id": None,
        "figures": figures and dict(figures),
        "measured": MEASURED,
        "failed_checks": None,
        "passes": 3045 * 3,
        "training_seconds": 90.0 + seed,
    }
    if figures is None:
        lost = dict.fromkeys(("measured", "passes", "training_seconds"))
        made |= {"status": "FAILED", "error": "member 1: the clean loss is nan in epoch 2, iteration 17", **lost}
    return made


def write_study(path: Path, content: dict[str, Any]) -> Folder:
    """A folder with that ``study.json``."""
    folder = Folder.at(path)
    folder.write_json("study.json", content)
    return folder


def drawn(rows: Sequence[str], *, seeds: int = 3, seed: int = 0) -> dict[str, dict[str, list[float]]]:
    """Figures of rows that rise in the order given, from a seeded model."""
    draw = np.random.default_rng(seed)
    common = 0.01 * draw.standard_normal(seeds)
    found = {}
    for place, row in enumerate(rows):
        level = 0.3 + 0.3 * place / max(len(rows) - 1, 1)
        found[row] = {
            figure: (level * scale + common + 0.005 * draw.standard_normal(seeds)).round(4).tolist()
            for figure, scale in zip(FIGURES, (1.2, 1.3, 0.5, 0.9), strict=True)
        }
    return found
