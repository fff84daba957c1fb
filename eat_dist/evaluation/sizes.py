"""How hard a protocol attacks: its own sizes where the config leaves them open."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eat_dist.attacks.ball import Norm
from eat_dist.config import EvaluationConfig

# Passes averaged in a step against a randomised model (Athalye et al. 2018 use 10 to 40).
ENOUGH_DRAWS = 20


@dataclass(frozen=True)
class Sizes:
    """How hard a protocol attacks; what the config leaves open is the protocol's (docs/evaluation.md).

    Attributes:
        norm: Of the main attacks.
        epsilon: Their radius.
        epsilons: Of the curves; empty for none.
        fractions: Attacked shares of the clustered set, 1 (all) not among them.
        epsilon_l2: Radius of the L2 attacks.
        apgd_steps: Of the main attack.
        restarts: Of the main attack.
        square_queries: Of the black-box attack.
        kmeans_seeds: k-means runs averaged.
        draws: Passes averaged in a step of an attack (EOT).
    """

    norm: Norm
    epsilon: float
    epsilons: tuple[float, ...]
    fractions: tuple[float, ...]
    epsilon_l2: float
    apgd_steps: int
    restarts: int
    square_queries: int
    kmeans_seeds: int
    draws: int = 1

    @classmethod
    def of(
        cls,
        config: EvaluationConfig,
        *,
        norm: Norm,
        epsilon: float,
        numbers_of_an_image: int,
        randomised: bool = False,
    ) -> Sizes:
        """The protocol's own sizes where the config has none; ``randomised``: behind a defense that draws numbers.

        The L2 radius is by default a quarter of the longest L2 perturbation in the L∞ ball, ε·√(C·H·W)/4: about 0.43
        for CIFAR-10's 8/255, where 0.5 is customary.
        """
        full = config.protocol == "full"
        longest = epsilon * math.sqrt(numbers_of_an_image)
        as_l2 = epsilon if norm == "l2" else longest / 4
        largest = 1.0 if norm == "linf" else math.inf
        usual = dict.fromkeys((0.0, epsilon / 4, epsilon / 2, epsilon, min(2 * epsilon, largest)))
        return cls(
            norm=norm,
            epsilon=epsilon,
            epsilons=config.epsilons or (tuple(usual) if full else ()),
            fractions=tuple(f for f in config.fractions or ((0.1, 0.5) if full else ()) if f < 1),
            epsilon_l2=as_l2 if config.epsilon_l2 is None else config.epsilon_l2,
            apgd_steps=config.apgd_steps or (100 if full else 50),
            restarts=config.restarts or (5 if full else 1),
            square_queries=config.square_queries or (5000 if full else 1000),
            kmeans_seeds=config.kmeans_seeds or (10 if full else 3),
            draws=config.eot_draws or (ENOUGH_DRAWS if randomised else 1),
        )
