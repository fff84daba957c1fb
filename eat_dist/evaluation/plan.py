"""What a protocol measures: the list of its attacks, each one part of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eat_dist.attacks.ball import Norm
from eat_dist.config import EvaluationConfig
from eat_dist.evaluation.sizes import Sizes

ENSEMBLE = "ensemble"
ALL_MEMBERS = "members"
UNDEFENDED = "undefended"

OBJECTIVES_OF_FULL = (
    "displacement",
    "nearest_wrong_centroid",
    "random_wrong_centroid",
    "nearest_negative",
    "proxy",
)
OBJECTIVES_OF_STANDARD = OBJECTIVES_OF_FULL[:4]

# What attacks are compared on: it crosses zero exactly where R@1 is lost.
COMPARED_ON = "nearest_negative"

# Half the pixel range: every image of the ball's middle can be turned into the same grey.
UNBOUNDED = 0.5

_WITHOUT_STEPS = ("fgsm", "random_noise")


@dataclass(frozen=True)
class Part:
    """One attack on the test set, or on a sample of it.

    Attributes:
        source: Whose gradients (or values) craft the images: ``ensemble`` (the fused embedding, or a single model),
            ``member_I``, ``members`` (all at once, :class:`eat_dist.attacks.MemberSum`), ``without_I`` (the ensemble
            without member I), ``undefended`` (the ensemble without its defense at inference) or ``other`` (another
            model).
        targets: Models that the crafted images are shown to; the first decides which queries a restart attacks again
            (for the source ``undefended`` that one does).
        attack: Name in ATTACKS.
        norm: Of the ball.
        epsilon: Its radius; pixel units, in L0 a share of the pixels.
        num_steps: Gradient steps, or queries.
        objective: Name in OBJECTIVES.
        keep: The last iterate or the best; means something for ``pgd`` alone.
        restarts: Runs with other random numbers. From the second on only the queries still retrieved are attacked
            (Croce & Hein 2020 do so, too), and an image keeps a restart that makes it fail or has a larger value; with
            several ``draws`` one that has a larger value.
        draws: Passes averaged in a reading, for models that draw random numbers (EOT).
        sampled: Whether only the evaluation's sample of images is attacked.
        batch_size: Other than the evaluation's.
        slopes: Whether the length of each image's gradient at a random point of its ball is measured, too.
    """

    source: str
    targets: tuple[str, ...]
    attack: str
    norm: Norm
    epsilon: float
    num_steps: int
    objective: str
    keep: Literal["last", "best"] = "best"
    restarts: int = 1
    draws: int = 1
    sampled: bool = False
    batch_size: int | None = None
    slopes: bool = False

    @property
    def label(self) -> str:
        """``pgd20``, ``apgd100x5``, ``fgsm``: attack, steps and restarts."""
        steps = "" if self.attack in _WITHOUT_STEPS else str(self.num_steps)
        return f"{self.attack}{steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def key(self, target: str) -> str:
        """``apgd100x5/proxy@members``: its name in the results of a target; another source than itself is named."""
        return f"{self.label}/{self.objective}" + ("" if self.source == target else f"@{self.source}")

    @property
    def file(self) -> str:
        """Its file name, without ending: unlike :attr:`key` it tells any two parts of a plan apart."""
        extras = "".join(
            f"-{text}"
            for text, said in (
                ("best", self.attack == "pgd" and self.keep == "best"),
                ("sample", self.sampled),
                ("slopes", self.slopes),
                (f"batch{self.batch_size}", self.batch_size is not None),
            )
            if said
        )
        return f"{self.source}-{self.label}-{self.objective}-{self.norm}-{self.epsilon:.6g}{extras}"


@dataclass(frozen=True)
class Plan:
    """The attacks of an evaluation, by what their figures are for.

    Attributes:
        main: What the attacked table and the worst case are made of.
        square: The black-box attack on the sample; part of the worst case as far as the sample goes.
        curves: Every objective at every ε of the list but 0 (which is the clean figure).
        ladder: Attacks of rising strength on the sample.
        norms: L2 and L0 attacks on the sample.
        transfer: From each member, and from the ensemble without it, to all members, on the sample.
        checks: What only sanity checks use, by their name.
        detector: Against an attacker who does not know the detector of attacked images and one who does.
        non_adaptive: Beside a defense at inference, each main attack on the ensemble by an attacker who does not know
            of the defense: crafted on the undefended networks. What the defense hides, not what it withstands.
    """

    main: tuple[Part, ...]
    square: tuple[Part, ...] = ()
    curves: tuple[Part, ...] = ()
    ladder: tuple[Part, ...] = ()
    norms: tuple[Part, ...] = ()
    transfer: tuple[Part, ...] = ()
    checks: tuple[tuple[str, Part], ...] = ()
    detector: tuple[Part, ...] = ()
    non_adaptive: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All, each once."""
        listed = (
            *self.main,
            *self.non_adaptive,
            *self.square,
            *self.curves,
            *self.ladder,
            *self.norms,
            *self.transfer,
            *(part for _, part in self.checks),
            *self.detector,
        )
        return tuple(dict.fromkeys(listed))

    @property
    def pairs(self) -> tuple[tuple[Part, Part], ...]:
        """Each main attack on a defended ensemble, adaptive, with its non-adaptive counterpart."""
        adaptive = [part for part in self.main if part.source == ENSEMBLE]
        return tuple(zip(adaptive, self.non_adaptive, strict=True)) if self.non_adaptive else ()


