"""What an attack on a test set costs, in time and memory, against the number of images.

    python benchmarks/evaluation_scale.py --images 1000 4000 16000 60000

Each size runs in a process of its own: 28 × 28 noise images in classes of ten, an untrained network of three
convolutions with 64 numbers out, PGD-20 in batches of 256 through the evaluation's own job, on one thread. Times are
processor time, which other processes on the machine disturb less.
``random_wrong_centroid`` compares an image with the centroids, ``nearest_negative`` with all other images.
Memory is the process's peak resident set, less what it had when the images and their clean embeddings were there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from eat_dist.config import ModelConfig
from eat_dist.data.images import LabelledImages
from eat_dist.evaluation.crafting import Craft, Embed
from eat_dist.evaluation.plan import ENSEMBLE, Part
from eat_dist.evaluation.victim import Victim
from eat_dist.models.embedder import build_embedder
from eat_dist.seeding import generator

OBJECTIVES = ("random_wrong_centroid", "nearest_negative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000, 16000, 60000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.steps)))
        return
    print(f"| images | {' | '.join(f'{name}, ms an image' for name in OBJECTIVES)} | memory, MiB |")
    print("|---|" + "---|" * (len(OBJECTIVES) + 1))
    for count in arguments.images:
        command = [sys.executable, __file__, "--measure", str(count), "--steps", str(arguments.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        times = " | ".join(f"{1000 * found[name] / count:.2f}" for name in OBJECTIVES)
        print(f"| {count:,} | {times} | {found['memory']:.0f} |", flush=True)


def measure(count: int, steps: int) -> dict[str, float]:
    """Seconds of processor time for each objective, and mebibytes."""
    torch.set_num_threads(1)
    labels = torch.arange(count) // 10
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator(0, "images"))
    names = tuple(f"{index}.png" for index in range(count))
    test = LabelledImages(images, labels, tuple(f"class {label}" for label in range(int(labels.max()) + 1)), names)
    model = build_embedder(ModelConfig(widths=(16, 32, 64)), in_channels=1, generator=generator(0, "weights"))
    victim = Victim.of(model, test, seed=0, device="cpu")
    batches = torch.arange(count).split(256)
    embed = Embed()
    victim.learn({ENSEMBLE: torch.cat([embed(victim, batch)[ENSEMBLE] for batch in batches])})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {}
    for objective in OBJECTIVES:
        part = Part(ENSEMBLE, (ENSEMBLE,), "pgd", "linf", 0.1, steps, objective)
        job, begin = Craft(part), time.process_time()
        for batch in batches:
            job(victim, batch)
        found[objective] = time.process_time() - begin
    found["memory"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return found


if __name__ == "__main__":
    main()
