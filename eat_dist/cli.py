"""The command line: wiring, no logic."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from eat_dist.cli_data import app as data_app
from eat_dist.errors import EatError

if TYPE_CHECKING:
    from eat_dist.runs import Finished

# Modules that take seconds to import are imported by the command that needs them, so that --help is quick.
# ruff: noqa: PLC0415

app = typer.Typer(
    help="Train, evaluate and use ensembles of embedding models that stay correct under attack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@app.command()
def train(
    config: Annotated[Path | None, typer.Option(help="YAML file; default: the digits run.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, e.g. attack.epsilon=8/255; repeatable."),
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="Path or URL; default runs/NAME-TIME.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --run-dir.")] = False,
    resume: Annotated[str | None, typer.Option(help="Continue the run in this folder.")] = None,
) -> None:
    """Train an ensemble, evaluate it clean and under attack, and say where everything is."""
    from eat_dist.config import load_config
    from eat_dist.console import Console
    from eat_dist.errors import ConfigError

    if resume is not None and (config is not None or assignments or run_dir is not None or overwrite):
        raise ConfigError("--resume takes everything from the run's folder; give it alone")
    settings = None if resume is not None else load_config(config, assignments or [])
    from eat_dist.runs import resume_run, start_run

    console = Console()
    if settings is None:
        finished = resume_run(str(resume), console=console)
    else:
        finished = start_run(settings, run_dir=run_dir, overwrite=overwrite, console=console)
    _report(finished)


@app.command()
def evaluate(
    run_dir: Annotated[str, typer.Argument(help="A finished run's folder.")],
    protocol: Annotated[str, typer.Option(help="quick: PGD with three objectives.")] = "quick",
) -> None:
    """Measure a trained run again; attacks that are already done are not repeated."""
    from eat_dist.console import Console
    from eat_dist.errors import ConfigError
    from eat_dist.runs import evaluate_again

    if protocol != "quick":
        raise ConfigError(f"no protocol is called '{protocol}'; known: quick")
    _report(evaluate_again(run_dir, protocol="quick", console=Console()))


@app.command()
def embed(
    run_dir: Annotated[str, typer.Argument(help="A finished run's folder.")],
    images: Annotated[list[str], typer.Argument(help="Image files or folders of them.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Parquet file to write.")],
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave undecodable images out instead of stopping.")
    ] = False,
) -> None:
    """Embed image files with a trained ensemble."""
    from eat_dist.console import Console
    from eat_dist.embedding import embed_files
    from eat_dist.in_process import choose_device
    from eat_dist.runs import config_of
    from eat_dist.storage import Folder

    console, folder = Console(), Folder.at(run_dir)
    device = choose_device(config_of(folder).cluster)
    count, skipped = embed_files(
        folder, images, output=output, on_bad_image="skip" if skip_bad_images else "error", device=device
    )
    if skipped:
        console.warn(f"{len(skipped)} undecodable images are left out, e.g. {skipped[0]}")
    console.say(f"{count} embeddings in {output}")


def main() -> None:
    """Run the command; what a user caused is one line on standard error and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    try:
        app()
    except EatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except SystemExit as stopped:  # typer leaves this way, and turns Ctrl-C into exit code 130
        if stopped.code != EXIT_INTERRUPTED:
            raise
        again = "the same command" if sys.argv[1:2] == ["data"] else "eat-dist train --resume RUN_DIR"
        print(f"interrupted; continue with: {again}", file=sys.stderr)
        _leave(EXIT_INTERRUPTED)


def _leave(code: int) -> NoReturn:
    """End the process without Python's own finalisation.

    Threads of torch and pyarrow that an interrupt caught at work would abort the process there (signal 6). What must
    happen at exit, such as stopping a local Ray cluster, is done first.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(finished: Finished) -> None:
    from eat_dist.console import Console

    console = Console()
    console.summary(finished.summary)
    folder = finished.folder
    console.say(f"run folder   {folder}")
    console.say(f"summary      {folder}/summary.json")
    console.say(f"ensemble     {folder}/model")
    if finished.mlflow_run_id is not None and finished.tracking_uri is not None:
        uri = finished.tracking_uri
        console.say(f"MLflow run   {finished.mlflow_run_id}")
        if uri.startswith("http"):
            console.say(f"open MLflow  {uri}")
        else:
            console.say(f"open MLflow  mlflow ui --backend-store-uri {uri}")


if __name__ == "__main__":
    main()
