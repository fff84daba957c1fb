"""Jobs on a real Ray head that asks for a token: submitted, followed, stopped, submitted again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import REPOSITORY
from eat_dist.cli_submit import _follow
from eat_dist.cluster.access import reach
from eat_dist.cluster.package import collect
from eat_dist.cluster.submit import Jobs
from eat_dist.errors import ClusterError
from eat_dist.runs.submission import STOPPING

TOKEN = "a-token-of-this-test-0123456789abcdef"
PATIENCE_S = 240
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Head:
    """A cluster of one node.

    Attributes:
        address: Its job server.
        home: A home folder with its token.
    """

    address: str
    home: Path

    def jobs(self) -> Jobs:
        return Jobs(reach(self.address, {"HOME": str(self.home)}))

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """``eat-dist submit`` as a user has it who has the token's file, and nothing exported."""
        unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {"HOME": str(self.home), "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        # A background process of some shells ignores SIGINT, and hands that on.
        script = "import signal as s, eat_dist.cli as c; s.signal(s.SIGINT, s.default_int_handler); c.main()"
        return [sys.executable, "-c", script, "submit", *arguments, "--address", self.address], environment


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for held in sockets:
        held.bind(("127.0.0.1", 0))
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """``ray start --head`` in a process group of its own, on ports that are free, with a home folder of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["ray-client-server-port", "runtime-env-agent-port", "metrics-export-port"]
    names += ["node-manager-port", "object-manager-port"]
    ports = free_ports(len(names))
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    workers = 20000 + os.getpid() % 10000  # below those that the kernel hands out
    options += [f"--min-worker-port={workers}", f"--max-worker-port={workers + 400}", "--num-cpus=2", "--num-gpus=0"]
    options += ["--object-store-memory=100000000", f"--temp-dir={short_folder(tmp_path_factory)}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with open(home / "head.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    running = Head(f"http://127.0.0.1:{ports[1]}", home)
    try:
        wait_until(lambda: answers(running), process=process)
        yield running
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def short_folder(factory: pytest.TempPathFactory) -> Path:
    """Names of sockets have a limit of 107 characters."""
    return factory.getbasetemp().parent / f"r{os.getpid()}"


def answers(head: Head) -> bool:
    try:
        head.jobs()._client.list_jobs()
    except ClusterError:
        return False
    except Exception:  # the job server's agents start after its door
        return False
    return True


def wait_until(condition: Callable[[], bool], *, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, "the process ended first"
        time.sleep(0.2)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with a config, a log that grows, and results that are too large to send."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    (folder / "night.log").write_text("a line\n")
    return folder


def submit_shell(head: Head, project: Path, command: str, name: str = "shell") -> tuple[Jobs, str]:
    jobs = head.jobs()
    return jobs, jobs.submit(name, command, package=collect(project), environment=STOPPING)


def test_a_jobs_exit_code_is_the_commands_and_its_log_arrives_once_and_whole(head: Head, project: Path) -> None:
    """Slow, as all here: a head takes ten to twenty seconds to start, and each job some more."""
    jobs, submission = submit_shell(head, project, "seq 1 200; ls; echo $EAT_DIST_JOB; exit 3")
    log: list[str] = []

    code = jobs.follow(submission, log.append)

    lines = "".join(log).splitlines()
    assert code == 3
    assert [line for line in lines if line.isdigit()] == [str(number) for number in range(1, 201)]
    assert submission in lines
    assert submission == "shell-1"
    assert "night.log" not in lines
    assert jobs.follow(submission, log.append) == 3  # known already: nothing is told twice
    assert "".join(log).splitlines() == lines


def test_interrupting_stops_the_job_if_that_is_asked_for(
    head: Head, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs, submission = submit_shell(head, project, "echo working; trap 'echo cleaned up; exit 5' INT; sleep 600 & wait")
    log: list[str] = []

    def interrupted(_: str, write: Callable[[str], None]) -> int:
        jobs.follow = followed  # type: ignore[method-assign]
        raise KeyboardInterrupt

    followed, jobs.follow = jobs.follow, interrupted  # type: ignore[method-assign]
    wait_until(lambda: "working" in jobs._client.get_job_logs(submission))

    code = _follow(jobs, submission, stop_on_interrupt=True)

    told = capfd.readouterr()
    log.append(told.out)
    assert code == 130
    assert f"stopped job '{submission}'" in told.err
    assert "cleaned up" in told.out  # it was interrupted, as Ctrl-C would, and not only killed
    assert str(jobs._client.get_job_status(submission)) == "STOPPED"
    assert jobs.follow(submission, log.append) == 143


def test_a_training_is_detached_from_stopped_and_submitted_again_to_its_end(head: Head, project: Path) -> None:
    """Slow: two real trainings on Ray. With the token's file alone, from a folder that has only a config."""
    from small_runs import small_config

    (project / "configs" / "mine.yaml").write_text(
        json.dumps(
            small_config(
                "ensemble.members=1", "train.epochs=40", "attack.num_steps=10", "evaluation.protocol=none"
            ).model_dump(mode="json")
        )
    )
    run = project.parent / "shared" / "first"
    train = ["train", "--run-dir", str(run), "--config", "configs/mine.yaml"]
    command, environment = head.command(*train, "--working-dir", str(project), "--env", f"PYTHONPATH={REPOSITORY}")
    first = subprocess.Popen(
        command, env=environment, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(run.glob("checkpoints/*/checkpoint.json")), process=first)  # type: ignore[arg-type]

    first.send_signal(signal.SIGINT)
    out, error = first.communicate(timeout=PATIENCE_S)

    jobs = head.jobs()
    assert first.returncode == 130, error
    assert "submitted    train-first-1" in out
    last = error.splitlines()[-1]
    assert last.startswith("detached; job 'train-first-1' goes on. Follow it: RAY_AUTH_MODE=token ray job logs ")
    assert str(jobs._client.get_job_status("train-first-1")) == "RUNNING"
    assert json.loads((run / "lease.json").read_text())["job"] == "train-first-1"

    jobs.stop("train-first-1")
    assert jobs.follow("train-first-1", lambda text: None) == 143
    assert not (run / "lease.json").exists()  # it had time to give the folder free
    assert not (run / "summary.json").exists(), "it had ended before it was stopped"

    again = subprocess.run(command, env=environment, cwd=project, capture_output=True, text=True, check=False)

    assert again.returncode == 0, again.stdout + again.stderr
    assert "submitted    train-first-2" in again.stdout
    assert "Resuming from iteration" in again.stdout
    assert json.loads((run / "summary.json").read_text())["resumed_from_iteration"] > 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RAY_AUTH_TOKEN": "another"}, "does not accept the token from RAY_AUTH_TOKEN: put that of this cluster in"),
        ({"HOME": "/nowhere"}, "asks for a token, and there is none: put it in RAY_AUTH_TOKEN, in a file that"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled' here: set RAY_AUTH_MODE=token"),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_one_line_that_says_where_to_set_it(
    head: Head, environment: dict[str, str], expected: str
) -> None:
    with pytest.raises(ClusterError) as refused:
        reach(head.address, {"HOME": str(head.home)} | environment)

    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
    assert TOKEN not in str(refused.value)
