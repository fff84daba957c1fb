"""A subcommand as a job: what is found out about it here, before anything travels to the cluster."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from eat_dist.config import RunConfig, load_config
from eat_dist.errors import ConfigError

# Options and arguments, by their names in the commands' signatures, that say where results go.
_RESULTS = ("run_dir", "resume", "sweep_dir", "study_dir", "output", "out")
# Would make up a folder of their own, in a place that ends with the job; the option that names one.
_NAMELESS = {"train": "--run-dir", "sweep": "--sweep-dir", "study": "--study-dir"}
_LOCAL_PATHS = ("root", "test_root", "shards")

# What every job gets: `ray job stop` is then a Ctrl-C, with time to close records and give the run folder free.
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
_PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
_PASSED_ON_PREFIX = "RAY_TRAIN_"


class Files(Protocol):
    """The files that go along."""

    @property
    def root(self) -> Path:
        """Their folder."""

    def has(self, path: str | Path) -> bool:
        """Whether something of that path below the root is among them."""


@dataclass(frozen=True)
class Job:
    """One subcommand, ready to be submitted.

    Attributes:
        name: Begins its submissions' ids, e.g. ``train-omniglot-3``.
        entrypoint: The shell command that the head runs.
        warnings: Lines for the user.
    """

    name: str
    entrypoint: str
    warnings: tuple[str, ...]


def plan_job(
    command: Sequence[str],
    arguments: Sequence[str],
    *,
    values: Mapping[str, Any],
    files: Files,
    here: Path,
    environment: Mapping[str, str],
    configs: Sequence[RunConfig] = (),
) -> Job:
    """Check a subcommand against what the cluster will see of it.

    Args:
        command: Its words, e.g. ``("data", "prepare")``.
        arguments: What the user typed after them.
        values: What the command line parser made of them, by the names in the command's signature.
        files: What goes along. The command runs there, in the folder that corresponds to ``here``.
        here: Where the user stands: relative paths are meant from there.
        environment: What the job gets, for its warnings.
        configs: Of the runs of a study or sweep, whose data the cluster must find.

    Raises:
        ConfigError: A path that the cluster would not find, results that would be lost, or a faulty config.
    """
    arguments, warnings = list(arguments), []
    inside = here.relative_to(files.root) if here.is_relative_to(files.root) else Path()
    for value in values.values():
        if isinstance(value, Path):
            _check_sent(value, files, inside)
    results = _check_results(command, values)
    if command[0] == "train" and values.get("resume") is None:
        given = values["config"]
        configs = [load_config(given and files.root / inside / given, values["assignments"] or [])]
        if not values["overwrite"] and not values["resume_or_start"]:
            arguments.append("--resume-or-start")
    for config in configs:
        _check_data(config, files, inside)
    named = environment.get("MLFLOW_TRACKING_URI")
    if any(config.tracking.enabled and not (config.tracking.uri or named) for config in configs):
        warnings.append(
            "no MLflow server is named: unless the cluster sets MLFLOW_TRACKING_URI, MLflow's records end with the "
            "job's folder; set it here, or give --env MLFLOW_TRACKING_URI=URL"
        )
    words = ["python", "-m", "eat_dist", *command, *arguments]
    go = f"cd {shlex.quote(inside.as_posix())} && " if inside != Path() and files.has(inside) else ""
    name = "-".join((*command, *([_name(results)] if results else [])))
    return Job(name, f"{go}exec {shlex.join(words)}", tuple(warnings))


def job_environment(asked: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets.

    Args:
        asked: ``NAME`` (its value here) or ``NAME=VALUE``.
        environment: This process's.

    Raises:
        ConfigError: A name that is none, or that has no value here.
    """
    chosen = STOPPING | {
        name: value for name, value in environment.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIX)
    }
    for entry in asked:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env takes NAME or NAME=VALUE; got '{entry}'")
        if not equals and name not in environment:
            raise ConfigError(f"--env {name}: it is not set here; give --env {name}=VALUE")
        chosen[name] = value if equals else environment[name]
    return chosen


def explain(code: int, log_end: str) -> str:
    """Why a job ended with this exit code, where that can be told from the last lines of its log."""
    if "No module named eat_dist" in log_end:
        return "; eat_dist is not installed on the cluster: install it there, or submit from a checkout of it"
    if code == 127:
        return "; the head finds no `python`: start Ray there with the environment of eat_dist activated"
    return ""


def _check_sent(path: Path, files: Files, inside: Path) -> None:
    """A config must be among the files, under the path that the command names."""
    place = inside / path
    if not (files.root / place).exists():
        raise ConfigError(f"there is no file '{files.root / place}'")
    if path.is_absolute() or ".." in place.parts or not files.has(place):
        raise ConfigError(
            f"'{path}' does not go along with the job: give a file below '{files.root / inside}' that no ignore file "
            f"excludes, by its relative path"
        )


def _check_results(command: Sequence[str], values: Mapping[str, Any]) -> str | None:
    """Where results go must be the same place for the cluster and outlive the job's folder; returns it."""
    given = {name: str(values[name]) for name in _RESULTS if values.get(name) is not None}
    if not given and command[0] in _NAMELESS:
        raise ConfigError(
            f"a submitted {command[0]} needs a name that a resubmission finds again: give {_NAMELESS[command[0]]}, an "
            f"absolute path on a disk that every node sees or a URL, e.g. s3://bucket/runs/digits-1"
        )
    target = values.get("target") if command[0] == "evaluate" else None
    if target is not None and not given and not (_is_placed(target) and not target.endswith(".safetensors")):
        raise ConfigError(
            f"results of '{target}' would go into the job's own folder, which ends with it: give --output, an absolute "
            f"path on a disk that every node sees or a URL (a run is named by its absolute path or URL)"
        )
    for name, place in given.items():
        if not _is_placed(place):
            raise ConfigError(
                f"'{place}' ({name.replace('_', '-')}) would lie in the job's own folder, which ends with it: give an "
                f"absolute path on a disk that every node sees, or a URL"
            )
    return next(iter(given.values()), target)


def _check_data(config: RunConfig, files: Files, inside: Path) -> None:
    places = {f"data.{name}": getattr(config.data, name) for name in _LOCAL_PATHS}
    if config.model.weights not in ("none", "imagenet"):
        places["model.weights"] = config.model.weights
    for key, place in places.items():
        if place is not None and not _is_placed(place) and not files.has(inside / place):
            raise ConfigError(
                f"{key} is '{place}', which does not go along with the job: give an absolute path on a disk that every "
                f"node sees, or a URL"
            )


def _is_placed(path: str) -> bool:
    return "://" in path or path.startswith(("/", "~"))


def _name(place: str) -> str:
    """The last part of a path or URL, of characters that an id may have."""
    last = PurePosixPath(place.partition("?")[0].rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.") or "run"