def plan(
    config: EvaluationConfig, sizes: Sizes, *, members: int, queries: int, defended: bool = False, other: bool = False
) -> Plan:
    """The attacks of the config's protocol.

    Args:
        config: Protocol, and what it leaves open.
        sizes: From :meth:`Sizes.of`.
        members: M of the ensemble; 1 for a single model.
        queries: Of the test set.
        defended: Whether it is behind a defense at inference.
        other: Whether there is another model to craft on.
    """
    assert config.protocol != "none"
    found = _groups(_Writer(config, sizes, members, queries), other=other)
    if not defended:
        return found
    # Gradients of a defense mislead: a step may lead away from the best point, so that is what is kept.
    main = tuple(replace(part, keep="best") for part in found.main)
    return replace(found, main=main, non_adaptive=_without_defense(main))


def _without_defense(main: Sequence[Part]) -> tuple[Part, ...]:
    on_ensemble = (part for part in main if part.source == ENSEMBLE)
    return tuple(replace(part, source=UNDEFENDED, targets=(ENSEMBLE,), draws=1) for part in on_ensemble)


def _groups(writer: _Writer, *, other: bool) -> Plan:
    config, sizes = writer.config, writer.sizes
    if config.protocol == "quick":
        main = writer.main("pgd", config.num_steps, config.objectives, restarts=1, keep="last")
        curves = tuple(writer.curves(config.objectives))
        return Plan(tuple(main), curves=curves, transfer=tuple(writer.from_other() if other else ()))
    objectives = OBJECTIVES_OF_FULL if config.protocol == "full" else OBJECTIVES_OF_STANDARD
    main = writer.main("apgd", sizes.apgd_steps, objectives, restarts=sizes.restarts, keep="best")
    square = tuple(writer.square())
    if config.protocol == "standard":
        curves = tuple(writer.curves(objectives))
        return Plan(tuple(main), square, curves, transfer=tuple(writer.from_other() if other else ()))
    return Plan(
        main=(*main, *writer.on_all_members(objectives)),
        square=square,
        curves=tuple(writer.curves(objectives)),
        ladder=(*writer.ladder(), *square),
        norms=tuple(writer.norms()),
        transfer=(*writer.transfer(), *(writer.from_other() if other else ())),
        checks=tuple(writer.checks()),
        detector=tuple(writer.detector()),
    )


