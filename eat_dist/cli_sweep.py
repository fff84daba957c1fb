"""The command ``eat-dist sweep``: wiring, no logic."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from eat_dist.sweeps import SweepPlan, Swept

# Modules that take seconds to import are imported by the command, so that --help is quick.
# ruff: noqa: PLC0415


class Search(Enum):
    """--search."""

    optuna = "optuna"
    random = "random"
    grid = "grid"


class Scheduler(Enum):
    """--scheduler."""

    asha = "asha"
    none = "none"


class Objective(Enum):
    """--objective."""

    attacked_nmi = "attacked_nmi"
    harmonic = "harmonic"
    pareto = "pareto"


_EXAMPLE = "eat-dist sweep --config configs/digits.yaml --space tune_spaces/diversity_epsilon.yaml --trials 20"


def sweep(  # noqa: PLR0917  (typer takes options as arguments)
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of the base run; default: the digits run.")] = None,
    space: Annotated[Path | None, typer.Option(help="YAML file of the search space, e.g. from tune_spaces/.")] = None,
    trials: Annotated[int | None, typer.Option(help="How many runs.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, over the base run; repeatable.")
    ] = None,
    concurrent: Annotated[str, typer.Option(help="Trials at once: a number, or auto for as many as fit.")] = "auto",
    scheduler: Annotated[
        Scheduler | None, typer.Option(help="asha stops bad trials early. Default: asha, and none for pareto.")
    ] = None,
    search: Annotated[Search, typer.Option(help="Who chooses the settings.")] = Search.optuna,
    objective: Annotated[Objective, typer.Option(help="What is maximised.")] = Objective.attacked_nmi,
    validation_share: Annotated[float, typer.Option(help="Share of the training classes held out.")] = 0.2,
    grace_period: Annotated[int | None, typer.Option(help="Epochs until asha's first rung; default: a ninth.")] = None,
    reduction_factor: Annotated[int, typer.Option(help="asha keeps the best of so many, and its rungs grow so.")] = 3,
    sweep_dir: Annotated[str | None, typer.Option(help="Path or URL; default sweeps/NAME-TIME.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    resume: Annotated[str | None, typer.Option(help="Continue the sweep in this folder.")] = None,
) -> None:
    """Train many runs with other settings, and write the best as a config."""
    from eat_dist.console import Console
    from eat_dist.errors import ConfigError

    if resume is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        if [name for name, source in sources.items() if source and source.name == "COMMANDLINE"] != ["resume"]:
            raise ConfigError("--resume takes everything from the sweep's folder; give it alone")
        from eat_dist.sweeps import resume_sweep

        _report(resume_sweep(resume, console=Console()))
        return
    from eat_dist.sweeps import start_sweep

    plan = plan_of(context.params)  # the other options above, all of them
    command = shlex.join(["eat-dist", *sys.argv[1:]])
    _report(start_sweep(plan, sweep_dir=sweep_dir, command=command, console=Console()))


def plan_of(values: Mapping[str, Any], *, below: Path = Path()) -> SweepPlan:
    """What the command's options ask for.

    Args:
        values: By the names in the signature of :func:`sweep`.
        below: Where relative paths begin.

    Raises:
        ConfigError: What they lack, or a fault of the config or the space.
    """
    from eat_dist.config import load_config
    from eat_dist.errors import ConfigError
    from eat_dist.spaces import load_space
    from eat_dist.sweeps import SweepPlan
    from eat_dist.sweeps.plan import default_grace

    space, trials, objective = values["space"], values["trials"], values["objective"]
    if space is None or trials is None:
        missing = " and ".join(name for name, value in (("--space", space), ("--trials", trials)) if value is None)
        raise ConfigError(f"a sweep needs {missing}, e.g. {_EXAMPLE}")
    at_once = parse_concurrent(values["concurrent"])
    config, grace = values["config"], values["grace_period"]
    base, searched = load_config(config and below / config, values["assignments"] or []), load_space(below / space)
    by_itself = Scheduler.none if objective is Objective.pareto else Scheduler.asha
    return SweepPlan(
        name=f"{base.name}-{searched.name}",
        base=base,
        space=searched,
        trials=trials,
        search=values["search"].value,
        scheduler=(values["scheduler"] or by_itself).value,
        objective=objective.value,
        validation_share=values["validation_share"],
        seed=values["seed"],
        concurrent=at_once,
        grace_period=default_grace(base.train.epochs) if grace is None else grace,
        reduction_factor=values["reduction_factor"],
    )


def parse_concurrent(text: str) -> int | None:
    """--concurrent, of sweeps and studies: None for as many as fit.

    Raises:
        ConfigError: It is neither a whole number nor ``auto``.
    """
    from eat_dist.errors import ConfigError

    if text != "auto" and not text.isdecimal():
        raise ConfigError(f"--concurrent takes a whole number, or auto; got '{text}'")
    return None if text == "auto" else int(text)


def _report(swept: Swept) -> None:
    from eat_dist.console import Console

    console, folder = Console(), swept.folder
    console.say(f"sweep folder {folder}")
    console.say(f"trials       {folder}/trials.json")
    for name in swept.configs:
        console.say(f"ready config eat-dist train --config {folder}/{name}")
    console.mlflow(swept.tracking_uri, swept.mlflow_run_id)
