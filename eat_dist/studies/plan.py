"""Which runs a study consists of, each with its whole config, checked before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eat_dist.config import RunConfig, configured, flat
from eat_dist.errors import ConfigError
from eat_dist.runs.checks import check_names
from eat_dist.studies.reading import Study

# What of `data` and `evaluation` may differ between rows: it changes how a model is trained or read, not what is asked
# of it. (More draws of a randomised model make the attack on it stronger, and are demanded of it.)
_OF_TRAINING = {"batch_size", "sampler", "images_per_class", "augmentation", "workers", "cache"}
_OF_COMPUTING = {"batch_size", "eot_draws", "members"}


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        name: ``ROW-DATASET-sSEED``, of its folder.
        row: Label.
        dataset: Label.
        seed: Of the run.
        config: The whole run.
    """

    name: str
    row: str
    dataset: str
    seed: int
    config: RunConfig

    @property
    def kind(self) -> tuple[str, str]:
        """Dataset and row: what the runs that differ in their seed alone share."""
        return self.dataset, self.row

    @property
    def folder(self) -> str:
        """Below the study's."""
        return f"runs/{self.name}"

    def with_epochs(self, epochs: int) -> StudyRun:
        """The same run, as long as that."""
        train = self.config.train.model_copy(update={"epochs": epochs})
        return replace(self, config=self.config.model_copy(update={"train": train}))

    def with_shards(self, shards: str | None) -> StudyRun:
        """The same run, its images read from there."""
        data = self.config.data.model_copy(update={"shards": shards})
        return replace(self, config=self.config.model_copy(update={"data": data}))


def plan_runs(study: Study, *, local: bool) -> list[StudyRun]:
    """All runs: seed by seed, so that every row has its first run before any has its second.

    Args:
        study: As it was read.
        local: Every run in the study's own process, whatever its ``cluster.backend`` says.

    Raises:
        ConfigError: A run's settings cannot hold together, or rows would not be measured alike; one message.
    """
    faults: dict[str, None] = {}
    configs: dict[tuple[str, str], RunConfig] = {}
    for dataset, (base, settings) in study.datasets.items():
        wrong: dict[str, str] = {}
        for row, own in study.rows.items():
            try:
                configs[dataset, row] = _config(base, settings | own, local=local)
            except ConfigError as error:
                wrong[row] = str(error)
        for row, text in wrong.items():
            # A fault of the dataset's settings is one of every row: said once.
            of_all = list(wrong.values()).count(text) == len(study.rows) > 1 or not study.rows[row]
            faults[f"{dataset}: {text}" if of_all else f"row '{row}' on {dataset}: {text}"] = None
        faults |= dict.fromkeys(_measured_unlike({row: c for (where, row), c in configs.items() if where == dataset}))
    runs = [
        StudyRun(name, row, dataset, seed, config.model_copy(update={"seed": seed, "name": name}))
        for seed in study.seeds
        for (dataset, row), config in configs.items()
        for name in [f"{row}-{dataset}-s{seed}"]
    ]
    twice = [name for name, times in Counter(run.name for run in runs).items() if times > 1]
    faults |= dict.fromkeys(f"two runs would be called '{name}': rename a row or a dataset" for name in twice)
    if faults:
        raise ConfigError(f"the study '{study.name}': " + "; ".join(faults))
    return runs


def _config(base: RunConfig, settings: dict[str, Any], *, local: bool) -> RunConfig:
    forced = {"tracking.register_as": None} | ({"cluster.backend": "local"} if local else {})
    try:
        config = configured(base, settings | forced)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("config: ")) from error
    check_names(config)
    if config.evaluation.protocol == "none":
        raise ConfigError("evaluation.protocol is none, so there would be nothing to compare; set quick or standard")
    return config


def _measured_unlike(configs: dict[str, RunConfig]) -> Iterator[str]:
    """Figures are compared only where the same is asked of every row."""
    first, *others = [(row, dict(flat(measured_by(config)))) for row, config in configs.items()] or [("", {})]
    for row, asked in others:
        unlike = [f"{key} is {asked[key]} and there {value}" for key, value in first[1].items() if asked[key] != value]
        if unlike:
            yield (
                f"row '{row}' would not be measured like '{first[0]}': {', '.join(unlike)}. Set it alike for all rows, "
                f"under 'set' or 'datasets'"
            )


def measured_by(config: RunConfig) -> dict[str, Any]:
    """What decides which figures come out of a given model: images, protocol, norm and ε."""
    # The full protocol attacks the ensemble through its members, too, where they are measured.
    computing = _OF_COMPUTING - {"members"} if config.evaluation.protocol == "full" else _OF_COMPUTING
    return {
        "data": config.data.model_dump(mode="json", exclude=_OF_TRAINING),
        "attack": {"norm": config.attack.norm},
        "evaluation": config.measured.model_dump(mode="json", exclude=computing),
    }


def kinds(runs: Sequence[StudyRun]) -> dict[tuple[str, str], StudyRun]:
    """The first run of each kind, in order."""
    found: dict[tuple[str, str], StudyRun] = {}
    for run in runs:
        found.setdefault(run.kind, run)
    return found
