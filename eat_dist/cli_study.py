"""The command ``eat-dist study``: wiring, no logic."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eat_dist.studies import Studied

# Modules that take seconds to import are imported by the command, so that --help is quick.
# ruff: noqa: PLC0415


class Backend(Enum):
    """--backend."""

    ray = "ray"
    local = "local"


def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study, e.g. from configs/studies/.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for every run, e.g. data.root=…; repeatable.")
    ] = None,
    study_dir: Annotated[str | None, typer.Option(help="Path or URL; default studies/NAME.")] = None,
    backend: Annotated[
        Backend, typer.Option(help="ray: runs side by side on a cluster; local: one after another, without Ray.")
    ] = Backend.ray,
    concurrent: Annotated[str, typer.Option(help="Runs at once: a number, or auto for as many as fit.")] = "auto",
) -> None:
    """Train and evaluate rows of settings over seeds and datasets, and write the table; again, it goes on."""
    from eat_dist.cli_sweep import parse_concurrent
    from eat_dist.console import Console
    from eat_dist.errors import ConfigError
    from eat_dist.studies import load_study, run_study

    at_once = parse_concurrent(concurrent)
    if backend is Backend.local and at_once is not None:
        raise ConfigError("--backend local runs one after another; leave out --concurrent, or use --backend ray")
    asked = load_study(file, assignments or [])
    command = shlex.join(["eat-dist", *sys.argv[1:]])
    done = run_study(
        asked,
        study_dir=study_dir,
        backend=backend.value,
        concurrent=at_once,
        command=command,
        console=Console(),
    )
    _report(done)


def _report(done: Studied) -> None:
    from eat_dist.console import Console

    console, folder = Console(), done.folder
    console.say(f"study folder {folder}")
    for name, file in (("table", "table.md"), ("as CSV", "table.csv"), ("report", "report.html")):
        console.say(f"{name:<12} {folder.child(file)}")
    console.mlflow(done.tracking_uri, done.mlflow_run_id)
