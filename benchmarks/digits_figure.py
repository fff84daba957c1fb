"""The README's picture: the default run against natural training, clean and under each attack.

python benchmarks/digits_figure.py --out docs/images/digits.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.runs import start_run

CONDITIONS = {
    "clean": "clean",
    "pgd20/random_wrong_centroid": "towards a random\nwrong class",
    "pgd20/nearest_wrong_centroid": "towards the nearest\nwrong class",
    "pgd20/nearest_negative": "towards the nearest\nimage of another class",
    "worst": "the worst of\nthe three",
}
EPSILON = 0.1
"""Half of what the default run trains at: at all of it hardly an image survives the last of the attacks."""
COLOURS = {"natural": "#9aa5b1", "eat": "#0b6e99"}
LABELS = {"natural": "natural training", "eat": "EAT"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/images/digits.png")
    parser.add_argument("--runs", default="bench/digits", help="folder of the runs; finished ones are kept")
    arguments = parser.parse_args()
    figures = {defense: run(defense, Path(arguments.runs)) for defense in LABELS}
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    draw(figures).savefig(arguments.out, dpi=150)


def run(defense: str, folder: Path) -> dict[str, float]:
    """R@1 by condition."""
    target = folder / defense
    if not (target / "summary.json").exists():
        fast = ["cluster.backend=local", "evaluation.members=false", "tracking.enabled=false"]
        fast.append(f"evaluation.epsilon={EPSILON}")
        config = load_config(None, [f"defense.name={defense}", *fast])
        start_run(config, run_dir=str(target), overwrite=True, console=Console())
    summary = json.loads((target / "summary.json").read_text())
    found = {"clean": summary["clean"], "worst": summary["worst"], **summary["attacked"]}
    return {condition: found[condition]["r_at_1"] for condition in CONDITIONS}


def draw(figures: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.38
    for shift, (defense, values) in zip((-width / 2, width / 2), figures.items(), strict=True):
        places = [place + shift for place in range(len(values))]
        bars = axes.bar(
            places, [100 * v for v in values.values()], width, color=COLOURS[defense], label=LABELS[defense]
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    axes.set_xticks(range(len(CONDITIONS)), CONDITIONS.values(), fontsize=9)
    axes.set_ylabel("R@1 in %, unseen digits 5–9")
    axes.set_ylim(0, 109)
    axes.set_title(f"Ensembles of three on handwritten digits; every pixel attacked by up to {EPSILON}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    return figure


if __name__ == "__main__":
    main()
