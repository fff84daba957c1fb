"""The form of ``evaluation/PROTOCOL/summary.json``, schema 4, as far as the report reads it.

Shares (recall, NMI, success rates) are in [0, 1]; the empirical robustness score and its parts are as published, in
[0, 100] but for distances and cosines. Keys that a protocol does not fill may be missing; unknown ones are ignored.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA = 4
Figures = dict[str, float | None]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Target(_Part):
    """What was evaluated."""

    kind: str
    name: str
    members: int | None = None
    weights_sha256: str | None = None


class Measured(_Part):
    """Figures of one model: unattacked, under each attack (``ATTACK/OBJECTIVE[@SURFACE]``), and the worst of all.

    An attack on a sample of the images has no figures of clustering.
    """

    clean: Figures
    attacked: dict[str, Figures] = {}
    worst: Figures = {}


class DefendedAttack(_Part):
    """One attack on the ensemble behind a defense at inference: through the defense, and crafted without it."""

    attack: str
    objective: str
    adaptive: Figures
    non_adaptive: Figures


class Inference(_Part):
    """A defense at inference. ``eot_draws``: passes that an adaptive attack averages in a step."""

    name: str
    options: dict[str, object] = {}
    eot_draws: int = 1
    attacks: list[DefendedAttack] = []


class CurvePoint(_Part):
    """Accuracy at one ε; ``attack`` is ``clean`` at 0."""

    objective: str
    attack: str
    epsilon: float
    r_at_1: float | None = None
    nmi: float | None = None
    nmi_std: float | None = None
    nmi_spared: float | None = None
    nmi_std_spared: float | None = None
    success_rate: float | None = None


class FractionRow(_Part):
    """Clustering with a part of the images attacked; ``r_at_1`` of all images against each other, attacked or not."""

    fraction: float
    objective: str
    attack: str = ""
    nmi: float | None = None
    nmi_std: float | None = None
    ami: float | None = None
    f1: float | None = None
    r_at_1: float | None = None


class Rung(_Part):
    """One attack of the strength ladder."""

    attack: str
    objective: str
    success_rate: float | None = None
    mean_value: float | None = None
    images: int | None = None


class NormRow(_Part):
    """An attack in another norm. ``median_distance`` is of all images it was tried on, in that norm."""

    norm: str
    attack: str
    objective: str
    epsilon: float | None = None
    success_rate: float | None = None
    median_distance: float | None = None
    images: int | None = None


class Transfer(_Part):
    """``success_rate[i][j]``: share of the images crafted on source i that fool target j."""

    attack: str
    sources: list[str]
    targets: list[str]
    success_rate: list[list[float | None]]

    @model_validator(mode="after")
    def _is_a_matrix(self) -> Transfer:
        if [len(row) for row in self.success_rate] != [len(self.targets)] * len(self.sources):
            raise ValueError("expected a row for each source, with a number for each target")
        return self


class Ers(_Part):
    """Empirical robustness score, in both readings of the published code; ``r_at_1`` is clean, in %."""

    images: int
    r_at_1: float
    corrected: Figures
    compatible: Figures = {}


class Detector(_Part):
    """How well attacked images are told apart, by an attacker who ignores the detector and by one who evades it."""

    fraction: float | None = None
    unaware: Figures
    aware: Figures


class Check(_Part):
    """One sanity check."""

    name: str
    claim: str
    passed: bool
    measured: str = ""
    threshold: str = ""


class Evaluation(_Part):
    """The whole summary."""

    schema_: Literal[4] = Field(alias="schema")
    eat_dist: str = ""
    command: str = ""
    target: Target
    dataset: str
    defense: str | None = None
    protocol: str
    norm: str
    epsilon: float
    num_steps: int | None = None
    epsilons: list[float] = []
    sample: int | None = None
    seed: int = 0
    kmeans_seeds: int | None = None
    images: int | None = None
    images_sha256: str | None = None
    classes: int | None = None
    retrieval: str | None = None
    queries: int | None = None
    gallery: int | None = None
    inference: Inference | None = None
    ensemble: Measured
    members: list[Measured] = []
    curves: list[CurvePoint] = []
    fractions_table: list[FractionRow] = []
    ladder: list[Rung] = []
    norms: list[NormRow] = []
    transfer: Transfer | None = None
    ers: Ers | None = None
    detector: Detector | None = None
    sanity: list[Check] = []

    @property
    def failed(self) -> list[Check]:
        """The sanity checks that did not pass."""
        return [check for check in self.sanity if not check.passed]
