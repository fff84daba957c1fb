"""Which settings mattered: functional analysis of variance (Hutter et al. 2014) through Optuna.

A random forest is fitted to the scores as a function of the settings; a setting's importance is the share of the
forest's variance that it explains alone. A forest finds something in pure noise too, so the same is done with the
scores shuffled among the trials: a setting matters only as far as it goes beyond what it gets there.

Only trials measured after the same epoch are compared. The last value of a pruned trial is of an earlier epoch than
that of a finished one, so it says when the trial was stopped as much as how good its settings are: it does not count
beside finished ones. Where trials were pruned, a second analysis takes *all* trials after the last epoch that every one
of them reached: early, but without the choice that pruning makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eat_dist.report.sweeps.ranking import finished, score
from eat_dist.report.sweeps.reading import Objective, Sweep, Trial
from eat_dist.report.sweeps.space import Parameter
from eat_dist.seeding import derive_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Fewer points than this say nothing about several settings: with ten, the planted setting of the tests is found.
FEWEST_TRIALS = 10
# One more than a multiple: what lies above all of 19 shufflings is there by chance one time in 20.
SHUFFLES = 19
_TREES = 16


@dataclass(frozen=True)
class Importance:
    """What one setting explains.

    Attributes:
        parameter: The setting.
        share: Of the forest's variance, in [0, 1].
        chance: The highest share among the shufflings: a share up to it may be chance.
        trials: How many trials it is of; fewer than all for a conditional setting.
    """

    parameter: Parameter
    share: float
    chance: float
    trials: int

    @property
    def matters(self) -> bool:
        """Whether it goes beyond chance."""
        return self.share > self.chance


@dataclass(frozen=True)
class Analysis:
    """The importances with regard to one objective, after one epoch.

    Attributes:
        objective: Of what the variance is explained.
        epoch: After which epoch; None: at the end.
        trials: How many were compared.
        found: Most important first.
        left_out: Sentences on what could not be analysed.
    """

    objective: Objective
    epoch: int | None
    trials: int
    found: tuple[Importance, ...]
    left_out: tuple[str, ...]


def analyses(sweep: Sweep) -> list[Analysis]:
    """At the end over the finished trials, and, where trials were pruned, early over all; for each objective."""
    made = []
    early = common_epoch(sweep)
    everyone = sweep.with_status("FINISHED", "PRUNED")
    for objective in sweep.objectives:
        made.append(analyse(sweep, finished(sweep), objective))
        if early is not None:
            made.append(analyse(sweep, everyone, objective, epoch=early))
    return made


def common_epoch(sweep: Sweep) -> int | None:
    """The last epoch after which every finished and pruned trial was measured; None where none was pruned."""
    if not sweep.with_status("PRUNED"):
        return None
    ended = sweep.with_status("FINISHED", "PRUNED")
    return max(set.intersection(*({result.epoch for result in trial.results} for trial in ended)), default=None)


def analyse(sweep: Sweep, trials: Sequence[Trial], objective: Objective, *, epoch: int | None = None) -> Analysis:
    """The share of the scores' variance that each setting explains.

    Args:
        sweep: Its space and seed.
        trials: Those to compare; the ones without a value are left out.
        objective: Of which the value is taken.
        epoch: After which; None: the last of each trial, so only finished trials may be given.
    """
    values = {trial.id: value for trial in trials if (value := score(trial, objective, epoch=epoch)) is not None}
    known = [trial for trial in trials if trial.id in values]
    # A category that one trial alone has, or a range that was never varied, has no variance to explain.
    varied = [p for p in sweep.parameters if len(_distinct(p, known)) > 1]
    left_out = [f"{p.key} had one value in all of these trials" for p in sweep.parameters if p not in varied]
    if len(known) < FEWEST_TRIALS or len(set(values.values())) < 2:
        few = f"{len(known)} of at least {FEWEST_TRIALS} trials"
        why = few if len(known) < FEWEST_TRIALS else "all scores are equal"
        return Analysis(objective, epoch, len(known), (), (f"too little to analyse: {why}",))
    always = [p for p in varied if all(p.key in trial.settings for trial in known)]
    found: list[Importance] = []
    if always:
        found += _explained(always, known, values, seed=sweep.about.seed)
    for parameter in varied:
        if parameter in always:
            continue
        applying = [trial for trial in known if parameter.key in trial.settings]
        if len(applying) < FEWEST_TRIALS or len({values[trial.id] for trial in applying}) < 2:
            left_out.append(f"{parameter.key} applied to {len(applying)} trials only, or all had one score")
            continue
        # Beside the settings that always apply, among the trials that it applies to.
        found += _explained([*always, parameter], applying, values, seed=sweep.about.seed)[-1:]
    found.sort(key=lambda entry: (-entry.share, entry.parameter.key))
    return Analysis(objective, epoch, len(known), tuple(found), tuple(left_out))


def _explained(
    parameters: Sequence[Parameter], trials: Sequence[Trial], values: dict[str, float], *, seed: int
) -> list[Importance]:
    """An entry a parameter, in the order given; each has a value in every trial."""
    scores = np.array([values[trial.id] for trial in trials])
    measured = _shares(parameters, trials, scores, seed=seed)
    draw = np.random.default_rng(derive_seed(seed, "report", "importance"))
    chance = [_shares(parameters, trials, draw.permutation(scores), seed=seed) for _ in range(SHUFFLES)]
    highest = np.max(chance, axis=0)
    return [
        Importance(parameter, float(share), float(most), len(trials))
        for parameter, share, most in zip(parameters, measured, highest, strict=True)
    ]


def _shares(
    parameters: Sequence[Parameter], trials: Sequence[Trial], scores: np.ndarray[Any, Any], *, seed: int
) -> list[float]:
    """The forest's answer, in the order of the parameters. What settings explain together only is in none of them."""
    import optuna  # noqa: PLC0415  (a second, once a report)

    with _quiet():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        distributions = {p.key: _distribution(p) for p in parameters}
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params={p.key: _encoded(p, trial.settings[p.key]) for p in parameters},
                    distributions=distributions,
                    value=float(value),
                )
                for trial, value in zip(trials, scores, strict=True)
            ]
        )
        forest = optuna.importance.FanovaImportanceEvaluator(
            n_trees=_TREES, seed=derive_seed(seed, "report", "forest") % 2**32
        )
        shares = optuna.importance.get_param_importances(study, evaluator=forest, normalize=False)
    return [shares[p.key] for p in parameters]


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every study on standard error; what was set is set again."""
    import optuna  # noqa: PLC0415

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _distribution(parameter: Parameter) -> BaseDistribution:
    import optuna  # noqa: PLC0415

    if parameter.ordered:
        return optuna.distributions.FloatDistribution(0.0, 1.0)
    return optuna.distributions.CategoricalDistribution(parameter.categories)


def _encoded(parameter: Parameter, value: Any) -> float | str:
    """The position on the axis, so that a logarithmic range is weighed as it was searched; else the category."""
    return min(max(parameter.position(value), 0.0), 1.0) if parameter.ordered else parameter.label(value)


def _distinct(parameter: Parameter, trials: Sequence[Trial]) -> set[str]:
    return {parameter.label(trial.settings[parameter.key]) for trial in trials if parameter.key in trial.settings}
