"""Images a second of each way to make batches, and the share of a training iteration that waits for them.

    python benchmarks/loading.py [FOLDER] [--size 224] [--backbone mobilenet_v2] …

FOLDER has a folder of images for each class, at least four; without it 480 JPEGs of 500 × 375 pixels (smooth noise,
eight classes) are made in a temporary folder.

The first table has torchvision's ImageFolder and DataLoader beside the loader of the package over the same training
images, the same crops and flips, batch size and number of processes. The second trains one member with PGD-5 for real
and reads the waits from its history. Whatever is compared takes turns; figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from eat_dist.config import load_config
from eat_dist.data.images import ImageSet
from eat_dist.data.load import load_dataset
from eat_dist.data.loader import make_loader
from eat_dist.data.splits import make_splits
from eat_dist.history import read_history
from eat_dist.in_process import train_in_process
from eat_dist.seeding import generator
from eat_dist.storage import Folder

CPU = torch.device("cpu")


def make_images(root: Path) -> None:
    for number in range(480):
        folder = root / f"class_{number % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8, generator=generator(number)).numpy()
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def settings_of(arguments: argparse.Namespace, root: Path) -> list[str]:
    return [
        "data.dataset=folder",
        f"data.root={root}",
        "data.train_share=0.99",  # all classes but two
        f"data.image_size={arguments.size}",
        "data.augmentation=crop_flip",
        f"data.batch_size={arguments.batch}",
        "data.sampler=shuffle",
    ]


def torchvision_batches(root: Path, train: ImageSet, arguments: argparse.Namespace) -> Iterator[Any]:
    """What one writes without the package: ImageFolder, RandomResizedCrop and flip, DataLoader."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(arguments.size),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    files = ImageFolder(str(root), transform=transform)
    place = {str(Path(path).relative_to(root)): index for index, (path, _) in enumerate(files.samples)}
    chosen = Subset(files, [place[name] for name in train.names])
    endless = RandomSampler(chosen, num_samples=10**7)
    loader: DataLoader[Any] = DataLoader(
        chosen,
        arguments.batch,
        sampler=endless,
        num_workers=arguments.workers,
        multiprocessing_context="spawn" if arguments.workers else None,
        drop_last=True,
    )
    return iter(loader)


def rates(root: Path, train: ImageSet, arguments: argparse.Namespace) -> None:
    """The first table."""
    streams: dict[str, Iterator[Any]] = {}
    with ExitStack() as opened:
        streams["torchvision"] = torchvision_batches(root, train, arguments)
        for cache in ("none", "device"):
            config = load_config(
                None, [*settings_of(arguments, root), f"data.cache={cache}", f"data.workers={arguments.workers}"]
            ).data
            begin = time.perf_counter()
            loader = opened.enter_context(
                make_loader(
                    config, train, split=np.arange(len(train)), seed=0, rank=0, device=CPU, members_here=1, cpus=1
                )
            )
            streams[cache] = map(loader.batch, itertools.count())
            print(f"`cache: {cache}`, ready after {time.perf_counter() - begin:.1f} s: {loader.description}")
        taken: dict[str, list[float]] = {name: [] for name in streams}
        for turn in range(arguments.repeats + 1):  # the first starts the processes and is left out
            for name, stream in streams.items():
                for _ in range(3 * max(1, arguments.workers)):  # what was made ahead during the others' turns
                    next(stream)
                begin = time.perf_counter()
                for _ in range(arguments.iterations):
                    next(stream)
                if turn:
                    taken[name].append(arguments.batch * arguments.iterations / (time.perf_counter() - begin))
    print("\n| images a second | median | lowest … highest turn | × torchvision |\n|---|---|---|---|")
    for name, values in taken.items():
        ratio = statistics.median(value / other for value, other in zip(values, taken["torchvision"], strict=True))
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} … {max(values):.0f} | {ratio:.2f} |")


def waits(root: Path, train: ImageSet, arguments: argparse.Namespace) -> None:
    """The second table."""
    ways = {
        "auto": ["data.cache=auto"],
        f"none, workers {arguments.workers}": ["data.cache=none", f"data.workers={arguments.workers}"],
        "none, workers 0": ["data.cache=none", "data.workers=0"],
    }
    per_epoch = -(-len(train) // arguments.batch)
    epochs = -(-(arguments.steps + 3) // per_epoch)
    shares: dict[str, list[float]] = {name: [] for name in ways}
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            config = load_config(
                None,
                [
                    *settings_of(arguments, root),
                    *way,
                    f"model.backbone={arguments.backbone}",
                    "defense.name=pgd_at",
                    "attack.num_steps=5",
                    "attack.epsilon=4/255",
                    "ensemble.members=1",
                    f"train.epochs={epochs}",
                    "checkpoint.every=1000",
                    "cluster.backend=local",
                    "cluster.threads_per_member=1",
                    "evaluation.protocol=none",
                    "tracking.enabled=false",
                ],
            )
            splits = make_splits(train.labels, config.ensemble.split, members=1, seed=0)
            with tempfile.TemporaryDirectory() as folder:
                train_in_process(config, train, splits=splits, run_folder=Folder.at(folder))
                rows = read_history(Folder.at(folder).child("statistics")).to_pylist()
            rows = rows[
                3 : 3 + arguments.steps
            ]  # a row has the times of the iteration before; the first two start processes and warm up
            waited, total = (sum(row[column] for row in rows) for column in ("data_wait_ms", "iteration_ms"))
            shares[name].append(100 * waited / total)
            milliseconds[name].append(total / len(rows))
    print(f"\n| PGD-5, {arguments.backbone} | ms an iteration | waiting for data, ms | share |\n|---|---|---|---|")
    for name in ways:
        iteration, share = statistics.median(milliseconds[name]), statistics.median(shares[name])
        low, high = min(shares[name]), max(shares[name])
        print(f"| {name} | {iteration:.0f} | {iteration * share / 100:.1f} | {share:.2f} % ({low:.2f} … {high:.2f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=224, help="of the crops, pixels")
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--workers", type=int, default=1, help="decoding processes")
    parser.add_argument("--iterations", type=int, default=10, help="batches of a turn in the first table")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument(
        "--steps", type=int, default=6, help="training iterations of a turn in the second table; 0: none"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary  # where the shards are prepared
        root = arguments.folder
        if root is None:
            root = Path(temporary) / "images"
            make_images(root)
        train = load_dataset(load_config(None, settings_of(arguments, root)).data).train
        height, width = train.sizes.double().mean(dim=0).tolist()
        print(f"{os.cpu_count()} CPUs, torch {torch.__version__}; {arguments.workers} decoding processes")
        print(f"{len(train)} images of {width:.0f} × {height:.0f} pixels on average", end="; ")
        print(f"batches of {arguments.batch} at {arguments.size} pixels\n")
        rates(root, train, arguments)
        if arguments.steps:
            waits(root, train, arguments)


if __name__ == "__main__":
    main()
