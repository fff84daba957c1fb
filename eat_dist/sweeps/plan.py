"""What a sweep was asked to do: decided before it starts, kept in ``sweep.json``, the same after a resumption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from eat_dist.config import RunConfig, configured, parse_config
from eat_dist.errors import ConfigError, StorageError
from eat_dist.spaces import Space, parse_space
from eat_dist.storage import Folder
from eat_dist.sweeps.objectives import Objective, names_of

SCHEMA = 1
STATE = "sweep.json"

Search = Literal["optuna", "random", "grid"]
Scheduler = Literal["asha", "none"]


class _Saved(BaseModel):
    """The kinds of what ``sweep.json`` says, so that a damaged one is found out at once. There may be more in it.

    Not of the plan, and so not in what :meth:`SweepPlan.to_json` gives, is what has a default.
    """

    model_config = ConfigDict(strict=True)

    name: str
    base_config: dict[str, Any]
    space: dict[str, Any]
    space_name: str
    search: Search
    scheduler: Scheduler
    objective: Objective
    trials_requested: int
    concurrent_requested: int | None
    grace_period: int
    reduction_factor: int
    seed: int
    validation_share: float
    command: str = ""
    git: dict[str, str] = {}
    started: str = ""
    seconds: float = 0.0
    data: dict[str, str] = {}
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class SweepPlan:
    """A sweep.

    Attributes:
        name: For people, and of the folder by default.
        base: The config that trials vary, paths absolute.
        space: What they vary.
        trials: How many.
        search: Who chooses the settings.
        scheduler: ``asha``: trials are stopped at rungs; ``none``: all are trained to the end.
        objective: What they are compared by.
        validation_share: Of the training classes, held out.
        seed: Of the search.
        concurrent: Trials at once; None: as many as fit.
        grace_period: Epochs until the first rung.
        reduction_factor: η of the rungs.
    """

    name: str
    base: RunConfig
    space: Space
    trials: int
    search: Search
    scheduler: Scheduler
    objective: Objective
    validation_share: float
    seed: int
    concurrent: int | None
    grace_period: int
    reduction_factor: int

    @property
    def epochs(self) -> int:
        """Of a whole trial."""
        return self.base.train.epochs

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a trial is measured, rising: grace·ηᵏ below the last epoch, and that."""
        if self.scheduler == "none":
            return (self.epochs,)
        rungs, rung = [], self.grace_period
        while rung < self.epochs:
            rungs.append(rung)
            rung *= self.reduction_factor
        return (*rungs, self.epochs)

    @property
    def evaluation_epsilon(self) -> float:
        """Radius of the attacks that measure every trial, whatever it trained against."""
        return self.base.evaluation_epsilon

    @property
    def objectives(self) -> tuple[str, ...]:
        """One name, or two."""
        return names_of(self.objective)

    def trial_config(self, settings: Mapping[str, Any], *, base: RunConfig) -> RunConfig:
        """The run that a trial is.

        Args:
            settings: Of the trial.
            base: The sweep's, placed on the cluster: with its shards and each member's resources.

        Raises:
            ConfigError: The settings cannot hold together.
        """
        config = configured(base, settings)
        measured = config.evaluation.model_copy(
            update={
                "protocol": "quick",
                "epsilon": self.evaluation_epsilon,
                "epsilons": None,
                "fractions": None,
                "members": False,  # no objective looks at a member by itself
            }
        )
        data = config.data.model_copy(update={"validation_share": self.validation_share})
        return config.model_copy(update={"evaluation": measured, "data": data})

    def best_config(self, settings: Mapping[str, Any]) -> RunConfig:
        """The run that the settings are meant for: all training classes, the test classes, the base's evaluation.

        A searched ε changes what is trained against; measured is at the base's.
        """
        config = configured(self.base, settings)
        data = config.data.model_copy(update={"validation_share": 0.0})
        evaluation = config.evaluation
        if "attack.epsilon" in settings:
            evaluation = evaluation.model_copy(update={"epsilon": self.evaluation_epsilon})
        return config.model_copy(update={"data": data, "evaluation": evaluation})

    def to_json(self) -> dict[str, Any]:
        """What ``sweep.json`` says of it."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "base_config": self.base.model_dump(mode="json"),
            "space": dict(self.space.given),
            "space_name": self.space.name,
            "search": self.search,
            "scheduler": self.scheduler,
            "objective": self.objective,
            "objectives": [{"name": name, "direction": "max"} for name in self.objectives],
            "trials_requested": self.trials,
            "concurrent_requested": self.concurrent,
            "grace_period": self.grace_period,
            "reduction_factor": self.reduction_factor,
            "rungs": list(self.rungs),
            "seed": self.seed,
            "validation_share": self.validation_share,
            "evaluation_epsilon": self.evaluation_epsilon,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, source: str) -> SweepPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            StorageError: Something is missing, of the wrong kind, or of another version.
        """
        try:
            if values["schema"] != SCHEMA:
                raise StorageError(f"'{source}' has schema {values['schema']}; this version reads {SCHEMA}")
            saved = _Saved.model_validate(values)
        except (KeyError, TypeError) as error:
            raise StorageError(f"'{source}' is damaged: {error!r} is missing or of the wrong kind") from error
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise StorageError(f"'{source}' is damaged: {faults}") from error
        return cls(
            name=saved.name,
            base=parse_config(saved.base_config, source=source),
            space=parse_space(saved.space, name=saved.space_name, source=source),
            trials=saved.trials_requested,
            search=saved.search,
            scheduler=saved.scheduler,
            objective=saved.objective,
            validation_share=saved.validation_share,
            seed=saved.seed,
            concurrent=saved.concurrent_requested,
            grace_period=saved.grace_period,
            reduction_factor=saved.reduction_factor,
        )


