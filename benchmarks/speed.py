"""What the coordinator, the exchange and the attack loop cost, against bare loops measured in the same run.

    make bench        (or: python benchmarks/speed.py --members 2 4 8)

Each bare loop does the same forward and backward passes by hand: no Ray, no statistics, no exchange, one process a
member, so that it competes for the cores as the members do. The two kinds of run take turns. Images are the digits at
28 × 28 pixels in batches of 96: the size of an Omniglot run, with nothing to download.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from eat_dist.attacks import ATTACKS, WhiteBox
from eat_dist.attacks.objectives import batch_loss
from eat_dist.config import RunConfig, load_config
from eat_dist.data.load import load_dataset
from eat_dist.history import read_history
from eat_dist.losses import make_loss
from eat_dist.models import build_embedder
from eat_dist.optimisation import make_optimiser
from eat_dist.seeding import generator
from eat_dist.storage import Folder

# Left out of the medians: Ray's own processes are still importing, on the same cores, while the members begin.
WARM_UP = 25


def config_of(members: int, iterations: int) -> RunConfig:
    # 10 iterations make an epoch of the 901 training images.
    return load_config(
        None,
        [
            "data.image_size=28",
            "data.batch_size=96",
            "data.images_per_class=16",
            "attack.num_steps=5",
            f"ensemble.members={members}",
            f"train.epochs={iterations // 10}",
            "checkpoint.every=1000",
            "cluster.threads_per_member=1",
            "evaluation.protocol=none",
            "tracking.enabled=false",
        ],
    )


def batch_and_parts(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module, torch.nn.Module]:
    train = load_dataset(config.data).train
    batch = train.batch(torch.arange(config.data.batch_size), "cpu")
    model = build_embedder(config.model, in_channels=1, generator=generator(0))
    dimension = config.model.embedding_dim
    loss = make_loss(config.loss, num_classes=train.num_classes, embedding_dim=dimension, generator=generator(1))
    return batch.images, batch.labels, model, loss


def bare_pgd(
    model: torch.nn.Module, loss: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, config: RunConfig
) -> torch.Tensor:
    """PGD as one writes it by hand, in L∞."""
    epsilon, steps = config.attack.epsilon, config.attack.num_steps
    step = 2.5 * epsilon / steps
    model.eval()
    model.requires_grad_(False)
    adversarial = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(model(adversarial), labels), adversarial)
        moved = adversarial.detach() + step * gradient.sign()
        adversarial = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon).clamp(0, 1)
    model.requires_grad_(True)
    model.train()
    return adversarial


def bare_member(config: RunConfig, iterations: int, ready: object, times: object) -> None:
    """The passes of one EAT member: attack, clean and own adversarial images, a peer's batch (here its own)."""
    torch.set_num_threads(1)
    images, labels, model, loss = batch_and_parts(config)
    optimiser = make_optimiser(config.optimiser, model, loss)
    beta, gamma = config.defense.adversarial_share, config.defense.transfer_strength
    ready.wait()
    taken = []
    for _ in range(iterations):
        begin = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        adversarial = bare_pgd(model, loss, images, labels, config)
        clean, attacked = model(torch.cat([images, adversarial])).chunk(2)
        ((1 - beta) * loss(clean, labels) + beta * loss(attacked, labels)).backward()
        (gamma * loss(model(adversarial), labels)).backward()
        optimiser.step()
        taken.append(time.perf_counter() - begin)
    times.put(taken[WARM_UP:])


def run_bare(config: RunConfig, iterations: int) -> float:
    """Median milliseconds an iteration over all members' processes."""
    context = multiprocessing.get_context("spawn")
    ready, times = context.Barrier(config.ensemble.members), context.Queue()
    processes = [
        context.Process(target=bare_member, args=(config, iterations, ready, times))
        for _ in range(config.ensemble.members)
    ]
    for process in processes:
        process.start()
    taken = [value for _ in processes for value in times.get()]
    for process in processes:
        process.join()
    return statistics.median(taken) * 1000


def run_on_ray(config: RunConfig) -> tuple[float, float, float]:
    """Median milliseconds: an iteration, the exposed wait for the coordinator, the wait for peers' batches."""
    from eat_dist.cluster.train import train_on_ray  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        train_on_ray(config, num_classes=5, run_folder=Folder.at(folder))
        history = read_history(Folder.at(folder).child("statistics")).to_pylist()
    rows = [row for row in history if row["iteration"] > WARM_UP]
    names = ("iteration_ms", "coordinator_wait_ms", "exchange_wait_ms")
    iteration, coordinator, exchange = (statistics.median(row[name] for row in rows) for name in names)
    return iteration, coordinator, exchange


def members_table(sizes: list[int], iterations: int, repeats: int) -> None:
    print(
        "| members | bare loop, ms | on Ray, ms | added, ms | ratio | exposed coordinator wait, ms | batch wait, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for members in sizes:
        config = config_of(members, iterations)
        bare, ray = [], []
        for _ in range(repeats):  # in turns, so that a drift of the machine's speed meets both
            bare.append(run_bare(config, iterations))
            ray.append(run_on_ray(config))
        alone = statistics.median(bare)
        iteration, coordinator, exchange = (statistics.median(values) for values in zip(*ray, strict=True))
        print(
            f"| {members} | {alone:.0f} | {iteration:.0f} | {iteration - alone:+.0f} | {iteration / alone:.2f} "
            f"| {coordinator:.1f} | {exchange:.1f} |",
            flush=True,
        )


def attack_table(repeats: int) -> None:
    config = config_of(1, 10)
    torch.set_num_threads(1)
    images, labels, model, loss = batch_and_parts(config)
    model.train()
    attack = ATTACKS["pgd"](config.attack)
    objective = batch_loss(loss, labels)

    def ours() -> None:
        attack(WhiteBox(model, objective), images, generators=generator(2))

    def bare() -> None:
        bare_pgd(model, loss, images, labels, config)

    mine, other = in_turns(ours, bare, repeats)
    print("\n| PGD-5, batch of 96 | ms |\n|---|---|")
    print(f"| hand-written loop | {other:.1f} |\n| eat_dist.attacks | {mine:.1f} |\n| ratio | {mine / other:.3f} |")


def in_turns(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median milliseconds of two functions called in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, times in zip((first, second), taken, strict=True):
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(taken[0][2:]), statistics.median(taken[1][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--iterations", type=int, default=60, help="of a run; a multiple of 10")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind, in turns")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, torch {torch.__version__}, one thread a member\n")
    members_table(arguments.members, arguments.iterations, arguments.repeats)
    attack_table(repeats=30)


if __name__ == "__main__":
    main()
