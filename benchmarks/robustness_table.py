"""The table of docs/results.md from evaluated runs: ``eat-dist evaluate RUN --protocol full`` for each, then

    python benchmarks/robustness_table.py RUN…

A row a run: clean, under the strongest single attack on all images, under all attacks together, and the verdicts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

COLUMNS = (
    "run",
    "seed",
    "clean R@1",
    "clean NMI",
    "R@1, strongest attack",
    "R@1, all attacks",
    "NMI, all attacks",
    "ERS (as published)",
    "L2: APGD, CW",
    "JSMA",
    "detector AUROC, unaware → aware",
    "checks passed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run evaluated with the full protocol"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for run in parser.parse_args().runs:
        results = json.loads((run / "evaluation" / "full" / "summary.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        print("| " + " | ".join(row(results, config)) + " |")


def row(results: dict[str, Any], config: dict[str, Any]) -> list[str]:
    ensemble = results["ensemble"]
    whole = {name: figures for name, figures in ensemble["attacked"].items() if "nmi" in figures}
    strongest = min(whole, key=lambda name: whole[name]["r_at_1"])
    in_norm = {(entry["norm"], entry["attack"]): entry["success_rate"] for entry in results["norms"]}
    l2 = [rate for (norm, attack), rate in in_norm.items() if norm == "l2" and not attack.startswith("pgd")]
    l0 = [rate for (norm, _), rate in in_norm.items() if norm == "l0"]
    detector = results["detector"]
    passed = sum(check["passed"] for check in results["sanity"])
    rule = f", {config['defense']['transfer_rule']}" if results["defense"] == "eat" else ""
    return [
        f"{results['defense']} × {config['ensemble']['members']}{rule}",
        str(config["seed"]),
        f"{ensemble['clean']['r_at_1']:.3f}",
        f"{ensemble['clean']['nmi']:.3f}",
        f"{whole[strongest]['r_at_1']:.3f} ({strongest})",
        f"**{ensemble['worst']['r_at_1']:.3f}**",
        f"**{ensemble['worst']['nmi']:.3f}**",
        f"{results['ers']['corrected']['ers']:.1f} ({results['ers']['compatible']['ers']:.1f})",
        ", ".join(percent(rate) for rate in l2),
        ", ".join(percent(rate) for rate in l0),
        "–" if detector is None else f"{detector['unaware']['auroc']:.2f} → {detector['aware']['auroc']:.2f}",
        f"{passed} of {len(results['sanity'])}",
    ]


def percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.0f} %"


if __name__ == "__main__":
    main()
