"""Both architectures of the paper on ten classes of CUB-200: whether losses fall, and the memory of a member.

    python benchmarks/cub_mini.py [--seeds 0 1 2] [--out bench/cub_mini]

The photographs must be in data/cub_mini (docs/datasets.md). Prints one line a config: means and standard deviations
over the seeds. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.history import read_history
from eat_dist.runs import start_run
from eat_dist.storage import Folder

CONFIGS = ("cub_mini_mobilenet", "cub_mini_bn_inception")
SHARE = 5  # the first and the last fifth of the iterations are compared


def measure(name: str, seed: int, out: Path) -> dict[str, float]:
    folder = out / f"{name}-{seed}"
    if not (folder / "summary.json").exists():
        options = [f"seed={seed}", "tracking.enabled=false"]
        config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml", options)
        start_run(config, run_dir=str(folder), overwrite=folder.exists(), console=Console())
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    history = read_history(Folder.at(folder).child("statistics")).to_pylist()
    few = summary["iterations"] // SHARE
    figures = {
        "peak memory of a member, MiB": max(summary["peak_memory_mib"]),
        "training, s": summary["seconds"],
        "clean R@1": summary["clean"]["r_at_1"],
        "worst R@1": summary["worst"]["r_at_1"],
    }
    for loss in ("clean_loss", "adversarial_loss", "fooled_rate"):
        first = [row[loss] for row in history if row["iteration"] < few]
        last = [row[loss] for row in history if row["iteration"] >= summary["iterations"] - few]
        figures |= {f"{loss}, first fifth": statistics.fmean(first), f"{loss}, last fifth": statistics.fmean(last)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/cub_mini"))
    arguments = parser.parse_args()
    for name in CONFIGS:
        measured = [measure(name, seed, arguments.out) for seed in arguments.seeds]
        print(f"{name}, seeds {arguments.seeds}")
        for figure in measured[0]:
            values = [one[figure] for one in measured]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"  {figure:32s} {statistics.fmean(values):9.3f} ± {spread:.3f}")


if __name__ == "__main__":
    main()
