"""The command line: wiring, no logic."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from eat_dist.cli_compare import compare, register
from eat_dist.cli_data import app as data_app
from eat_dist.cli_study import study
from eat_dist.cli_submit import submit
from eat_dist.cli_sweep import sweep
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
app.command(context_settings={"ignore_unknown_options": True})(submit)
app.command()(sweep)
app.command()(study)
app.command()(compare)
app.command()(register)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 128 + signal.SIGTERM


@app.command()
def train(  # noqa: PLR0917  (typer takes options as arguments)
    config: Annotated[Path | None, typer.Option(help="YAML file; default: the digits run.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, e.g. attack.epsilon=8/255; repeatable."),
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="Path or URL; default runs/NAME-TIME.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --run-dir.")] = False,
    resume: Annotated[str | None, typer.Option(help="Continue the run in this folder.")] = None,
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start",
            help="Continue the run of this config in --run-dir, start it if there is none, report it if finished.",
        ),
    ] = False,
    register: Annotated[
        str | None, typer.Option(help="Add the ensemble to this registered model in MLflow (tracking.register_as).")
    ] = None,
) -> None:
    """Train an ensemble, evaluate it clean and under attack, and say where everything is."""
    from eat_dist.config import load_config
    from eat_dist.console import Console
    from eat_dist.errors import ConfigError

    if register is not None:
        assignments = [*(assignments or []), f"tracking.register_as={json.dumps(register)}"]
    if resume is not None and (config or assignments or run_dir is not None or overwrite or resume_or_start):
        raise ConfigError("--resume takes everything from the run's folder; give it alone")
    if resume_or_start and (run_dir is None or overwrite):
        raise ConfigError("--resume-or-start needs --run-dir, and no --overwrite")
    settings = None if resume is not None else load_config(config, assignments or [])
    from eat_dist.runs import resume_or_start as resume_or_start_run
    from eat_dist.runs import resume_run, start_run

    console = Console()
    if settings is None:
        finished = resume_run(str(resume), console=console)
    elif resume_or_start:
        finished = resume_or_start_run(settings, run_dir=str(run_dir), console=console)
    else:
        finished = start_run(settings, run_dir=run_dir, overwrite=overwrite, console=console)
    _report(finished)


@app.command()
def evaluate(  # noqa: PLR0917  (typer takes options as arguments)
    target: Annotated[
        str, typer.Argument(help="A run's folder, an MLflow model URI, a .safetensors file, or module:function.")
    ],
    protocol: Annotated[
        str | None, typer.Option(help="quick, standard or full; default: what the config or the run has.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with data, model, attack and evaluation; not for a run.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, over the config; repeatable.")
    ] = None,
    epsilon: Annotated[str | None, typer.Option(help="Radius of the main attacks, e.g. 8/255.")] = None,
    epsilons: Annotated[str | None, typer.Option(help="Radii of the curves, e.g. 0,2/255,4/255,8/255.")] = None,
    attacked_fraction: Annotated[str | None, typer.Option(help="Attacked shares of the set, e.g. 0.1,0.5,1.0.")] = None,
    eot_draws: Annotated[int | None, typer.Option(help="Passes averaged a step, for randomised models.")] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Scale the embeddings of module:function to length 1.")
    ] = False,
    transfer_from: Annotated[str | None, typer.Option(help="Another target, to craft transfer attacks on.")] = None,
    workers: Annotated[int, typer.Option(help="Ray workers that share the images.")] = 1,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for a model that is no run; default evaluations/NAME.")
    ] = None,
) -> None:
    """Measure a model, clean and under attack; attacks that are already done are not repeated."""
    from eat_dist.console import Console
    from eat_dist.evaluation.model_check import parse_numbers
    from eat_dist.runs import evaluate_target

    settings = [*(assignments or [])]
    if protocol is not None:
        settings.append(f"evaluation.protocol={protocol}")
    for key, text, what in (
        ("epsilon", epsilon, "--epsilon"),
        ("epsilons", epsilons, "--epsilons"),
        ("fractions", attacked_fraction, "--attacked-fraction"),
    ):
        if text is not None:
            numbers = parse_numbers(text, what=what)
            settings.append(f"evaluation.{key}={text if key == 'epsilon' else list(numbers)}")
    if eot_draws is not None:
        settings.append(f"evaluation.eot_draws={eot_draws}")
    console = Console()
    done = evaluate_target(
        target,
        config_file=config,
        assignments=settings,
        output=output,
        normalise=normalise,
        other=transfer_from,
        workers=workers,
        command=shlex.join(["eat-dist", *sys.argv[1:]]),
        console=console,
    )
    console.evaluation(done.results)
    where = done.folder.child(f"evaluation/{done.results['protocol']}")
    console.say(f"results      {where.child('results.parquet')}")
    console.say(f"summary      {where.child('summary.json')}")
    console.say(f"report       eat-dist report {done.folder.argument} -o report.html")
    console.mlflow(done.tracking_uri, done.mlflow_run_id)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of evaluated runs, or of evaluations; or one sweep or study.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="HTML file to write.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Write one self-contained page on a run, on several side by side, on a sweep, or on a study."""
    from eat_dist.console import Console
    from eat_dist.report import write_report
    from eat_dist.storage import Folder

    console = Console()
    with console.working("drawing") as progress:
        written = write_report([Folder.at(run) for run in runs], output, title=title, on_progress=progress)
    console.say(f"report       {written.page}")
    if written.figures:
        console.say(f"figures      {len(written.figures)} files in {Folder.of_file(written.figures[0])[0]}")


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
    # Where it was trained says nothing of this machine.
    device = choose_device(config_of(folder).cluster.model_copy(update={"device": "auto"}))
    count, skipped = embed_files(
        folder, images, output=output, on_bad_image="skip" if skip_bad_images else "error", device=device
    )
    if skipped:
        console.warn(f"{len(skipped)} undecodable images are left out, e.g. {skipped[0]}")
    console.say(f"{count} embeddings in {output}")