def default_grace(epochs: int) -> int:
    """A ninth of a trial, rounded up: with η = 3, two rungs before the last epoch."""
    return -(-epochs // 9)


def check_plan(plan: SweepPlan) -> None:
    """What can be said against a plan without looking at data or cluster.

    Raises:
        ConfigError: One message with every fault.
    """
    faults = []
    if plan.trials < 1:
        faults.append(f"--trials must be at least 1; got {plan.trials}")
    if plan.base.cluster.backend != "ray":
        faults.append("a sweep trains on Ray: set cluster.backend to ray (a new local cluster needs nothing else)")
    if not 0 < plan.validation_share < 1:
        faults.append(
            f"--validation-share must be in (0, 1): settings are chosen on validation classes, never on test classes; "
            f"got {plan.validation_share:g}"
        )
    if plan.search == "grid" and plan.space.continuous:
        faults.append(
            f"a grid needs values to enumerate, but {', '.join(plan.space.continuous)} is a range: use grid or choice "
            "there, or --search random"
        )
    if plan.objective == "pareto" and plan.scheduler == "asha":
        faults.append(
            "ASHA stops trials by one number, --objective pareto has two: use --scheduler none, or --objective harmonic"
        )
    if plan.reduction_factor < 2:
        faults.append(f"--reduction-factor must be at least 2; got {plan.reduction_factor}")
    if not 1 <= plan.grace_period <= plan.epochs:
        faults.append(f"--grace-period must be between 1 and train.epochs = {plan.epochs}; got {plan.grace_period}")
    if faults:
        raise ConfigError("; ".join(faults))


def read_plan(folder: Folder) -> SweepPlan:
    """The plan of the sweep in a folder.

    Raises:
        StorageError: It is no sweep's folder, or damaged.
    """
    if not folder.exists(STATE):
        raise StorageError(f"'{folder}' is not a sweep's folder: it has no {STATE}")
    return SweepPlan.from_json(folder.read_json(STATE), source=f"{folder}/{STATE}")
