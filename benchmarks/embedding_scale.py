"""Processor seconds and memory of retrieval figures and of one k-means start, against the number of images.

    python benchmarks/embedding_scale.py [--images 1000 4000 …] [--parts retrieval kmeans quality]

Embeddings of 512 numbers in classes of 5.35 images, as many as the test set of Stanford Online Products has (60,502 of
11,316 classes): a random direction of each class, noise of twice its length, scaled to length 1. Every measurement
runs in a process of its own, on one thread. Seconds are the processor's: other load on the machine counts little. The
memory is what it takes at its highest beside the embeddings and the libraries. A third table compares k-means with
scikit-learn's and with faiss' own starts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from torch.nn import functional

from eat_dist.metrics import kmeans_labels, nmi, search
from eat_dist.seeding import generator

WHOLE, CLASSES, NUMBERS = 60_502, 11_316, 512
PARTS = ("retrieval", "kmeans", "quality")
SEEDS = 10


def embeddings_of(images: int, classes: int, numbers: int, *, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] of length 1 and [N] labels; ``noise`` is its expected length."""
    drawn = generator("embedding scale", images)
    centres = functional.normalize(torch.randn(classes, numbers, generator=drawn), dim=1)
    labels = torch.arange(images) % classes
    scattered = torch.randn(images, numbers, generator=drawn).mul_(noise / numbers**0.5)
    return functional.normalize(scattered.add_(centres[labels]), dim=1), labels


def peak() -> float:
    """The highest resident memory of this process since it was last forgotten, MB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1.024e-3


def measure(part: str, images: int) -> None:
    """Print seconds, MB and the figure of one part."""
    torch.set_num_threads(1)
    classes = round(CLASSES * images / WHOLE)
    embeddings, labels = embeddings_of(images, classes, NUMBERS, noise=2.0)
    # What the making of the embeddings took at its highest is forgotten.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, begin = peak(), time.process_time()
    if part == "retrieval":
        own = torch.arange(images)
        found = search(embeddings, labels, embeddings, labels, ks=(1, 2, 4, 8), exclude_self=own)
        value = float(found.average_precision.mean())
    else:
        value = nmi(labels, kmeans_labels(embeddings, classes, seed=0, n_init=1))
    print(time.process_time() - begin, peak() - before, value)


def scale_table(part: str, sizes: list[int]) -> None:
    figure = {"retrieval": "mAP@R", "kmeans": "NMI"}[part]
    print(f"\n| {part}: images | classes | seconds | MB | {figure} |\n|---|---|---|---|---|")
    for images in sizes:
        command = [sys.executable, __file__, "--measure", part, "--images", str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, memory, value = (float(word) for word in done.stdout.split())
        classes = round(CLASSES * images / WHOLE)
        print(f"| {images:,} | {classes:,} | {seconds:.1f} | {memory:,.0f} | {value:.3f} |", flush=True)


def quality_table() -> None:
    """2,120 embeddings of 192 numbers in 106 classes, hard to tell apart: the form of an attacked Omniglot test set."""
    embeddings, labels = embeddings_of(2_120, 106, 192, noise=2.5)
    points = embeddings.numpy()
    print(f"\n| k-means, {SEEDS} seeds of 10 starts | sum of squared distances | NMI | seconds |\n|---|---|---|---|")
    for name, cluster in (
        ("eat_dist", lambda seed: kmeans_labels(embeddings, 106, seed=seed)),
        ("scikit-learn", lambda seed: KMeans(106, n_init=10, random_state=seed).fit_predict(points)),
        ("faiss, its k-means++", lambda seed: faiss_labels(points, 106, seed)),
    ):
        begin = time.process_time()
        found = [cluster(seed) for seed in range(SEEDS)]
        seconds = (time.process_time() - begin) / SEEDS
        sums = [sum_of_squares(points, clusters) for clusters in found]
        scores = [nmi(labels, clusters) for clusters in found]
        print(
            f"| {name} | {statistics.mean(sums):.2f} ± {statistics.stdev(sums):.2f} "
            f"| {statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f} | {seconds:.1f} |",
            flush=True,
        )


def faiss_labels(points: npt.NDArray[np.float32], clusters: int, seed: int) -> npt.NDArray[np.int64]:
    settings = {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, "niter": 300, "nredo": 10}
    few = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
    kmeans = faiss.Kmeans(points.shape[1], clusters, seed=seed, **settings, **few)
    kmeans.train(points)
    labels: npt.NDArray[np.int64] = kmeans.assign(points)[1]
    return labels


def sum_of_squares(points: npt.NDArray[np.float32], clusters: npt.NDArray[np.int64]) -> float:
    return sum(float(np.square(own - own.mean(axis=0)).sum()) for own in (points[clusters == c] for c in set(clusters)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 4_000, 16_000, WHOLE])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--measure", choices=PARTS[:2], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.images[0])
        return
    for part in arguments.parts:
        if part == "quality":
            quality_table()
        else:
            scale_table(part, arguments.images)


if __name__ == "__main__":
    main()
