"""Jobs on a Ray cluster: submitted, followed to their exit code, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from eat_dist.cluster.access import Access, check_answers
from eat_dist.cluster.package import Package
from eat_dist.errors import ClusterError

# What of the head's absence is waited out; the job does not notice that nobody listens.
PATIENCE_S = 300.0
STOPPED = 143  # as a shell reports a program that was asked to end (128 + SIGTERM)
_POLL_S = 1.0
_QUIET_S = 30.0
_FAULTS = (RuntimeError, OSError, ValueError, AuthenticationError, requests.RequestException, aiohttp.ClientError)


class Jobs:
    """The jobs of one cluster.

    Args:
        access: A job server that has answered.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self._written: dict[str, int] = defaultdict(int)
        for module in ("dashboard_sdk", "job.sdk"):  # they tell of every step, at a level that they set themselves
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        # Ray's client takes these variables before the address that it is given.
        with _variable("RAY_API_SERVER_ADDRESS", access.address), self._speaking():
            self._client = JobSubmissionClient(access.address, headers=dict(access.headers))

    def submit(self, name: str, entrypoint: str, *, package: Package, environment: Mapping[str, str]) -> str:
        """Send the files and start the job.

        Args:
            name: The id is this and the first number that was not used yet.
            entrypoint: A shell command, run in the sent folder on the head.
            package: The files. They are packed before anything else, so what changes from now on changes no job.
            environment: Variables of the job and of all its workers; ``EAT_DIST_JOB``, its id, is added.

        Returns:
            The submission's id.

        Raises:
            ClusterError: The server refuses it.
        """
        with tempfile.TemporaryDirectory() as folder, self._speaking():
            archive = Path(folder) / "package.zip"
            package.write(archive)
            taken = {job.submission_id for job in self._client.list_jobs()}
            number = max((_number(name, other) for other in taken if other), default=0)
            number, begin = number + 1, time.monotonic()
            while True:
                submission = f"{name}-{number}"
                variables = dict(environment) | {"EAT_DIST_JOB": submission}
                try:
                    return str(
                        self._client.submit_job(
                            entrypoint=entrypoint,
                            submission_id=submission,
                            runtime_env={"working_dir": str(archive), "env_vars": variables},
                            metadata={"submitted_by": "eat-dist"},
                        )
                    )
                except RuntimeError as error:
                    if "already exists" in str(error):  # somebody took that number a moment ago
                        number += 1
                    elif "try again later" in str(error) and time.monotonic() - begin < PATIENCE_S:
                        time.sleep(_POLL_S)  # a head that has just started has no agent yet
                    else:
                        raise

    def follow(self, submission: str, write: Callable[[str], None]) -> int:
        """Hand on a job's log until it ends.

        A lost connection is made again for ``PATIENCE_S``; nothing is handed on twice, not by a second call either.

        Args:
            submission: The job's id.
            write: Takes pieces of text as they come.

        Returns:
            The exit code of the job's command; ``STOPPED`` if it was stopped.

        Raises:
            ClusterError: It never ran, was lost by the cluster, or the cluster does not answer any more.
        """
        lost_since = None
        while True:
            try:
                for text, end in self._tail(submission):
                    fresh = end - self._written[submission]
                    if fresh > 0:  # else a new connection tells again what is known
                        write(text[-fresh:])
                        self._written[submission] = end
                with self._speaking():
                    details = self._client.get_job_info(submission)
            except ClusterError as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > PATIENCE_S:
                    raise ClusterError(
                        f"the cluster does not answer any more ({error}); '{submission}' may go on: "
                        f"{self.access.shell(f'logs {submission} --follow')}"
                    ) from error
            else:
                lost_since = None
                if details.status.is_terminal():
                    return _exit_code(submission, details)
            time.sleep(_POLL_S)

    def stop(self, submission: str) -> None:
        """Ask a job to stop, as Ctrl-C would; :meth:`follow` sees its end.

        Raises:
            ClusterError: The cluster does not answer.
        """
        with self._speaking():
            self._client.stop_job(submission)

    def _tail(self, submission: str) -> Iterator[tuple[str, int]]:
        """The log from its beginning, in pieces, each with the number of characters up to its end."""
        end = 0
        with asyncio.Runner() as runner:
            pieces, task = self._client.tail_job_logs(submission), None
            while True:
                task = task or runner.get_loop().create_task(_next(pieces))
                with self._speaking():
                    if runner.run(_is_done(task, _QUIET_S)):
                        text, task = task.result(), None
                    else:
                        # Nothing to say, or a connection that something on the way has dropped without a word?
                        check_answers(self.access)
                        if not self._client.get_job_status(submission).is_terminal():
                            continue
                        text, end = self._client.get_job_logs(submission), 0
                if text is None:
                    return
                end += len(text)
                yield text, end
                if task is not None:
                    return

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """What Ray's client raises, as one line."""
        try:
            yield
        except _FAULTS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ClusterError(f"the cluster at {self.access.address} answered: {reason[:500]}") from error


async def _next(pieces: Any) -> str | None:
    return await anext(pieces, None)


async def _is_done(task: asyncio.Task[str | None], timeout: float) -> bool:
    done, _ = await asyncio.wait({task}, timeout=timeout)
    return bool(done)


def _exit_code(submission: str, details: Any) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code
    if code is None:
        lines = [line.strip() for line in (details.message or "").splitlines() if line.strip()]
        kind = f" ({details.error_type})" if details.error_type else ""
        reason = lines[-1] if lines else "no reason given"
        raise ClusterError(f"job '{submission}' did not run to its end{kind}: {reason}")
    return int(code) if code > 0 else 128 - int(code)  # a negative one is the signal that ended it


def _number(name: str, other: str) -> int:
    found = re.fullmatch(rf"{re.escape(name)}-(\d+)", other)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
