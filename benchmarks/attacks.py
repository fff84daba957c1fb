"""PGD and Auto-PGD against those of torchattacks and foolbox: time and peak memory for as many gradients.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/attacks.py [--backbone resnet18 --size 64 --batch 32 --steps 20 --device cuda]

All attack the same model with the same objective (nearest_wrong_centroid), L∞ radius, step size, batch and number of
steps, from a random start. The two libraries attack classifiers, so they get a wrapper that puts out two "logits",
(0, v) with v an image's objective, and the label 0: their cross-entropy log(1 + e^v) rises where v does, and its
gradient is v's times a positive number, so its sign is the same. That they do the same work is checked first: from the
image itself, without a random start, three steps of the three PGDs have to end at the same images.

torchattacks' APGD is not among them: it only goes on with images that its classifier still gets right.

A model's parameters take gradients, as after training, unless the table says "frozen": foolbox then has no parameter
gradients to compute, which it otherwise does, and torchattacks no activations to keep for them. Ours freezes them
itself.

Times are medians of runs in turns: processor time of this process on a CPU, with one thread; elapsed time on a GPU.
Peak memory is that of tensors, above what they hold before the attack: as torch's profiler sees it on a CPU (no load
of the machine disturbs it), as the allocator does on a GPU. A ratio below 1 is in our favour.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

os.environ.setdefault("OMP_NUM_THREADS", "1")

import foolbox
import torch
import torchattacks
from torch import nn

from eat_dist.attacks import ATTACKS, Objective, WhiteBox
from eat_dist.attacks.objectives import class_centroids, nearest_wrong_centroid
from eat_dist.config import AttackConfig, ModelConfig
from eat_dist.models import build_embedder
from eat_dist.seeding import generator

EPSILON = 8 / 255
CLASSES = 10
COMPARED = [
    ("ours PGD", "torchattacks PGD"),
    ("ours PGD", "foolbox PGD"),
    ("ours APGD", "torchattacks PGD"),
    ("ours APGD", "foolbox PGD"),
]
Run = Callable[[], torch.Tensor]


class AsLogits(nn.Module):
    """The objective as a classifier of two classes, which a cross-entropy with label 0 climbs."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, 2]."""
        values = self.objective(self.model(images))
        return torch.stack([torch.zeros_like(values), values], dim=1)


def contenders(arguments: argparse.Namespace, *, frozen: bool, random_start: bool = True) -> dict[str, Run]:
    """By name: one whole attack on the same batch."""
    device, steps = torch.device(arguments.device), arguments.steps
    model = build_embedder(
        ModelConfig(backbone=arguments.backbone), in_channels=3, generator=generator(0, "weights")
    ).to(device)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, generator=generator(0, "images")).to(device)
    with torch.no_grad():
        model.train()(images)  # BatchNorm statistics that fit the images
        labels = (torch.arange(arguments.batch) % CLASSES).to(device)
        clean = model.eval()(images)
    model.requires_grad_(not frozen)
    objective = nearest_wrong_centroid(class_centroids(clean, labels, CLASSES), labels)
    logits, zeros = AsLogits(model, objective).eval(), torch.zeros_like(labels)

    step_size = 2.5 * EPSILON / steps
    settings = {"epsilon": EPSILON, "num_steps": steps, "random_start": random_start}
    pgd = ATTACKS["pgd"](AttackConfig(name="pgd", **settings))
    apgd = ATTACKS["apgd"](AttackConfig(name="apgd", **settings))
    their_pgd = torchattacks.PGD(logits, eps=EPSILON, alpha=step_size, steps=steps, random_start=random_start)
    in_foolbox = foolbox.PyTorchModel(logits, bounds=(0, 1), device=device)
    foolbox_pgd = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=random_start)
    surface = WhiteBox(model, objective)
    return {
        "ours PGD": lambda: pgd(surface, images, generators=generator(1, device=device)),
        "ours APGD": lambda: apgd(surface, images, generators=generator(1, device=device)),
        "torchattacks PGD": lambda: their_pgd(images, zeros),
        "foolbox PGD": lambda: foolbox_pgd.run(in_foolbox, images, zeros, epsilon=EPSILON),
    }


def check_same_work(arguments: argparse.Namespace) -> None:
    """Three steps of the three PGDs from the image itself.

    A pixel may differ where rounding turned the sign of a gradient near 0; over many steps a network amplifies that.
    """
    few = argparse.Namespace(**(vars(arguments) | {"steps": 3}))
    runs = contenders(few, frozen=True, random_start=False)
    ours = runs["ours PGD"]()
    for name in ("torchattacks PGD", "foolbox PGD"):
        share = float(((runs[name]() - ours).abs() > 1e-5).float().mean())
        assert share < 0.01, f"{name} ends elsewhere in {share:.1%} of the pixels"
        print(f"After three steps from the image itself, {name} and ours differ in {share:.3%} of the pixels.")


def milliseconds(run: Run, device: str) -> float:
    if device == "cpu":
        begin = time.process_time()
        run()
        return (time.process_time() - begin) * 1000
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1000


def times(arguments: argparse.Namespace, *, frozen: bool) -> dict[str, float]:
    """Median milliseconds by name; the runs take turns, the first round warms up."""
    runs = contenders(arguments, frozen=frozen)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats + 1):
        for name, run in runs.items():
            taken[name].append(milliseconds(run, arguments.device))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def peak(run: Run, device: str) -> float:
    """MiB that tensors take at most during the attack, above what they hold before it."""
    run()  # the first call of a library tries algorithms and fills caches
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def peaks(arguments: argparse.Namespace, *, frozen: bool) -> dict[str, float]:
    """MiB by name."""
    runs = contenders(arguments, frozen=frozen)
    return {name: peak(run, arguments.device) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="convnet")
    parser.add_argument("--size", type=int, default=32, help="pixels, square, three channels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{arguments.backbone}, {arguments.batch} images of {arguments.size} pixels, {arguments.steps} gradients, "
        f"{arguments.device}, torch {torch.__version__}.\n"
    )
    check_same_work(arguments)
    print("\n| parameters | ours | theirs | ms | ms, theirs | ratio | MiB | MiB, theirs | ratio |\n" + "|---" * 9 + "|")
    for frozen in (False, True):
        taken, held = times(arguments, frozen=frozen), peaks(arguments, frozen=frozen)
        parameters = "frozen" if frozen else "as trained"
        for ours, theirs in COMPARED:
            print(
                f"| {parameters} | {ours} | {theirs} | {taken[ours]:.0f} | {taken[theirs]:.0f} "
                f"| {taken[ours] / taken[theirs]:.3f} | {held[ours]:.1f} | {held[theirs]:.1f} "
                f"| {held[ours] / held[theirs]:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
