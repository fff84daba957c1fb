"""The parts of one evaluation, each measured once or found where an earlier attempt left it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from eat_dist.config import EvaluationConfig
from eat_dist.evaluation.crafting import Craft, Crafted, Embed, Ers, Probe, attack_of
from eat_dist.evaluation.ers import NUM_STEPS, ers_results, ers_sample
from eat_dist.evaluation.ers_attacks import ERS_ATTACKS
from eat_dist.evaluation.measure import Measure
from eat_dist.evaluation.parts import resumed
from eat_dist.evaluation.plan import ENSEMBLE, Part, Plan
from eat_dist.evaluation.showcase import write_showcase
from eat_dist.evaluation.sizes import Sizes
from eat_dist.evaluation.victim import Job, Victim, Workers, do
from eat_dist.inference import Defended
from eat_dist.models.embedder import Embedder
from eat_dist.models.ensemble import EmbeddingEnsemble
from eat_dist.seeding import generator
from eat_dist.storage import Folder

# Raise it when a figure changes its meaning or an attack what it reaches: parts of an older schema are measured again.
SCHEMA = 4

# Far above what the order of additions on a GPU changes, far below any noise that defends.
REPEATABLE = 1e-4

Progress = Callable[[str, float, float], None]
"""Called as ``on_progress(part, done, total)``: work done and in all, in images × passes."""


@dataclass
class Running:
    """An evaluation under way.

    Attributes:
        victim: The attacked models and their test set, in this process.
        plan: The attacks.
        sizes: How hard.
        config: What else the user chose.
        seed: Of everything random.
        folder: Where parts go.
        workers: Who embeds and attacks.
        on_progress: Called after each batch and each part.
        done: Work done, in images × passes.
    """

    victim: Victim
    plan: Plan
    sizes: Sizes
    config: EvaluationConfig
    seed: int
    folder: Folder
    workers: Workers
    on_progress: Progress | None
    done: float = 0.0

    @cached_property
    def total(self) -> float:
        """Work in all, in images × passes; restarts counted as if every image needed them."""
        attacks = sum(self._cost(part) for part in self.plan.parts)
        return attacks + (
            len(ERS_ATTACKS) * self._ers_cost * len(self.ers_images) if self.config.protocol == "full" else 0
        )

    @cached_property
    def clean(self) -> dict[str, torch.Tensor]:
        """Clean embeddings by model, with which the workers aim; only computed if some part has to be measured."""
        found: list[dict[str, torch.Tensor]] = list(self.workers.map(Embed(), self._batches(self._everything)))
        clean = {name: torch.cat([batch[name] for batch in found]) for name in self.victim.models}
        self.workers.learn(clean)
        self.victim.learn(clean)
        return clean

    @cached_property
    def measure(self) -> Measure:
        """With the clean embeddings."""
        return Measure(
            self.victim.test,
            self.victim.retrieval,
            self.clean,
            self.victim.members,
            self.sizes.kmeans_seeds,
            self.seed,
        )

    @cached_property
    def sample(self) -> torch.Tensor:
        """[S] int64, the images that slow attacks are run on: a uniform choice of the queries, ascending."""
        queries = self.victim.retrieval.queries
        order = torch.randperm(len(queries), generator=generator(self.seed, "evaluation", "sample"))
        return queries[order[: self.config.sample]].sort().values

    @cached_property
    def ers_images(self) -> torch.Tensor:
        """[S] int64, the images that the ERS attacks perturb."""
        count = self.config.ers_images or self.config.sample
        return ers_sample(len(self.victim.test), count, seed=self.seed)

    @cached_property
    def shown_to(self) -> tuple[str, ...]:
        """The models that have figures: the ensemble and whatever else a part is measured on."""
        return tuple(dict.fromkeys((ENSEMBLE, *(name for part in self.plan.parts for name in part.targets))))

    @property
    def members(self) -> tuple[str, ...]:
        """The models that are listed as members; the only member of an ensemble of one is the ensemble."""
        if self.victim.members > 1:
            names = [f"member_{rank}" for rank in range(self.victim.members)]
            return tuple(names) if self.config.members else ()
        return (ENSEMBLE,) if isinstance(self.victim.models[ENSEMBLE], EmbeddingEnsemble) else ()

    def clean_part(self, name: str) -> dict[str, Any]:
        """Figures of a model's clean embeddings."""
        return self._part(f"{name}-clean", {"models": self._digest((name,))}, lambda: self.measure.clean_part(name))

    def attacked_part(self, part: Part) -> dict[str, Any]:
        """Figures under an attack."""
        before = self.done
        fractions = self.sizes.fractions if part in self.plan.main and part.source == ENSEMBLE else ()
        detected = part in self.plan.detector
        about = asdict(part) | {
            "models": self._digest((part.source, *part.targets)),
            "attacked": len(self._attacked(part)),
            "fractions": fractions,
            "detected": detected,
        }

        def measure() -> dict[str, Any]:
            self._aim()
            crafted = self._crafted(part, Craft(part))
            bits = {name: self.clean_part(name)["retrieved"] for name in part.targets}
            return self.measure.attacked_part(
                part, crafted, self._attacked(part), retrieved_clean=bits, fractions=fractions, detected=detected
            )

        found = self._part(part.file, about, measure)
        self._report(part.file, before + self._cost(part) - self.done)
        return found

    def ers(self) -> dict[str, Any]:
        """The empirical robustness score; each of its attacks is a part."""

        def measure() -> dict[str, Any]:
            measured = {name: self._ers_attack(name) for name in ERS_ATTACKS}
            clean, labels = self.clean[ENSEMBLE], self.victim.test.labels
            return {"results": ers_results(measured, clean=clean, labels=labels, indices=self.ers_images)}

        found: dict[str, Any] = self._part("ensemble-ers", self._about_ers, measure)["results"]
        return found

    @cached_property
    def randomised(self) -> bool:
        """Whether the model answers two identical calls differently."""
        if (defense := self.victim.defense) is not None and defense.randomised:
            return True
        if _is_ours(self.victim.models[ENSEMBLE]):
            return False
        few = self._everything[:8]
        images = self.victim.images(few)
        with torch.random.fork_rng():
            one, other = (self.victim.embed(ENSEMBLE, images, few) for _ in range(2))
        return not torch.allclose(one, other, rtol=0, atol=REPEATABLE)

    def showcase(self, results: Mapping[str, Any]) -> None:
        """Images and embeddings for the report."""
        models = self._digest((ENSEMBLE,))
        write_showcase(
            self.folder, self.victim, self.workers, self.plan, results, models=models, learn=lambda: self.clean
        )

    def _aim(self) -> None:
        """Have the workers learn the clean embeddings, which attacks aim with; done once."""
        _ = self.clean

    @property
    def _everything(self) -> torch.Tensor:
        return torch.arange(len(self.victim.test))

    def _attacked(self, part: Part) -> torch.Tensor:
        return self.sample if part.sampled else self._everything

    def _batches(self, indices: torch.Tensor, batch_size: int | None = None) -> Sequence[torch.Tensor]:
        return list(torch.split(indices, batch_size or self.config.batch_size))

    def _cost(self, part: Part) -> float:
        return len(self._attacked(part)) * attack_of(part).passes * part.restarts * part.draws

    def _crafted(self, part: Part, job: Job[Crafted]) -> list[Crafted]:
        batches = self._batches(self._attacked(part), part.batch_size)
        crafted = []
        for batch, result in zip(batches, self.workers.map(job, batches), strict=True):
            crafted.append(result)
            self._report(part.file, self._cost(part) * len(batch) / len(self._attacked(part)))
        return crafted

    def _ers_attack(self, name: str) -> dict[str, Any]:
        before = self.done

        def measure() -> dict[str, Any]:
            self._aim()
            batches = self._batches(self.ers_images)
            rows: list[dict[str, list[float]]] = []
            for batch, result in zip(batches, self.workers.map(Ers(name, self.sizes.draws), batches), strict=True):
                rows.append(result)
                self._report(f"ers {name}", self._ers_cost * len(batch))
            return {"measured": {key: [value for row in rows for value in row[key]] for key in rows[0]}}

        found: dict[str, Any] = self._part(f"ensemble-ers-{name}", self._about_ers, measure)["measured"]
        self._report(f"ers {name}", before + self._ers_cost * len(self.ers_images) - self.done)
        return found

    @property
    def _ers_cost(self) -> int:
        return NUM_STEPS * self.sizes.draws

    @property
    def _about_ers(self) -> dict[str, Any]:
        about = {"models": self._digest((ENSEMBLE,)), "attacked": len(self.ers_images)}
        return about | ({"draws": self.sizes.draws} if self.sizes.draws > 1 else {})

    def _part(self, name: str, depends_on: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        fingerprint = {
            "part": name,
            "schema": SCHEMA,
            "test_set": self.victim.test.digest(),
            "images": len(self.victim.test),
            "classes": self.victim.test.num_classes,
            "seed": self.seed,
            "kmeans_seeds": self.sizes.kmeans_seeds,
            **depends_on,
        }
        # JSON knows lists alone, and fingerprints are compared with what was read back.
        ready = json.loads(json.dumps(fingerprint))
        return resumed(self.folder, f"parts/{name}.json", fingerprint=ready, measure=measure)

    def _digest(self, names: Sequence[str]) -> str:
        return hashlib.sha256("".join(self._digests[name] for name in names).encode()).hexdigest()

    @cached_property
    def _digests(self) -> dict[str, str]:
        sources = {name for part in self.plan.parts for name in (part.source, *part.targets)}
        foreign = tuple(name for name, model in self.victim.models.items() if not _is_ours(model))
        probed = do(Probe(foreign), self.victim, self._everything[:8]) if foreign else {}
        probes = {name: _probe(*probed[name]) if name in probed else "" for name in self.victim.models}
        # Several members at once are what each of them is.
        of_all = "".join(probes.values())
        return {name: self.victim.digest(name) + probes.get(name, of_all) for name in sorted(sources | set(probes))}

    def _report(self, part: str, work: float) -> None:
        self.done += work
        if self.on_progress is not None:
            self.on_progress(part, self.done, self.total)


def _probe(answer: torch.Tensor, slopes: tuple[str, ...]) -> str:
    """Of a model whose code is not ours, what it answers and how steeply."""
    return hashlib.sha256(answer.numpy().tobytes() + json.dumps(slopes).encode()).hexdigest()


def _is_ours(model: nn.Module) -> bool:
    """Whether weights and settings say all of what a model computes; of somebody's subclass they do not."""
    if type(model) is EmbeddingEnsemble:
        return all(_is_ours(member) for member in model.members)
    return type(model.model if type(model) is Defended else model) is Embedder
