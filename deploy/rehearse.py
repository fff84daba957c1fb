"""Rehearse a day on a cluster on this machine: a job, a death, a sweep, the comparison. No cloud, no GPU.

    make rehearse                                            # Omniglot, if data.root of configs/omniglot.yaml has it
    python deploy/rehearse.py --config configs/digits.yaml --out rehearsal

It starts a Ray head that asks for a token and an MLflow server, both on free ports and in folders of their own;
submits a training job; kills one of its members once there is a checkpoint; submits a sweep over γ and ε; compares the
runs and writes the reports. Nothing of the user's (``~/.ray``, running clusters, MLflow) is touched, and everything
started is ended, also after Ctrl-C. Steps and seconds end up in ``OUT/rehearsal.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
START_LIMIT_S = 180
EXPERIMENT = "rehearsal"
# The schedules of both are short: it is the machinery that is rehearsed, not a result.
SETTINGS = ("train.epochs=3", "checkpoint.every=1", "evaluation.kmeans_seeds=1", "evaluation.members=false")
SMALL = ("model.widths=[16,32,64]", "evaluation.num_steps=5", "ensemble.members=2", "cluster.cpus_per_member=0.5")


def main() -> None:
    """Read the options and go through the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/omniglot.yaml"), help="below the checkout")
    parser.add_argument("--data", type=Path, help="folder of the dataset, where the config's own is not right")
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="section.key=value")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("rehearsal"), help="an empty or new folder")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: '{out}' is not empty; give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    data = (f"data.root={arguments.data.absolute()}",) if arguments.data else ()
    rehearsal = Rehearsal(out, (*SETTINGS, *SMALL, f"tracking.experiment={EXPERIMENT}", *data, *arguments.assignments))
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # for the sockets in it
        rehearsal.go(arguments.config, arguments.trials, Path(short))


