"""Who chooses the settings of the next trial: a pure function of the plan and of the trials before it.

So a search has no state to save: a sweep that was killed goes on as if it had not been.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from eat_dist.seeding import derive_seed
from eat_dist.spaces import Choice, Integer, Parameter, Settings, Space
from eat_dist.sweeps.plan import SweepPlan
from eat_dist.sweeps.record import Trial

# Draws in a row that only repeat earlier trials, after which a space is taken for exhausted.
_ATTEMPTS = 50


def propose(plan: SweepPlan, number: int, trials: Sequence[Trial]) -> Settings | None:
    """The settings of trial ``number``, which no trial before it has; None where the space has no more.

    Args:
        plan: The sweep.
        number: From 0.
        trials: Those before it, unfinished ones included.
    """
    if plan.search == "grid":
        return next(itertools.islice(plan.space.grid(), number, None), None)
    known = [trial.settings for trial in trials]
    for attempt in range(_ATTEMPTS):
        seed = derive_seed(plan.seed, "sweep", number, attempt)
        settings = plan.space.draw(seed) if plan.search == "random" else _optuna(plan, trials, seed=seed)
        if settings not in known:  # the same again would be the same run again, to the bit
            return settings
    return None


def _optuna(plan: SweepPlan, trials: Sequence[Trial], *, seed: int) -> Settings:
    """Tree-structured Parzen estimators (Bergstra et al. 2011), the first ten at random.

    The study is made anew from the record for each question, with a sampler of its own seed.
    """
    import optuna  # noqa: PLC0415  (takes a second, and only this search needs it)

    logging.getLogger("optuna").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed % 2**32,
            constant_liar=True,  # trials that run now are taken for bad ones, so that the next one looks elsewhere
        )
    study = optuna.create_study(sampler=sampler, directions=["maximize"] * len(plan.objectives))
    study.add_trials([_told(plan, trial) for trial in trials])
    asked = study.ask()

    def pick(parameter: Parameter) -> Any:
        if isinstance(parameter.domain, Choice):
            return parameter.domain.values[
                asked.suggest_categorical(parameter.key, range(len(parameter.domain.values)))
            ]
        if isinstance(parameter.domain, Integer):
            return asked.suggest_int(parameter.key, parameter.domain.low, parameter.domain.high)
        return asked.suggest_float(parameter.key, parameter.domain.low, parameter.domain.high, log=parameter.domain.log)

    return plan.space.choose(pick)


def _told(plan: SweepPlan, trial: Trial) -> Any:
    """A trial in Optuna's words."""
    import optuna  # noqa: PLC0415

    state = {
        "FINISHED": optuna.trial.TrialState.COMPLETE,
        "PRUNED": optuna.trial.TrialState.PRUNED,
        "RUNNING": optuna.trial.TrialState.RUNNING,
        "INTERRUPTED": optuna.trial.TrialState.RUNNING,
        "FAILED": optuna.trial.TrialState.FAIL,
    }[trial.status]
    one = len(plan.objectives) == 1
    return optuna.trial.create_trial(
        state=state,
        params=_params(plan.space, trial.settings),
        distributions=_distributions(plan.space, trial.settings),
        values=list(trial.objectives.values()) if trial.status == "FINISHED" else None,
        intermediate_values=(
            {result["epoch"]: result["objectives"][plan.objectives[0]] for result in trial.results} if one else None
        ),
    )


def _params(space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Choices by their place: a value may be a list, which Optuna does not take."""
    domains = {parameter.key: parameter.domain for parameter in space.parameters}
    return {
        key: domain.values.index(value) if isinstance(domain := domains[key], Choice) else value
        for key, value in settings.items()
    }


def _distributions(space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    import optuna  # noqa: PLC0415

    found: dict[str, Any] = {}
    for parameter in space.parameters:
        domain = parameter.domain
        if parameter.key not in settings:
            continue
        if isinstance(domain, Choice):
            found[parameter.key] = optuna.distributions.CategoricalDistribution(range(len(domain.values)))
        elif isinstance(domain, Integer):
            found[parameter.key] = optuna.distributions.IntDistribution(domain.low, domain.high)
        else:
            found[parameter.key] = optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
    return found
