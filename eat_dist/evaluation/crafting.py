"""The jobs of an evaluation: embedding images, and attacking them in every way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from eat_dist.attacks import ATTACKS, Attack, Ball, Generators, GradientAttack, Surface, WhiteBox
from eat_dist.config import AttackConfig
from eat_dist.evaluation.embed import embed_batch
from eat_dist.evaluation.ers import run_attack
from eat_dist.evaluation.plan import ENSEMBLE, UNDEFENDED, Part
from eat_dist.evaluation.victim import Victim
from eat_dist.seeding import generator


@dataclass(frozen=True)
class Embed:
    """Embed clean images with every model; each image is decoded once."""

    def __call__(self, victim: Victim, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Model's name → [B, D] float32 on the CPU."""
        images = victim.images(indices)
        return {name: victim.embed(name, images, indices) for name in victim.models}


@dataclass(frozen=True)
class Probe:
    """What models answer and how steep their answers are: what weights alone do not say of code that is not ours.

    Attributes:
        names: Of the models.
    """

    names: tuple[str, ...]

    def __call__(self, victim: Victim, indices: torch.Tensor) -> dict[str, tuple[torch.Tensor, tuple[str, ...]]]:
        """By name [B, D] float32 on the CPU, and for each image the length of the gradient of a sum of its embedding.

        A length is rounded to about 1 %, far above what the order of additions on a GPU changes: a backward pass that
        was mended (a straight-through step, BPDA) changes more, and the forward pass not at all.
        """
        images = victim.images(indices)
        return {name: self._of(name, victim, images, indices) for name in self.names}

    def _of(
        self, name: str, victim: Victim, images: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        answer = victim.embed(name, images, indices)
        weights = torch.randn(answer.shape[1], generator=generator(0, "evaluation", "probe")).to(victim.device)
        surface = WhiteBox(victim.models[name], lambda embeddings: embeddings.float() @ weights)
        with victim.drawing(indices, "probe"), surface.held():
            lengths = surface.read(images).gradient.flatten(1).norm(dim=1)
        return answer, tuple(f"{length:.2e}" for length in lengths.tolist())


@dataclass(frozen=True)
class Ers:
    """One attack of the empirical robustness score (:func:`eat_dist.evaluation.ers.run_attack`).

    Attributes:
        name: In ERS_ATTACKS.
        draws: Passes averaged in a step (EOT).
    """

    name: str
    draws: int = 1

    def __call__(self, victim: Victim, indices: torch.Tensor) -> dict[str, list[float]]:
        """Figure → a number for each of the images at ``indices``."""
        with victim.drawing(indices, "ers", self.name):
            return run_attack(
                self.name,
                victim.models[ENSEMBLE],
                victim.test,
                clean=victim.clean[ENSEMBLE],
                indices=indices,
                batch_size=len(indices),
                seed=victim.seed,
                device=victim.device,
                draws=self.draws,
            )


@dataclass(frozen=True)
class Crafted:
    """Some images of the test set, attacked. All on the CPU.

    Attributes:
        embeddings: For each of the part's targets [B, D] float32.
        values: [B] float32, of the objective on the source's surface.
        distances: [B] float32, from the clean images in the part's norm and units.
        slopes: [B] float32, length of the gradient at a random point of the ball, NaN where it is not finite; None
            where the part does not ask for it.
        images: [B, C, H, W] float32, the attacked images; None unless asked for.
    """

    embeddings: Mapping[str, torch.Tensor]
    values: torch.Tensor
    distances: torch.Tensor
    slopes: torch.Tensor | None
    images: torch.Tensor | None


@dataclass(frozen=True)
class Craft:
    """Attack images.

    Every random number is drawn on the CPU from a generator seeded by (seed, objective, image, restart), and the
    objectives compare an image with fixed references only: so neither the batch size nor the number of workers nor
    the device changes what is computed. What remains is rounding: where a library picks another kernel for another
    batch size, a gradient near zero may change its sign.

    Attributes:
        part: What to do.
        with_images: Whether to hand back the attacked images themselves.
    """

    part: Part
    with_images: bool = False

    def __call__(self, victim: Victim, indices: torch.Tensor) -> Crafted:
        """See :class:`Crafted`; ``indices`` [B] int64 on the CPU."""
        part = self.part
        clean = victim.images(indices)
        adversarial, values = self._attacked(victim, clean, indices, restart=0)
        for restart in range(1, part.restarts):
            rows = self._retrieved(victim, adversarial, indices, restart).nonzero().squeeze(1)
            if not len(rows):
                break
            again, values_again = self._attacked(victim, clean[rows.to(clean.device)], indices[rows], restart=restart)
            rows = rows.to(clean.device)
            better = values_again > values[rows]
            if part.draws == 1:  # else one draw says little; the value is a mean over many
                better |= ~self._retrieved(victim, again, indices[rows.cpu()], restart).to(clean.device)
            adversarial[rows[better]], values[rows[better]] = again[better], values_again[better]
        return Crafted(
            embeddings={name: victim.embed(name, adversarial, indices) for name in part.targets},
            values=values.float().cpu(),
            distances=_ball(part).distances(adversarial, clean).float().cpu(),
            slopes=self._slopes(victim, clean, indices) if part.slopes else None,
            images=adversarial.cpu() if self.with_images else None,
        )

    def _attacked(
        self, victim: Victim, clean: torch.Tensor, indices: torch.Tensor, *, restart: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        surface = self._surface(victim, indices)
        with victim.drawing(indices, self.part.objective, restart):
            adversarial = attack_of(self.part)(surface, clean, generators=self._generators(victim, indices, restart))
            with surface.held():
                return adversarial, surface.values(adversarial)

    def _surface(self, victim: Victim, indices: torch.Tensor) -> Surface:
        return victim.surface(self.part.source, self.part.objective, indices, draws=self.part.draws)

    def _generators(self, victim: Victim, indices: torch.Tensor, restart: int) -> Generators:
        key = (victim.seed, "evaluation", "start", self.part.objective)
        return [generator(*key, index, *([restart] if restart else [])) for index in indices.tolist()]

    def _retrieved(
        self, victim: Victim, adversarial: torch.Tensor, indices: torch.Tensor, restart: int
    ) -> torch.Tensor:
        """[B] bool on the CPU: queries that the model which judges restarts still retrieves.

        It is the first target, or for an attacker who does not know of the defense the undefended ensemble. What a
        defense draws for this, nothing is measured with: else an attack would be chosen by the luck of the measurement.
        """
        part = self.part
        name = part.source if part.source == UNDEFENDED else part.targets[0]
        with victim.drawing(indices, "judged", part.objective, restart):
            attacked = embed_batch(victim.models[name], adversarial).to(victim.device)
        found = victim.retrieval.retrieved(attacked, indices, victim.searched(name)).cpu()
        is_query = victim.test.is_query
        return found if is_query is None else found & is_query[indices]

    def _slopes(self, victim: Victim, clean: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        surface = self._surface(victim, indices)
        points = _ball(self.part).random_point(clean, self._generators(victim, indices, 0))
        with victim.drawing(indices, "slopes"), surface.held():
            gradient = surface.read(points).gradient.flatten(1)
        lengths = gradient.norm(dim=1)
        finite = gradient.isfinite().all(dim=1)
        return torch.where(finite, lengths, torch.full_like(lengths, float("nan"))).float().cpu()


def attack_of(part: Part) -> Attack:
    """The attack of a part.

    Raises:
        ConfigError: The attack is unknown or not defined for the norm.
    """
    config = AttackConfig(name=part.attack, norm=part.norm, epsilon=part.epsilon, num_steps=part.num_steps)
    attack = ATTACKS[part.attack](config)
    if part.attack == "pgd":
        assert isinstance(attack, GradientAttack)
        return replace(attack, keep=part.keep)
    return attack


def _ball(part: Part) -> Ball:
    return Ball(part.norm, part.epsilon)
