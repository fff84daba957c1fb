"""From measured parts to ``summary.json`` and ``results.parquet`` (docs/evaluation_files.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eat_dist.config import EvaluationConfig
from eat_dist.data.images import ImageSet
from eat_dist.evaluation.figures import Retrieval
from eat_dist.evaluation.measure import NOT_ATTACKED
from eat_dist.evaluation.plan import ENSEMBLE, Part, Plan
from eat_dist.evaluation.sanity import defense_checks, sanity_checks
from eat_dist.evaluation.sizes import Sizes
from eat_dist.metrics.spared import counted_figure
from eat_dist.storage import Folder

Measured = Mapping[Part, Mapping[str, Any]]


def results_of(
    *,
    config: EvaluationConfig,
    sizes: Sizes,
    seed: int,
    plan: Plan,
    test: ImageSet,
    retrieval: Retrieval,
    members: Sequence[str],
    clean: Mapping[str, Mapping[str, Any]],
    measured: Measured,
    ers: Mapping[str, Any] | None,
    defense: Mapping[str, Any] | None,
    randomised: bool,
) -> dict[str, Any]:
    """Assemble the results; nothing here depends on when or how often an evaluation was interrupted."""
    full = config.protocol == "full"
    checks = sanity_checks(plan, clean, measured, test, randomised=randomised) if full else []
    if defense is not None:
        checks += defense_checks(plan, measured, randomised=randomised, averaged=not full)
    entries = {name: _entry(name, clean[name], plan, sizes, measured, randomised=randomised) for name in clean}
    return {
        "protocol": config.protocol,
        "norm": sizes.norm,
        "epsilon": sizes.epsilon,
        "num_steps": plan.main[0].num_steps,
        "epsilons": list(sizes.epsilons) if plan.curves else [],
        "seed": seed,
        "kmeans_seeds": sizes.kmeans_seeds,
        "images": len(test),
        "classes": test.num_classes,
        "images_sha256": test.digest(),
        "retrieval": retrieval.kind,
        "queries": len(retrieval.queries),
        "gallery": len(retrieval.gallery),
        "sample": min(config.sample, len(retrieval.queries)) if any(part.sampled for part in plan.parts) else None,
        "inference": None if defense is None else _inference(defense, plan, measured),
        "ensemble": entries[ENSEMBLE],
        "members": [entries[name] for name in members],
        "curves": list(_curves(plan, sizes, clean, measured)),
        "fractions_table": list(_fractions(plan, clean, measured)),
        "ladder": [_compared(part, measured[part]) for part in plan.ladder],
        "norms": [
            {"norm": part.norm, "epsilon": part.epsilon, **_compared(part, measured[part])} for part in plan.norms
        ],
        "transfer": _transfer(plan, measured),
        "ers": ers,
        "detector": _detector(plan, measured),
        "sanity": checks,
        "parts": [_row(part, target, measured[part]) for part in plan.parts for target in part.targets],
    }


def write_results(folder: Folder, results: Mapping[str, Any]) -> None:
    """``results.parquet``, then ``summary.json``.

    Raises:
        StorageError: They cannot be written.
    """
    folder.write("results.parquet", _parquet(results))
    folder.write_json("summary.json", {name: value for name, value in results.items() if name != "parts"})


def _entry(
    target: str, clean: Mapping[str, Any], plan: Plan, sizes: Sizes, measured: Measured, *, randomised: bool
) -> dict[str, Any]:
    """``clean``, ``attacked`` and ``worst`` of one target."""
    listed = [part for part in (*plan.main, *plan.square) if target in part.targets]
    # Whatever broke an image within the norm and ε broke it, whichever table it was measured for.
    within = [
        measured[part]["targets"][target]
        for part in plan.parts
        if target in part.targets and part.norm == sizes.norm and 0 < part.epsilon <= sizes.epsilon
    ]
    bits = [clean["retrieved"], *(part["retrieved"] for part in within)]
    whole = [part["figures"] for part in within if "nmi" in part["figures"]] or [clean["figures"]]
    return {
        "clean": clean["figures"],
        "attacked": {part.key(target): measured[part]["targets"][target]["figures"] for part in listed},
        "worst": {"r_at_1": _surviving(bits, randomised=randomised)}
        | {name: _lowest(whole, name) for name in ("nmi", "ami", "f1")},
    }


def _lowest(attacks: Sequence[Mapping[str, float]], name: str) -> float:
    values = (counted_figure(figures, name).value for figures in attacks)
    return min(value for value in values if value is not None)


def _surviving(bits: Sequence[str], *, randomised: bool) -> float:
    """R@1 under several attacks, from the bits of each, those of the clean images first.

    A query counts if it survives every one. Behind a randomised defense every attack meets another draw: a query that
    survived each with the same chance would be lost to the number of attacks alone. There it is the lowest R@1 under
    any one of them, a query that it did not attack counted as it is when clean.
    """
    if randomised:
        attacked = [
            [own if bit == NOT_ATTACKED else bit for own, bit in zip(bits[0], row, strict=True)] for row in bits
        ]
        return min(row.count("1") for row in attacked) / len(bits[0])
    survived = [all(bit in ("1", NOT_ATTACKED) for bit in query) for query in zip(*bits, strict=True)]
    return sum(survived) / len(survived)


def _inference(defense: Mapping[str, Any], plan: Plan, measured: Measured) -> dict[str, Any]:
    """The defense, and what attackers who know of it leave, beside those who do not: never one without the other."""
    return {
        "name": defense["name"],
        "options": {name: value for name, value in defense.items() if name != "name"},
        "eot_draws": plan.main[0].draws,
        "attacks": [
            {
                "attack": adaptive.label,
                "objective": adaptive.objective,
                "adaptive": measured[adaptive]["targets"][ENSEMBLE]["figures"],
                "non_adaptive": measured[ignorant]["targets"][ENSEMBLE]["figures"],
            }
            for adaptive, ignorant in plan.pairs
        ],
    }


def _curves(
    plan: Plan, sizes: Sizes, clean: Mapping[str, Mapping[str, Any]], measured: Measured
) -> Iterator[dict[str, Any]]:
    names = ("r_at_1", "nmi", "nmi_std", "nmi_spared", "nmi_std_spared", "success_rate")
    for objective in dict.fromkeys(part.objective for part in plan.curves):
        parts = {part.epsilon: part for part in plan.curves if part.objective == objective}
        for epsilon in sizes.epsilons:
            if epsilon > 0:
                attack, figures = parts[epsilon].label, measured[parts[epsilon]]["targets"][ENSEMBLE]["figures"]
            else:
                attack, figures = "clean", clean[ENSEMBLE]["figures"] | {"success_rate": 0.0}
            shown = {name: figures[name] for name in names if name in figures}
            yield {"objective": objective, "attack": attack, "epsilon": epsilon, **shown}


def _fractions(plan: Plan, clean: Mapping[str, Mapping[str, Any]], measured: Measured) -> Iterator[dict[str, Any]]:
    for part in plan.main:
        found = measured[part]
        if "fractions" not in found:
            continue
        figures = found["targets"][ENSEMBLE]["figures"]
        everything = {name: figures[name] for name in ("nmi", "nmi_std", "ami", "ami_std", "f1", "f1_std")}
        last = {"fraction": 1.0, "r_at_1": figures["r_at_1_all_attacked"], **everything}
        for row in (*found["fractions"], last):
            yield {"objective": part.objective, "attack": part.label, **row}


def _compared(part: Part, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attack": part.label,
        "objective": part.objective,
        "success_rate": found["targets"][part.targets[0]]["figures"]["success_rate"],
        "mean_value": found["mean_value"],
        "median_distance": found["median_distance"],
        "images": found["images"],
    }


def _transfer(plan: Plan, measured: Measured) -> dict[str, Any] | None:
    if not plan.transfer:
        return None
    targets = list(dict.fromkeys(target for part in plan.transfer for target in part.targets))
    return {
        "attack": f"{plan.transfer[0].label}/{plan.transfer[0].objective}",
        "sources": [part.source for part in plan.transfer],
        "targets": targets,
        "images": measured[plan.transfer[0]]["images"],
        "success_rate": [
            [measured[part]["targets"][target]["figures"]["success_rate"] for target in targets]
            for part in plan.transfer
        ],
    }


def _detector(plan: Plan, measured: Measured) -> dict[str, Any] | None:
    if not plan.detector:
        return None
    unaware, aware = (
        {**measured[part]["detection"], "success_rate": measured[part]["targets"][ENSEMBLE]["figures"]["success_rate"]}
        for part in plan.detector
    )
    return {"fraction": unaware["fraction"], "attack": plan.detector[0].label, "unaware": unaware, "aware": aware}


def _row(part: Part, target: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "part": part.file,
        "target": target,
        "source": part.source,
        "attack": part.attack,
        "norm": part.norm,
        "epsilon": part.epsilon,
        "num_steps": part.num_steps,
        "restarts": part.restarts,
        "draws": part.draws,
        "objective": part.objective,
        "images": found["images"],
        "figures": {
            **found["targets"][target]["figures"],
            "mean_value": found["mean_value"],
            "median_distance": found["median_distance"],
        },
    }


_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("target", pa.string()),
        ("source", pa.string()),
        ("attack", pa.string()),
        ("norm", pa.string()),
        ("epsilon", pa.float64()),
        ("num_steps", pa.int64()),
        ("restarts", pa.int64()),
        ("draws", pa.int64()),
        ("objective", pa.string()),
        ("images", pa.int64()),
        ("figure", pa.string()),
        ("value", pa.float64()),
    ]
)


def _parquet(results: Mapping[str, Any]) -> bytes:
    """One row a figure; clean figures have attack ``none`` and ε = 0."""
    rows: list[dict[str, Any]] = []
    # The only member of an ensemble of one is the ensemble, and no target of its own.
    members = results["members"] if len(results["members"]) > 1 else ()
    clean: Sequence[tuple[str, Any]] = [
        (ENSEMBLE, results["ensemble"]),
        *((f"member_{rank}", member) for rank, member in enumerate(members)),
    ]
    for target, entry in clean:
        nothing = {
            "part": f"{target}-clean",
            "target": target,
            "source": "",
            "attack": "none",
            "norm": results["norm"],
            "epsilon": 0.0,
        }
        nothing |= {"num_steps": 0, "restarts": 0, "draws": 0, "objective": "", "images": results["images"]}
        rows += [{**nothing, "figure": name, "value": value} for name, value in entry["clean"].items()]
    for part in results["parts"]:
        about = {name: value for name, value in part.items() if name != "figures"}
        rows += [{**about, "figure": name, "value": value} for name, value in part["figures"].items()]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
    return bytes(sink.getvalue().to_pybytes())
