"""The attacked models with their test set: what a worker needs to craft and to embed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import nn

from eat_dist.attacks import MemberSum, Surface, WhiteBox, seeded
from eat_dist.data.images import ImageSet
from eat_dist.evaluation.detector import undetected
from eat_dist.evaluation.embed import embed_batch
from eat_dist.evaluation.figures import Retrieval
from eat_dist.evaluation.plan import ALL_MEMBERS, ENSEMBLE, UNDEFENDED
from eat_dist.evaluation.references import OBJECTIVES, Aimed, References
from eat_dist.inference import Defended, defenses_of, drawing
from eat_dist.models.ensemble import EmbeddingEnsemble, fuse, undefended, weights_digest
from eat_dist.seeding import generator

# Of the disagreement in the objective of an attacker who knows the detector. Larger ones hide more than they break
# (docs/metrics.md).
DETECTION_WEIGHT = 0.03

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass
class Victim:
    """One ensemble, or anybody's model, under attack on one test set.

    Attributes:
        models: ``ensemble`` (the fused ensemble, or the single model), ``member_I`` for each of several members,
            behind a defense at inference ``undefended``, the ensemble without it, and maybe ``other``, a model to craft
            transfer attacks on; all on ``device``, float32, evaluation mode.
        test: N images.
        seed: Of the evaluation.
        device: Where to compute.
        clean: Clean embeddings [N, D] of each of ``models``, on the CPU; :meth:`learn` sets them.
    """

    models: Mapping[str, nn.Module]
    test: ImageSet
    seed: int
    device: torch.device | str
    clean: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        test: ImageSet,
        *,
        seed: int,
        device: torch.device | str,
        other: nn.Module | None = None,
    ) -> Victim:
        """The models behind ``model``, which is moved to ``device``: an ensemble's members are attacked one by one."""
        whole = _ready(model, device)
        models: dict[str, nn.Module] = {ENSEMBLE: whole}
        if isinstance(whole, EmbeddingEnsemble) and len(whole.members) > 1:
            models |= {f"member_{rank}": member for rank, member in enumerate(whole.members)}
        if defenses_of([whole]):
            models[UNDEFENDED] = undefended(whole)
        if other is not None:
            models["other"] = _ready(other, device)
        return cls(models, test, seed, device)

    def __post_init__(self) -> None:
        self.retrieval = Retrieval.of(self.test)
        self._references: dict[str, References] = {}
        self._searched: dict[str, torch.Tensor] = {}

    @property
    def members(self) -> int:
        """M; 1 for a single model."""
        return max(1, sum(name.startswith("member_") for name in self.models))

    @property
    def defense(self) -> Defended | None:
        """What the first member, or the single model, is behind; None for nothing."""
        return next(iter(defenses_of([self.models[ENSEMBLE]])), None)

    def learn(self, clean: Mapping[str, torch.Tensor]) -> None:
        """Take the clean embeddings of all models, [N, D] each: attacks aim at them."""
        self.clean = clean
        self._references.clear()
        self._searched.clear()

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] float32 in [0, 1] on the device."""
        return self.test.batch(indices, self.device).images

    def embed(self, name: str, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """A model's embeddings [B, D] float32 on the CPU of the images at ``indices``, [B, C, H, W], attacked or not.

        What a defense at inference draws for an image here is always the same, and nothing that an attack on it has
        seen: so attacks are not compared by the luck of their last draw.
        """
        with self.drawing(indices, "measured"):
            return embed_batch(self.models[name], images)

    def drawing(self, indices: torch.Tensor, *purpose: int | str) -> AbstractContextManager[None]:
        """Inside, defenses at inference draw numbers of their own for each image [B]: batches do not matter.

        A randomised model of another making knows torch's global generators alone (:func:`do`).
        """
        if not defenses_of(self.models.values()):
            return nullcontext()
        generators = [
            generator(self.seed, "evaluation", "drawn by the defense", *purpose, index) for index in indices.tolist()
        ]
        return drawing(self.models.values(), generators)

    def searched(self, name: str) -> torch.Tensor:
        """[N, D] clean embeddings of a model, on the device."""
        if name not in self._searched:
            self._searched[name] = self.clean[name].to(self.device)
        return self._searched[name]

    def surface(self, source: str, objective: str, indices: torch.Tensor, *, draws: int) -> Surface:
        """What an attack on the images at ``indices`` [B] climbs.

        Args:
            source: As :class:`eat_dist.evaluation.plan.Part` has it.
            objective: Name in OBJECTIVES, or ``undetected``.
            indices: [B] positions in the test set.
            draws: Passes a reading.
        """
        if source == ALL_MEMBERS:
            names = [f"member_{rank}" for rank in range(self.members)]
            return MemberSum([self._white_box(name, objective, indices, draws) for name in names])
        return self._white_box(source, objective, indices, draws)

    def digest(self, *names: str) -> str:
        """SHA-256 of parameters and all buffers, and of the settings of a defense at inference.

        The input normalisation is a buffer that no state dict has.
        """
        models = [self.model(name) for name in names]
        digest = weights_digest([dict(model.named_parameters()) | dict(model.named_buffers()) for model in models])
        settings = [defense.settings for defense in defenses_of(models)]
        return hashlib.sha256((digest + json.dumps(settings)).encode()).hexdigest() if settings else digest

    def model(self, source: str) -> nn.Module:
        """The model that a source names; of ``members`` and ``without_I`` an ensemble of those members."""
        if source in self.models:
            return self.models[source]
        return EmbeddingEnsemble([self.models[name] for name in self._ranks_of(source)])

    def _ranks_of(self, source: str) -> list[str]:
        left_out = source.removeprefix("without_")
        return [f"member_{rank}" for rank in range(self.members) if str(rank) != left_out]

    def _white_box(self, source: str, objective: str, indices: torch.Tensor, draws: int) -> WhiteBox:
        if source not in self._references:
            clean = self.clean[source] if source in self.models else self._fused(source)
            self._references[source] = References.of(clean, self.test, seed=self.seed).to(self.device)
        aimed = Aimed(self._references[source], indices.to(self.device))
        if objective == "undetected":
            return WhiteBox(self.model(source), undetected(aimed, members=self.members, weight=DETECTION_WEIGHT), draws)
        return WhiteBox(self.model(source), OBJECTIVES[objective](aimed), draws)

    def _fused(self, source: str) -> torch.Tensor:
        return fuse([self.clean[name] for name in self._ranks_of(source)])


def _ready(model: nn.Module, device: torch.device | str) -> nn.Module:
    # Channels-last convolutions take a quarter off an attack's time on a CPU.
    return model.to(torch.device(device), torch.float32).to(memory_format=torch.channels_last).eval()


class Job(Protocol[Result_co]):
    """A piece of the evaluation that looks at single images: what workers share out among themselves. Picklable."""

    def __call__(self, victim: Victim, indices: torch.Tensor) -> Result_co:
        """Do it for the images at ``indices`` [B]; the result must depend on nothing else."""
        ...


def do(job: Job[Result], victim: Victim, indices: torch.Tensor) -> Result:
    """Do a job. What a randomised model draws on the way is seeded by the images, so that the result repeats."""
    generators = [generator(victim.seed, "evaluation", "model", index) for index in indices.tolist()]
    with seeded(generators, victim.device):
        return job(victim, indices)


class Workers(Protocol):
    """Who does the jobs: this process, or several on a cluster."""

    def learn(self, clean: Mapping[str, torch.Tensor]) -> None:
        """Give every worker's victim the clean embeddings."""
        ...

    def map(self, job: Job[Result], batches: Sequence[torch.Tensor]) -> Iterator[Result]:
        """The job's result for every batch of indices, in the order of the batches."""
        ...


@dataclass(frozen=True)
class Alone:
    """This process does all jobs itself, one batch after another.

    Attributes:
        victim: What it works on.
    """

    victim: Victim

    def learn(self, clean: Mapping[str, torch.Tensor]) -> None:
        """See :class:`Workers`."""
        self.victim.learn(clean)

    def map(self, job: Job[Result], batches: Sequence[torch.Tensor]) -> Iterator[Result]:
        """See :class:`Workers`."""
        for batch in batches:
            yield do(job, self.victim, batch)
