"""What the tests of the evaluation share: small trained ensembles, a small test set, and ways to attack and measure."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eat_dist.config import DataConfig, EvaluationConfig, LossConfig, ModelConfig
from eat_dist.data.images import ImageSet, LabelledImages, ZeroShotData
from eat_dist.data.load import load_dataset
from eat_dist.evaluation import Victim, evaluate
from eat_dist.evaluation.crafting import Craft, Crafted, Embed
from eat_dist.evaluation.plan import Part
from eat_dist.losses import make_loss
from eat_dist.models.embedder import build_embedder
from eat_dist.models.ensemble import EmbeddingEnsemble
from eat_dist.seeding import generator
from eat_dist.storage import Folder

MODEL = ModelConfig(widths=(16, 32), embedding_dim=16)
QUICK = EvaluationConfig(num_steps=10, kmeans_seeds=2)
QUICK_OBJECTIVES = EvaluationConfig().objectives
# Every group of the protocol, each as small as it can be and still mean something.
FULL = EvaluationConfig(
    protocol="full",
    epsilons=(0.0, 0.1, 0.2),
    apgd_steps=8,
    restarts=2,
    square_queries=20,
    sample=20,
    ers_images=5,
    kmeans_seeds=1,
    batch_size=40,
)
CLUSTERING = ("nmi", "ami", "f1")


@functools.cache
def digits() -> ZeroShotData:
    return load_dataset(DataConfig(dataset="digits"))


@functools.cache
def unseen(per_class: int) -> LabelledImages:
    """Images of the 5 test classes, in order of the classes; not to be changed."""
    whole = digits().test
    assert isinstance(whole, LabelledImages)
    chosen = torch.cat([(whole.labels == label).nonzero()[:per_class, 0] for label in range(5)])
    names = tuple(whole.names[index] for index in chosen.tolist())
    return LabelledImages(whole.images[chosen], whole.labels[chosen], whole.class_names, names)


@functools.cache
def _trained(seed: int) -> nn.Module:
    train = digits().train
    model = build_embedder(MODEL, in_channels=1, generator=generator(seed, "weights"))
    loss = make_loss(LossConfig(), num_classes=5, embedding_dim=16, generator=generator(seed, "proxies"))
    groups = [{"params": model.parameters()}, {"params": loss.parameters(), "lr": 0.1}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3)
    drawn = generator(seed, "batches")
    for _ in range(120):
        batch = train.batch(torch.randint(len(train), (60,), generator=drawn), "cpu")
        optimiser.zero_grad()
        loss(model(batch.images), batch.labels).backward()
        optimiser.step()
    return model.eval()


def undefended(members: int = 2) -> EmbeddingEnsemble:
    """Members after two seconds of training without a defence each, clean R@1 above 0.8."""
    return EmbeddingEnsemble([copy.deepcopy(_trained(seed)) for seed in range(members)])


def untrained(members: int, seed: int = 0) -> EmbeddingEnsemble:
    return EmbeddingEnsemble(
        [build_embedder(MODEL, in_channels=1, generator=generator(seed, rank)).eval() for rank in range(members)]
    )


def measure(model: nn.Module, images: ImageSet, location: Path, **changes: Any) -> dict[str, Any]:
    """The quick protocol at ε = 0.2 in L∞, unless changed."""
    settings = {"config": QUICK, "norm": "linf", "epsilon": 0.2, "seed": 0, "device": "cpu"}
    return evaluate(model, images, **(settings | changes), folder=Folder.at(location))


def victim_of(model: nn.Module, images: ImageSet, *, seed: int = 0, other: nn.Module | None = None) -> Victim:
    """A copy of the model under attack, which knows its clean embeddings."""
    victim = Victim.of(copy.deepcopy(model), images, seed=seed, device="cpu", other=copy.deepcopy(other))
    victim.learn(Embed()(victim, torch.arange(len(images))))
    return victim


def quick_part(objective: str, **changes: Any) -> Part:
    settings: dict[str, Any] = {"source": "ensemble", "targets": ("ensemble",), "attack": "pgd", "norm": "linf"}
    settings |= {"epsilon": 0.2, "num_steps": 10, "objective": objective, "keep": "last"}
    return Part(**(settings | changes))


def crafted(victim: Victim, part: Part, batch_size: int = 150) -> list[Crafted]:
    """All images attacked, in batches."""
    batches = torch.arange(len(victim.test)).split(batch_size)
    return [Craft(part, with_images=True)(victim, batch) for batch in batches]


def images_of(batches: list[Crafted]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches if batch.images is not None])


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each part is: a rewritten one is a new file."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "parts").iterdir()}


def rewritten(folder: Path, before: dict[str, tuple[int, int]]) -> set[str]:
    return {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an evaluation."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Full:
    """A finished full evaluation; its folder is not to be changed."""

    folder: Path
    results: dict[str, Any]
    progress: list[tuple[str, float, float]]


@functools.cache
def full_evaluation() -> Full:
    """Of the undefended ensemble of two on 60 images at ε = 0.2; takes seconds, so all tests share it."""
    folder = Path(tempfile.mkdtemp(prefix="full-evaluation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    progress: list[tuple[str, float, float]] = []
    results = measure(undefended(), unseen(12), folder, config=FULL, on_progress=lambda *call: progress.append(call))
    return Full(folder, results, progress)
