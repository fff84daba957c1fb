"""The command line's ``submit``: another subcommand as a job on a Ray cluster."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eat_dist.errors import ConfigError

if TYPE_CHECKING:
    from eat_dist.cluster.submit import Jobs
    from eat_dist.config import RunConfig

# Modules that take seconds to import are imported by the command that needs them, so that --help is quick.
# ruff: noqa: PLC0415

EXIT_INTERRUPTED = 130
_REMEMBERED = 2000  # characters of a log's end


def submit(  # noqa: PLR0917  (typer takes options as arguments)
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND [ARGS]...", help="A subcommand, e.g. train or data prepare, with its options."),
    ],
    address: Annotated[
        str | None,
        typer.Option(help="The head's dashboard, http://HEAD:8265; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME (its value here) or NAME=VALUE for the job, e.g. AWS_ACCESS_KEY_ID; repeatable."),
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder that goes along; default: the checkout you are in, else this folder.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show the log until the job ends, and end with its exit code.")
    ] = True,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job instead of leaving it running.")
    ] = False,
) -> None:
    """Run a subcommand as a job on a Ray cluster, with your code and configs, and show its log."""
    words, values, arguments = _parse(context, command)
    from eat_dist.cluster.access import job_address, reach
    from eat_dist.cluster.package import collect, find_root
    from eat_dist.console import Console
    from eat_dist.runs.submission import job_environment, plan_job

    console, here = Console(), Path.cwd()
    package = collect(working_dir.expanduser().absolute() if working_dir is not None else find_root(here))
    variables = job_environment(env or [], os.environ)
    job = plan_job(
        words,
        arguments,
        values=values,
        files=package,
        here=here,
        environment=variables,
        configs=_configs_of(words, values, package.root, here),
    )
    access = reach(job_address(address, os.environ), os.environ)
    from eat_dist.cluster.submit import Jobs

    for line in job.warnings:
        console.warn(line)
    jobs = Jobs(access)
    console.say(f"sending      {len(package.files)} files ({package.bytes / 2**20:.1f} MiB) of {package.root}")
    submission = jobs.submit(job.name, job.entrypoint, package=package, environment=variables)
    console.say(f"submitted    {submission}")
    console.say(f"follow       {access.shell(f'logs {submission} --follow')}")
    console.say(f"stop         {access.shell(f'stop {submission}')}")
    if wait:
        raise typer.Exit(_follow(jobs, submission, stop_on_interrupt=stop_on_interrupt))


def _configs_of(words: list[str], values: dict[str, Any], root: Path, here: Path) -> list[RunConfig]:
    """What the runs of a study or sweep are to be, found as the job will find it."""
    below = root / here.relative_to(root) if here.is_relative_to(root) else root
    named = [value for value in values.values() if isinstance(value, Path)]
    if not all((below / file).exists() for file in named):
        return []  # which is said of every file that is not there
    if words == ["study"]:
        from eat_dist.studies.plan import plan_runs
        from eat_dist.studies.reading import load_study

        study = load_study(below / values["file"], values["assignments"] or [])
        return [run.config for run in plan_runs(study, local=values["backend"].value == "local")]
    if words == ["sweep"] and values["resume"] is None:
        from eat_dist.cli_sweep import plan_of
        from eat_dist.spaces import check_space
        from eat_dist.sweeps.plan import check_plan

        plan = plan_of(values, below=below)
        check_plan(plan)
        check_space(plan.space, plan.base)
        return [plan.base]
    return []


def _follow(jobs: Jobs, submission: str, *, stop_on_interrupt: bool) -> int:
    from eat_dist.runs.submission import explain

    end = ""

    def write(text: str) -> None:
        nonlocal end
        end = (end + text)[-_REMEMBERED:]
        sys.stdout.write(text)
        sys.stdout.flush()

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    try:
        code = jobs.follow(submission, write)
    except KeyboardInterrupt:
        _interrupted(jobs, submission, write, tell, stop=stop_on_interrupt)
        return EXIT_INTERRUPTED
    if code != 0:
        tell(f"job '{submission}' ended with exit code {code}{explain(code, end)}")
    return code


def _interrupted(
    jobs: Jobs, submission: str, write: Callable[[str], None], tell: Callable[[str], None], *, stop: bool
) -> None:
    if stop:
        with contextlib.suppress(KeyboardInterrupt):
            tell(f"stopping job '{submission}' (Ctrl-C again: without waiting for it)")
            jobs.stop(submission)
            jobs.follow(submission, write)
            tell(f"stopped job '{submission}'; submit the same command again to go on")
            return
    shell = jobs.access.shell
    tell(
        f"detached; job '{submission}' goes on. Follow it: {shell(f'logs {submission} --follow')}; stop it: "
        f"{shell(f'stop {submission}')}"
    )


def _parse(context: typer.Context, line: list[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """The subcommand's words, what its own parser makes of its arguments, and these as typed.

    Raises:
        ConfigError: There is no such subcommand. Wrong options end as they do without ``submit``.
    """
    command: Any = context.find_root().command
    words: list[str] = []
    rest = list(line)
    while (known := getattr(command, "commands", None)) is not None:
        names = [name for name in known if name != "submit"]
        name = rest.pop(0) if rest else ""
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            before = "".join(f"{word} " for word in words)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise ConfigError(
                f"there is no subcommand '{(before + name).strip()}' to submit{hint} Known: "
                f"{', '.join(f'{before}{name}' for name in names)}"
            )
        words.append(name)
        command = known[name]
    with command.make_context(" ".join(words), list(rest), parent=context.find_root()) as inner:
        values = dict(inner.params)
    return words, values, rest
