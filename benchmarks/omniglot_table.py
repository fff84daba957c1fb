"""The Omniglot table of docs/results.md: natural, PGD-AT and EAT ensembles at equal epochs and at equal passes.

    python benchmarks/omniglot_table.py --data ../shared/data/omniglot --out bench/omniglot

A finished run is not trained again, so the command can be interrupted and repeated, and several processes can share
the work: ``--rows natural pgd_at`` trains only those. The table is printed from whatever runs are finished.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.runs import start_run

REPOSITORY = Path(__file__).resolve().parents[1]
NEAREST, RANDOM = "pgd20/nearest_wrong_centroid", "pgd20/random_wrong_centroid"


@dataclass(frozen=True)
class Row:
    """One kind of run."""

    label: str
    settings: tuple[str, ...]
    epochs_factor: float = 1.0


# A step of uniform transfer takes 8 passes (5 attack, clean, adversarial, received), one of PGD-AT 7.
ROWS = {
    "natural": Row("natural × 3", ("defense.name=natural", "evaluation.members=false")),
    "pgd_at": Row("PGD-AT × 3", ("defense.name=pgd_at", "evaluation.members=true")),
    "eat_uniform": Row(
        "EAT × 3, uniform, γ = 0.5",
        ("defense.name=eat", "defense.transfer_rule=uniform", "evaluation.members=false"),
    ),
    "eat_relay": Row(
        "EAT × 3, relay, K₁ = 2",
        ("defense.name=eat", "defense.transfer_rule=relay", "evaluation.members=false"),
    ),
    "pgd_at_matched": Row(
        "PGD-AT × 3, passes of EAT uniform", ("defense.name=pgd_at", "evaluation.members=false"), epochs_factor=8 / 7
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/omniglot", help="folder of the two archives")
    parser.add_argument("--out", default="bench/omniglot", help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], help="of the three convolutions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    arguments = parser.parse_args()
    out = Path(arguments.out)
    for seed in arguments.seeds:
        for name in arguments.rows:
            train(name, seed, out, arguments)
    print(table(out, arguments.seeds))


def train(name: str, seed: int, out: Path, arguments: argparse.Namespace) -> None:
    folder = out / f"{name}-{seed}"
    if (folder / "summary.json").exists():
        return
    row = ROWS[name]
    config = load_config(
        REPOSITORY / "configs" / "omniglot.yaml",
        [
            f"data.root={arguments.data}",
            f"seed={seed}",
            f"model.widths={arguments.widths}",
            f"train.epochs={round(arguments.epochs * row.epochs_factor)}",
            "evaluation.objectives=[nearest_wrong_centroid,random_wrong_centroid]",
            "evaluation.kmeans_seeds=3",
            "cluster.backend=local",
            "cluster.threads_per_member=1",
            "tracking.enabled=false",
            *row.settings,
        ],
    )
    start_run(config, run_dir=str(folder), overwrite=True, console=Console())


def table(out: Path, seeds: list[int]) -> str:
    lines = [
        "| | epochs | passes | clean R@1 | clean NMI | R@1, nearest | R@1, random | NMI, worst | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        summaries = [
            json.loads(path.read_text())
            for path in (out / f"{name}-{seed}" / "summary.json" for seed in seeds)
            if path.exists()
        ]
        if not summaries:
            continue
        if name == "pgd_at":
            singles = [summary["members"] for summary in summaries]
            lines.append(line("PGD-AT × 1 (a member of the next row)", summaries, singles))
        lines.append(line(row.label, summaries, [[summary] for summary in summaries]))
    return "\n".join(lines)


def line(label: str, summaries: list[dict], figures: list[list[dict]]) -> str:
    """One row: mean ± standard deviation over seeds, of the mean over a seed's entries."""

    def cell(*path: str) -> str:
        values = []
        for entries in figures:
            found = []
            for entry in entries:
                value = entry
                for key in path:
                    value = value[key]
                found.append(value)
            values.append(statistics.mean(found))
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    first = summaries[0]
    cells = [
        label,
        str(first["epochs"]),
        str(first["passes"]),
        cell("clean", "r_at_1"),
        cell("clean", "nmi"),
        cell("attacked", NEAREST, "r_at_1"),
        cell("attacked", RANDOM, "r_at_1"),
        cell("worst", "nmi"),
        str(len(summaries)),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