@dataclass(frozen=True)
class _Writer:
    """Writes the groups of a plan."""

    config: EvaluationConfig
    sizes: Sizes
    members: int
    queries: int

    def _part(
        self, attack: str, num_steps: int, objective: str, *, source: str = ENSEMBLE, targets: Sequence[str] = ()
    ) -> Part:
        return Part(
            source=source,
            targets=tuple(targets) or (source,),
            attack=attack,
            norm=self.sizes.norm,
            epsilon=self.sizes.epsilon,
            num_steps=num_steps,
            objective=objective,
            draws=self.sizes.draws,
        )

    @property
    def _ranks(self) -> range:
        """Of the members that are not the ensemble itself."""
        return range(self.members if self.members > 1 else 0)

    def main(
        self,
        attack: str,
        num_steps: int,
        objectives: Sequence[str],
        *,
        restarts: int,
        keep: Literal["last", "best"],
    ) -> Iterator[Part]:
        sources = [ENSEMBLE] + [f"member_{rank}" for rank in self._ranks if self.config.members]
        # Images crafted on a member are shown to the ensemble, too, where every way to attack it is to be reported.
        also = (ENSEMBLE,) if self.config.protocol == "full" else ()
        for source in sources:
            targets = (source, *also) if source != ENSEMBLE else (source,)
            for objective in objectives:
                part = self._part(attack, num_steps, objective, source=source, targets=targets)
                yield replace(part, restarts=restarts, keep=keep)

    def on_all_members(self, objectives: Sequence[str]) -> Iterator[Part]:
        for objective in objectives if self.members > 1 else ():
            part = self._part("apgd", self.sizes.apgd_steps, objective, source=ALL_MEMBERS, targets=(ENSEMBLE,))
            yield replace(part, restarts=self.sizes.restarts)

    def square(self) -> Iterator[Part]:
        if self.sizes.norm == "linf":
            yield replace(self._part("square", self.sizes.square_queries, COMPARED_ON), sampled=True)

    def curves(self, objectives: Sequence[str]) -> Iterator[Part]:
        for objective in objectives:
            for epsilon in self.sizes.epsilons:
                if epsilon > 0:
                    yield replace(self._part("pgd", 20, objective), epsilon=epsilon)

    def ladder(self) -> Iterator[Part]:
        rungs = (("random_noise", 1), ("fgsm", 1), ("mi_fgsm", 20), ("pgd", 20), ("apgd", self.sizes.apgd_steps))
        for attack, num_steps in rungs:
            part = self._part(attack, num_steps, COMPARED_ON)
            yield replace(part, sampled=True, slopes=attack == "pgd")

    def norms(self) -> Iterator[Part]:
        for attack, num_steps in (("pgd", 20), ("apgd", self.sizes.apgd_steps), ("cw", 100)):
            part = self._part(attack, num_steps, COMPARED_ON)
            yield replace(part, norm="l2", epsilon=self.sizes.epsilon_l2, sampled=True)
        part = self._part("jsma", 20, COMPARED_ON)
        yield replace(part, norm="l0", epsilon=self.config.epsilon_l0, sampled=True)

    def transfer(self) -> Iterator[Part]:
        everyone = (*(f"member_{rank}" for rank in self._ranks), ENSEMBLE)
        for rank in self._ranks:
            for source in (f"member_{rank}", f"without_{rank}"):
                yield replace(self._part("pgd", 20, COMPARED_ON, source=source, targets=everyone), sampled=True)

    def from_other(self) -> Iterator[Part]:
        everyone = (ENSEMBLE, *(f"member_{rank}" for rank in self._ranks))
        yield replace(self._part("pgd", 20, COMPARED_ON, source="other", targets=everyone), sampled=True)

    def checks(self) -> Iterator[tuple[str, Part]]:
        part = replace(self._part("pgd", 20, COMPARED_ON), sampled=True)
        yield "zero_epsilon", replace(part, epsilon=0.0, num_steps=5)
        yield "few_steps", replace(part, num_steps=5)
        yield "many_steps", replace(part, num_steps=100)
        # A third of the batches that there are; those of one have no smaller ones to be compared with.
        batch = min(self.config.batch_size, self.config.sample, self.queries)
        third = max(1, batch // 3) if batch > 1 else 2
        yield "other_batch_size", replace(part, batch_size=third)
        if self.sizes.norm == "linf":
            yield "unbounded", replace(part, epsilon=max(UNBOUNDED, self.sizes.epsilon), num_steps=50)

    def detector(self) -> Iterator[Part]:
        for objective in (COMPARED_ON, "undetected") if self.members > 1 else ():
            yield self._part("pgd", 20, objective)
