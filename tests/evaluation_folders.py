"""A small but complete evaluated run folder: every part that a report can show, with numbers made up but consistent."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import yaml

from eat_dist.history import SCHEMA
from eat_dist.report.reading import Run
from eat_dist.report.schema import Evaluation
from eat_dist.storage import Folder

OBJECTIVES = ("displacement", "nearest_wrong_centroid", "random_wrong_centroid", "nearest_negative")
EPSILONS = (0.0, 0.025, 0.05, 0.1, 0.2)
RUNGS = {"random_noise": 0.06, "fgsm": 0.6, "pgd20": 0.94, "apgd50": 1.0, "square1000": 0.4}
OTHER_NORMS = [("l2", "pgd20", 1.0, 0.7, 0.98), ("l2", "cw", None, 1.0, 0.613), ("l0", "jsma", 0.1, 0.8, 0.034)]
CHECKS = {
    "zero_epsilon": ("an attack of radius 0 changes nothing", "largest difference 0", "0"),
    "ladder": ("noise ≤ FGSM ≤ PGD ≤ APGD", "0.05, 0.52, 0.81, 0.86", "no step down"),
    "large_epsilon": ("success reaches 100 % as ε grows", "1.000 at ε 0.4", "≥ 0.99"),
    "more_steps": ("more steps are never weaker", "0.79 at 10, 0.81 at 20", "no step down"),
    "black_box": ("no black box is stronger than the white box", "0.31 against 0.86", "≤ white box"),
    "transfer": ("transfer is not stronger than the white box", "0.47 against 0.86", "≤ white box"),
    "gradients": ("gradients are finite and not zero", "100.0 % of 500 images", "> 99 %"),
    "batch_size": ("the batch size does not enter", "largest difference 3e-07", "≤ 1e-5"),
}


def figures(r_at_1: float, nmi: float, *, attacked: bool = False) -> dict[str, float | None]:
    """Figures of a model that finds ``r_at_1`` of its queries."""
    made: dict[str, float | None] = {
        "r_at_1": r_at_1,
        "r_at_2": min(1.0, 1.10 * r_at_1),
        "r_at_4": min(1.0, 1.18 * r_at_1),
        "r_at_8": min(1.0, 1.25 * r_at_1),
        "map_at_r": 0.5 * r_at_1,
        "nmi": nmi,
        "nmi_std": 0.004,
        "ami": nmi - 0.12,
        "ami_std": 0.006,
        "f1": 0.45 * nmi,
        "f1_std": 0.007,
    }
    if attacked:
        made |= {
            "r_at_1_all_attacked": 0.8 * r_at_1,
            "success_rate": 1 - r_at_1,
            "mean_displacement": 0.6,
            "largest_perturbation": 0.1,
            "images": 120,
        }
    return made


def evaluation(
    *, strength: float = 0.3, seed: int = 0, failing: tuple[str, ...] = (), defense: str | None = "eat", **changes: Any
) -> dict[str, Any]:
    """An ``evaluation/full/summary.json`` of schema 4.

    Args:
        strength: Share of the clean figures that survives the strongest attack, in [0, 1].
        seed: Shifts the figures a little.
        failing: Names of the sanity checks that fail.
        defense: As in the config.
        changes: Keys to replace.
    """
    shift = 0.01 * seed
    clean = (0.70 + shift, 0.76 + shift)
    lasting = dict(zip(OBJECTIVES, (1.25, 1.05, 1.15, 1.0), strict=True))
    clustered = dict(zip(OBJECTIVES, (1.3, 1.2, 1.0, 1.1), strict=True))

    # What is left of R@1 and NMI (which never falls to 0) where `share` survives the strongest attack.
    def under(objective: str, share: float) -> tuple[float, float]:
        kept, grouped = min(1, share * lasting[objective]), min(1, share * clustered[objective])
        return clean[0] * kept, 0.4 + (clean[1] - 0.4) * grouped

    attacked = {f"apgd100x5/{name}": figures(*under(name, strength), attacked=True) for name in OBJECTIVES}
    attacked["apgd100x5/displacement@members"] = figures(*under("displacement", 1.1 * strength), attacked=True)
    attacked["apgd100x5/nearest_negative@member_0"] = figures(*under("nearest_negative", 1.6 * strength), attacked=True)

    attacked["square1000/nearest_negative"] = {"r_at_1": 0.9 * clean[0], "success_rate": 0.1, "mean_displacement": 0.2}

    def worst(measured: dict[str, dict[str, float | None]]) -> dict[str, float]:
        return {
            name: min(one[name] or 0.0 for one in measured.values() if name in one)
            for name in ("r_at_1", "nmi", "ami", "f1")
        }

    def survive(epsilon: float) -> float:
        return float(strength ** (epsilon / 0.1))

    white = 1 - strength
    members = [
        {
            "clean": figures(clean[0] - 0.05, clean[1] - 0.04),
            "attacked": {"apgd100x5/displacement": figures(0.5 * clean[0] * strength, 0.42, attacked=True)},
            "worst": {"r_at_1": 0.5 * clean[0] * strength, "nmi": 0.42, "ami": 0.30, "f1": 0.19},
        }
        for _ in range(3)
    ]
    models = ["member_0", "member_1", "member_2"]
    return {
        "schema": 4,
        "eat_dist": "0.1.0",
        "command": "eat-dist evaluate runs/omniglot --protocol full",
        "target": {
            "kind": "run",
            "name": "omniglot",
            "members": 3,
            "weights_sha256": "68708e43f7b23367d8b0c1b89bb03c7b",
        },
        "dataset": "omniglot",
        "defense": defense,
        "protocol": "full",
        "norm": "linf",
        "epsilon": 0.1,
        "epsilons": list(EPSILONS),
        "fractions": [0.1, 0.5, 1.0],
        "seed": seed,
        "kmeans_seeds": 10,
        "images": 120,
        "classes": 12,
        "retrieval": "all_against_all",
        "queries": 120,
        "gallery": 120,
        "ensemble": {"clean": figures(*clean), "attacked": attacked, "worst": worst(attacked)},
        "members": members,
        "curves": [
            {
                "objective": objective,
                "attack": "pgd20" if epsilon else "clean",
                "epsilon": epsilon,
                "r_at_1": clean[0] * survive(epsilon),
                "nmi": 0.4 + (clean[1] - 0.4) * survive(epsilon),
                "nmi_std": 0.012,
                "success_rate": 1 - survive(epsilon),
            }
            for objective in OBJECTIVES
            for epsilon in EPSILONS
        ],
        "fractions_table": [
            {
                "fraction": fraction,
                "objective": objective,
                "nmi": clean[1] - fraction * (clean[1] - under(objective, strength)[1]),
                "nmi_std": 0.005,
                "ami": clean[1] - 0.12 - fraction * 0.2,
                "f1": 0.34 - 0.15 * fraction,
                "r_at_1": clean[0] * (1 - fraction * white),
            }
            for objective in ("nearest_negative", "random_wrong_centroid")
            for fraction in (0.1, 0.5, 1.0)
        ],
        "ladder": [
            {
                "attack": attack,
                "objective": "nearest_negative",
                "success_rate": share * white,
                "mean_value": share,
                "images": 100,
            }
            for attack, share in RUNGS.items()
        ],
        "norms": [
            {"norm": norm, "attack": attack, "epsilon": epsilon, "objective": "nearest_negative", "images": 100}
            | {"success_rate": success, "median_distance": distance}
            for norm, attack, epsilon, success, distance in OTHER_NORMS
        ],
        "transfer": {
            "attack": "pgd20/nearest_negative",
            "sources": [*models, "without_0", "without_1", "without_2"],
            "targets": [*models, "ensemble"],
            "success_rate": [
                [white if source == target else white * (0.35 + 0.07 * ((source + target) % 3)) for target in range(4)]
                for source in range(6)
            ],
        },
        "ers": {
            "images": 100,
            "r_at_1": 100 * clean[0],
            "corrected": ers(100 * strength),
            "compatible": ers(105 * strength),
        },
        "detector": {
            "fraction": 0.5,
            "unaware": {"auroc": 0.957, "tpr_at_5_fpr": 0.803},
            "aware": {"auroc": 0.571, "tpr_at_5_fpr": 0.084},
        },
        "sanity": [
            {"name": name, "claim": claim, "passed": name not in failing, "measured": measured, "threshold": threshold}
            for name, (claim, measured, threshold) in CHECKS.items()
        ],
    } | changes


def ers(score: float) -> dict[str, float]:
    """A score and its parts."""
    parts = {"ca_plus": 20.0, "ca_minus": 30.0, "qa_plus": 18.0, "qa_minus": 33.0, "tma": 0.412, "es_d": 0.955}
    return {"ers": score} | parts | {"es_r": 25.0, "ltm": 22.0, "gtm": 28.0, "gtt": 9.0}


def quick_evaluation(**changes: Any) -> dict[str, Any]:
    """What the protocol ``quick`` fills: no curves, ladder, members or checks."""
    full = evaluation(**changes)
    same = {key: full[key] for key in ("schema", "eat_dist", "command", "target", "dataset", "defense", "norm")}
    same |= {key: full[key] for key in ("epsilon", "seed", "images", "classes", "ensemble")}
    return same | {"protocol": "quick", "members": [], "sanity": []}


def showcase(*, seed: int = 0, images: int = 60, shown: int = 3, side: int = 28) -> dict[str, np.ndarray[Any, Any]]:
    """Embeddings of eight classes that an attack scatters, and a few pictures."""
    draw = np.random.default_rng(seed)
    labels = np.arange(images) % 8
    centres = draw.normal(size=(8, 16))

    def embedded(noise: float, of: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        points = centres[of] + noise * draw.normal(size=(images, 16))
        return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)

    def pictures(*shape: int) -> np.ndarray[Any, Any]:
        drawn = np.zeros((*shape, 1, side, side), dtype=np.float32)
        for index in np.ndindex(*shape):
            across, down = draw.integers(side // 6, side - side // 6, size=2)
            drawn[index][0, down - 2 : down + 2, side // 8 : -side // 8] = 1
            drawn[index][0, side // 8 : -side // 8, across - 2 : across + 2] = 1
        return drawn

    clean = pictures(shown)
    change = draw.choice([-0.1, 0.1], size=clean.shape).astype(np.float32)
    return {
        "clean_embeddings": embedded(0.25, labels),
        "attacked_embeddings": embedded(0.6, draw.permutation(labels)),
        "labels": labels.astype(np.int64),
        "clean_images": clean,
        "attacked_images": np.clip(clean + change, 0, 1),
        "neighbours_before": pictures(shown, 3),
        "neighbours_after": pictures(shown, 3),
        "right_before": np.tile(np.array([1, 1, 0], dtype=np.uint8), (shown, 1)),
        "right_after": np.tile(np.array([0, 0, 1], dtype=np.uint8), (shown, 1)),
    }


def history(*, iterations: int = 30, members: int = 3, adversarial: bool = True) -> pa.Table:
    """Statistics of a training whose losses fall; ``adversarial`` ones are null in a natural training."""
    rows = [
        dict.fromkeys(SCHEMA.names)
        | {
            "iteration": iteration,
            "epoch": iteration // 10,
            "member": member,
            "clean_loss": 13 - 6 * iteration / iterations + 0.2 * member,
            "adversarial_loss": 14 - 4 * iteration / iterations + 0.2 * member if adversarial else None,
            "fooled_rate": 1 - 0.3 * iteration / iterations if adversarial else None,
            "shared_vulnerability": 1 - 0.5 * iteration / iterations if adversarial else None,
            "received_from": [],
            "received_loss": [],
            "received_fooled_rate": [],
        }
        for iteration in range(iterations)
        for member in range(members)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_run(
    path: Path,
    *,
    summary: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    trained: pa.Table | None = None,
    arrays: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Folder:
    """Write an evaluated run folder.

    Args:
        path: Where; made if it is not there.
        summary: Of the evaluation; default: a full one.
        config: Content of ``config.yaml``.
        trained: Its training statistics; none are written without.
        arrays: The showcase; none is written without.
    """
    summary = evaluation() if summary is None else summary
    config = (
        {"name": path.name, "seed": summary["seed"], "defense": {"name": summary["defense"]}}
        if config is None
        else config
    )
    folder = Folder.at(path)
    folder.write("config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    where = f"evaluation/{summary['protocol']}"
    folder.write_json(f"{where}/summary.json", summary)
    if trained is not None:
        buffer = io.BytesIO()
        pq.write_table(trained, buffer)
        folder.write("statistics/00000000.parquet", buffer.getvalue())
    if arrays is not None:
        folder.write(f"{where}/showcase.safetensors", safetensors.numpy.save(arrays))
        names = [f"alphabet/character_{index}.png" for index in range(len(arrays["clean_images"]))]
        about = {
            "attack": "apgd100x5/random_wrong_centroid",
            "names": names,
            "classes": [f"letter {i}" for i in range(8)],
        }
        folder.write_json(f"{where}/showcase.json", about)
    return folder


def complete_run(path: Path, **changes: Any) -> Folder:
    """A run folder with every part; ``changes`` go to :func:`evaluation`."""
    summary = evaluation(**changes)
    adversarial = summary["defense"] not in (None, "natural")
    return write_run(path, summary=summary, trained=history(adversarial=adversarial), arrays=showcase())


# Without the parts that are drawn: it takes a second where a whole page takes ten.
BARE: dict[str, Any] = {"curves": [], "epsilons": [], "fractions_table": [], "ladder": []}
# With one drawing of each kind.
SHORT: dict[str, Any] = {
    "curves": [point for point in evaluation()["curves"] if point["objective"] == "displacement"][:2],
    "fractions_table": evaluation()["fractions_table"][:2],
}


def run_of(label: str, config: str = "", **changes: Any) -> Run:
    """A run as it is read, without files."""
    summary = Evaluation.model_validate(evaluation(**changes))
    return Run(label, summary, config, history(iterations=0), None)
