"""Sweep folders as ``eat-dist sweep`` writes them, from a seeded model of what settings do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eat_dist.report.sweeps.reading import Sweep, read_sweep
from eat_dist.storage import Folder

EPOCHS = 8
# What the planted scores depend on, strongly; the weight decay does nothing at all.
PLANTED, IDLE = "defense.transfer_strength", "optimiser.weight_decay"
SPACE: dict[str, dict[str, Any]] = {
    PLANTED: {"uniform": [0, 1]},
    "optimiser.learning_rate": {"log_uniform": ["1e-4", 1e-2]},
    "defense.transfer_rule": {"choice": ["uniform", "hardest", "class_risk"]},
    IDLE: {"log_uniform": [1e-5, 1e-3]},
    "attack.epsilon": {"grid": ["4/255", "8/255", "16/255"]},
}
CONDITIONAL: dict[str, dict[str, Any]] = {
    PLANTED: {"uniform": [0, 1]},
    "defense.transfer_rule": {"choice": ["uniform", "relay"]},
    "defense.relay_steps": {"integer": [1, 4], "when": {"defense.transfer_rule": "relay"}},
    "model.widths": {"choice": [[8, 16], [16, 32]]},
}
BASE = {"name": "omniglot", "seed": 0, "data": {"dataset": "omniglot"}, "train": {"epochs": EPOCHS}}
ONE = [{"name": "attacked_nmi", "direction": "max"}]
TWO = [{"name": "clean_r_at_1", "direction": "max"}, {"name": "attacked_nmi", "direction": "max"}]


def write_sweep(
    path: Path,
    *,
    trials: int = 30,
    seed: int = 0,
    space: dict[str, dict[str, Any]] | None = None,
    objectives: list[dict[str, str]] | None = None,
    pruned: int = 0,
    failed: int = 0,
    effect: float = 0.5,
    **changes: Any,
) -> Folder:
    """Write ``sweep.json`` and ``trials.json``.

    Args:
        path: The sweep folder.
        trials: How many, the pruned and failed ones among them.
        seed: Of settings and noise.
        space: Default: ``SPACE``.
        objectives: Default: ``ONE``.
        pruned: How many are stopped: the worst after epoch 2, as successive halving does.
        failed: How many of the first fail, every other one before its first result.
        effect: How much the planted setting changes the score; 0: the scores are noise.
        changes: Keys of ``sweep.json`` to replace.
    """
    draw = np.random.default_rng(seed)
    space, objectives = space or SPACE, objectives or ONE
    made = [trial(number, sampled(space, draw), objectives, draw, effect=effect) for number in range(trials)]
    for number in range(failed):
        epochs = 0 if number % 2 == 0 else 1
        made[number] |= {
            "status": "FAILED",
            "results": made[number]["results"][:epochs],
            "error": "NonFiniteLossError: the loss of member 1 is nan in iteration 112\n  lower the learning rate",
        }
    name = objectives[0]["name"]
    by_early_score = sorted(made[failed:], key=lambda one: one["results"][1]["objectives"][name])
    for stopped in by_early_score[:pruned]:
        stopped |= {"status": "PRUNED", "results": stopped["results"][:2], "seconds": 25.0}
    folder = Folder.at(path)
    folder.write_json("sweep.json", about(made, space, objectives, path.name) | changes)
    folder.write_json("trials.json", made)
    return folder


def sampled(space: dict[str, dict[str, Any]], draw: np.random.Generator) -> dict[str, Any]:
    """Settings of one trial, numbers as the run config has them; those that do not apply left out."""
    settings: dict[str, Any] = {}
    for key, spec in space.items():
        kind = next(kind for kind in spec if kind != "when")
        listed = spec[kind]
        if any(settings.get(other) != value for other, value in spec.get("when", {}).items()):
            continue
        if kind == "uniform":
            settings[key] = float(draw.uniform(*listed))
        elif kind == "log_uniform":
            settings[key] = float(np.exp(draw.uniform(*np.log([float(end) for end in listed]))))
        elif kind == "integer":
            settings[key] = int(draw.integers(listed[0], listed[1], endpoint=True))
        else:
            chosen = listed[int(draw.integers(len(listed)))]
            # The config reads "8/255" as a number, and so do the settings of a trial.
            numerator, _, denominator = chosen.partition("/") if isinstance(chosen, str) else ("", "", "")
            settings[key] = int(numerator) / int(denominator) if denominator else chosen
    return settings


def trial(
    number: int,
    settings: dict[str, Any],
    objectives: list[dict[str, str]],
    draw: np.random.Generator,
    *,
    effect: float,
) -> dict[str, Any]:
    """A finished trial: attacked figures are best with the planted setting at 0.6, clean ones with it at 0."""
    planted = settings[PLANTED]
    robust = 0.62 - effect * (planted - 0.6) ** 2 + 0.01 * draw.standard_normal()
    clean = 0.70 - 0.3 * effect * planted + 0.01 * draw.standard_normal()
    results = []
    for epoch in range(1, EPOCHS + 1):
        learnt = 1 - 0.5 * np.exp(-epoch / 2.5)
        figures = {
            "clean/r_at_1": clean * learnt,
            "clean/nmi": (clean + 0.08) * learnt,
            "worst/r_at_1": (robust - 0.2) * learnt,
            "worst/nmi": robust * learnt,
        }
        figures = {name: round(float(value), 6) for name, value in figures.items()}
        of = {"attacked_nmi": figures["worst/nmi"], "clean_r_at_1": figures["clean/r_at_1"]}
        values = {one["name"]: of.get(one["name"], 1 - figures["worst/nmi"]) for one in objectives}
        results.append({"epoch": epoch, "objectives": values, "figures": figures})
    return {
        "id": f"t{number:04d}",
        "number": number,
        "status": "FINISHED",
        "run_folder": f"trials/{number:04d}",
        "settings": settings,
        "results": results,
        "seconds": 90.0 + number,
        "error": None,
        "mlflow_run_id": None,
    }


def about(
    trials: list[dict[str, Any]], space: dict[str, Any], objectives: list[dict[str, str]], name: str
) -> dict[str, Any]:
    """``sweep.json`` for these trials."""
    finished = [one for one in trials if one["status"] == "FINISHED"]
    first = objectives[0]
    sign = 1 if first["direction"] == "max" else -1
    best = max(finished, key=lambda one: sign * one["results"][-1]["objectives"][first["name"]], default=None)
    return {
        "schema": 1,
        "name": name,
        "base_config": BASE,
        "space": space,
        "search": "optuna",
        "scheduler": "asha",
        "objectives": objectives,
        "trials_requested": len(trials),
        "concurrent": 2,
        "seed": 0,
        "validation_share": 0.2,
        "evaluation_epsilon": 0.1,
        "command": "eat-dist sweep --config configs/omniglot.yaml --space tune_spaces/space.yaml --trials 30",
        "git": "67c3c17",
        "started": "2026-01-01T12:00:00+00:00",
        "seconds": 5400.0,
        "best": None if best is None or len(objectives) > 1 else best["id"],
        "pareto": [],
    }


def sweep_of(path: Path, **options: Any) -> Sweep:
    return read_sweep(write_sweep(path / "sweep", **options))


def edited(folder: Folder, number: int, **changes: Any) -> Folder:
    """The sweep with keys of one trial replaced."""
    rows = folder.read_json("trials.json")
    rows[number] |= changes
    folder.write_json("trials.json", rows)
    return folder