class Rehearsal:
    """The steps, each timed.

    Args:
        out: Where everything goes.
        settings: ``section.key=value`` for the job and for the sweep's base run.
    """

    def __init__(self, out: Path, settings: tuple[str, ...]) -> None:
        self.out = out
        self.settings = [word for setting in settings for word in ("--set", setting)]
        self.seconds: dict[str, float] = {}
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"HOME": str(out / "home"), "PYTHONUNBUFFERED": "1"}
        # MLflow's requests must not go through a proxy that the user has for the world outside.
        self.environment |= {"NO_PROXY": "127.0.0.1", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def go(self, config: Path, trials: int, short: Path) -> None:
        """All of it.

        Raises:
            SystemExit: A step failed; what it printed says why.
        """
        with self.step("a head that asks for a token, and MLflow"), contextlib.ExitStack() as running:
            running.callback(self.end_leftovers)
            head, address = running.enter_context(self.head(short))
            tracking = running.enter_context(self.mlflow())
            keep = running.pop_all()
        with keep:
            submit = ["submit", "--address", address, "--env", f"MLFLOW_TRACKING_URI={tracking}"]
            train = ["train", "--config", str(config), *self.settings, "--run-dir", str(self.out / "runs" / "eat")]
            with self.step("a training job, one member killed"), Assassin(head, self.out / "runs" / "eat") as assassin:
                self.run(*submit, *train)
            if assassin.killed is None:
                sys.exit("error: the job ended before a member could be killed; give it more epochs")
            with self.step("the same job once more, which finds nothing left to do"):
                self.run(*submit, *train)
            space = "tune_spaces/gamma_epsilon.yaml"
            sweep = ["sweep", "--config", str(config), *self.settings, "--space", space, "--trials", str(trials)]
            with self.step(f"a sweep of {trials} trials"):
                self.run(*submit, *sweep, "--sweep-dir", str(self.out / "sweep"))
            with self.step("the comparison and the reports"):
                by = ["--sort", "worst/nmi", "--tracking-uri", tracking]
                self.run("compare", EXPERIMENT, *by, "--output", str(self.out / "comparison.html"))
                self.run("report", str(self.out / "sweep"), "-o", str(self.out / "sweep.html"))
        killed = f"member process {assassin.killed} killed; the run went on from its checkpoint"
        self.out.joinpath("rehearsal.json").write_text(
            json.dumps({"seconds": self.seconds, "killed": killed}, indent=2) + "\n", encoding="utf-8"
        )
        print("\n| step | seconds |\n|---|---|")
        for name, seconds in self.seconds.items():
            print(f"| {name} | {seconds:.0f} |")
        print(f"| all | {sum(self.seconds.values()):.0f} |\n\n{killed}")
        print(f"reports      {self.out}/comparison.html, {self.out}/sweep.html")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say what is done, and take the time."""
        print(f"\n=== {name}", flush=True)
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 1)

    def run(self, *arguments: str) -> None:
        """An ``eat-dist`` command as the user gives it, from the checkout."""
        command = [sys.executable, "-m", "eat_dist", *arguments]
        code = subprocess.run(command, cwd=REPOSITORY, env=self.environment, check=False).returncode
        if code:
            sys.exit(f"error: eat-dist {' '.join(arguments[:5])} … ended with exit code {code}")

    @contextlib.contextmanager
    def head(self, short: Path) -> Iterator[tuple[psutil.Process, str]]:
        """A head on free ports, with its token in a home of its own: the process, and the address of its job server."""
        token = self.out / "home" / ".ray" / "auth_token"
        token.parent.mkdir(parents=True)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        token.chmod(0o600)
        names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
        names += ["ray-client-server-port", "runtime-env-agent-port", "metrics-export-port"]
        names += ["node-manager-port", "object-manager-port"]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=200000000", f"--temp-dir={short}"]
        # Jobs find python by the PATH of the head.
        path = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options]
        with self.started(command, self.environment | {"RAY_AUTH_MODE": "token", "PATH": path}, "head.log") as process:
            self.wait_for(ports["dashboard-port"], process)
            yield psutil.Process(process.pid), f"http://127.0.0.1:{ports['dashboard-port']}"

    @contextlib.contextmanager
    def mlflow(self) -> Iterator[str]:
        """An MLflow server with its own database and artifacts: its URI."""
        (port,) = free_ports(1)
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{self.out}/mlflow.db"]
        command += ["--artifacts-destination", str(self.out / "artifacts")]
        with self.started(command, self.environment, "mlflow.log") as process:
            self.wait_for(port, process)
            yield f"http://127.0.0.1:{port}"

    @contextlib.contextmanager
    def started(self, command: list[str], environment: dict[str, str], log: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process that ends, with all that it started, when the context does."""
        with (self.out / log).open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            yield process
        finally:
            family = [psutil.Process(process.pid), *descendants(process.pid)] if process.poll() is None else []
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            _, alive = psutil.wait_procs(family, timeout=15)
            for left in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.wait()

    def end_leftovers(self) -> None:
        """End what came to life while its parents were being ended: it has the rehearsal's own home folder."""
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("HOME") == self.environment["HOME"]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def wait_for(self, port: int, process: subprocess.Popen[bytes]) -> None:
        """Until something listens.

        Raises:
            SystemExit: The process ended, or took too long.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            time.sleep(0.2)
        sys.exit(f"error: {' '.join(process.args[:4])} … does not listen; see the logs in {self.out}")  # type: ignore[index]


class Assassin:
    """Kills one member of a run as soon as there is a checkpoint that it can go on from; a context manager.

    Attributes:
        killed: The process, once it was.
    """

    def __init__(self, head: psutil.Process, run: Path) -> None:
        self.killed: int | None = None
        self._head, self._run = head, run
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Assassin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.killed is None and not self._done.wait(0.1):
            if not any(self._run.glob("checkpoints/*/checkpoint.json")):
                continue
            for process in descendants(self._head.pid):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        self.killed = process.pid
                        print(f"--- killed a member (process {process.pid})", flush=True)
                        break


def descendants(pid: int) -> list[psutil.Process]:
    """All processes that a process started, and those that these did."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running then, either
    with contextlib.suppress(KeyboardInterrupt):
        main()
        sys.exit(0)
    sys.exit(130)