def main(*command: str) -> None:
    """Run the command; what a user caused is one line on standard error and exit code 2.

    Args:
        *command: Words put before the arguments given, for a script that stands for one subcommand (``jobs/``).
    """
    sys.argv[1:1] = command
    warnings.simplefilter("ignore", DeprecationWarning)  # of libraries among themselves, whatever they switch on
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    terminated = False

    def terminate(_number: int, _frame: FrameType | None) -> None:
        """What Ctrl-C would do now: a job that is stopped, a node that is taken away, closes its run all the same."""
        nonlocal terminated
        terminated = True
        # Of Ray Train and Tune, while they are at work; and a shell that starts this in the background has it ignored.
        if not callable(signal.getsignal(signal.SIGINT)):
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except EatError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(EXIT_USER_ERROR)
    except SystemExit as stopped:  # typer leaves this way, and turns Ctrl-C into exit code 130
        if stopped.code != EXIT_INTERRUPTED:
            raise
        if sys.argv[1:2] != ["submit"]:  # which has said what becomes of the job
            print(f"interrupted; continue with: {_again(sys.argv[1:])}", file=sys.stderr)
        _leave(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)


def _again(words: list[str]) -> str:
    """The command that goes on where an interrupted one stopped."""
    if words[:1] == ["sweep"]:
        return "eat-dist sweep --resume SWEEP_DIR"
    return "eat-dist train --resume RUN_DIR" if words[:1] == ["train"] else "the same command"


def _leave(code: int) -> NoReturn:
    """End the process without Python's own finalisation.

    Threads of torch and pyarrow that are still at work would abort the process there (signal 6). What must
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
    console.say(f"summary      {folder.child('summary.json')}")
    console.say(f"ensemble     {folder.child('model')}")
    console.mlflow(finished.tracking_uri, finished.mlflow_run_id)
    if finished.mlflow_missing:
        console.say(f"             incomplete: {finished.mlflow_missing} records did not arrive there")
    if finished.registered is not None:
        console.say(f"registered   {finished.registered}")


if __name__ == "__main__":
    main()
