"""``eat-dist submit`` before it speaks to a cluster: what it finds out by itself is one line, and nothing is sent."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import REPOSITORY
from eat_dist import cli
from eat_dist.cluster.access import Access, find_token, job_address, reach
from eat_dist.cluster.package import collect
from eat_dist.errors import ClusterError, ConfigError
from eat_dist.runs.submission import explain, job_environment, plan_job

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["eat-dist", "submit", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0), capsys.readouterr().err

    return call


TRAIN = ["train", "--run-dir", "/shared/a"]
BAD = {
    "no cluster there": ([*TRAIN, "--address", NOWHERE], f"no cluster answers at {NOWHERE} ("),
    "no cluster named": (TRAIN, "which cluster? Give --address http://HEAD:8265"),
    "an address of another form": ([*TRAIN, "--address", "head:6379"], "must be the URL of the head's dashboard"),
    "an unknown command": (["trian"], "no subcommand 'trian' to submit; did you mean 'train'? Known: "),
    "half a command": (["data"], "no subcommand 'data' to submit. Known: data prepare, data inspect"),
    "itself": (["submit", "train"], "no subcommand 'submit' to submit"),
    "a run without a name": (["train"], "needs a name that a resubmission finds again: give --run-dir"),
    "a run folder in the job's": (["train", "--run-dir", "runs/a"], "give an absolute path on a disk that every node"),
    "a missing config": ([*TRAIN, "--config", "nope.yaml"], "there is no file '"),
    "a config elsewhere": ([*TRAIN, "--config", __file__], "does not go along with the job"),
    "a faulty config": ([*TRAIN, "--set", "attack.epsilom=1"], "did you mean 'epsilon'?"),
    "data that stay here": ([*TRAIN, "--set", "data.root=photos"], "data.root is 'photos', which does not go along"),
    "a model without a place for results": (["evaluate", "mymodel:build"], "give --output, an absolute path"),
    "a run of this machine's": (["evaluate", "runs/a"], "a run is named by its absolute path or URL"),
    "a missing working folder": ([*TRAIN, "--working-dir", "nope"], "there is no folder '"),
    "a variable that is not set": ([*TRAIN, "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: it is not set here"),
    "a variable without a name": ([*TRAIN, "--env", "=1"], "--env takes NAME or NAME=VALUE"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_one_line(case: str, run: Callable[..., tuple[int, str]]) -> None:
    arguments, expected = BAD[case]

    code, error = run(*arguments)

    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--epochs", "3"], "No such option"),
        (["data", "prepare", "--dataset", "cub200"], "Missing option '--out'"),
        (["evaluate", "/a", "--workers", "many"], "--workers"),
    ],
)
def test_wrong_options_of_the_submitted_command_are_found_here(
    arguments: list[str], expected: str, run: Callable[..., tuple[int, str]]
) -> None:
    code, error = run(*arguments, "--address", NOWHERE)

    assert code == 2
    assert expected in error
    assert "no cluster" not in error


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        ("{}", ["--study-dir", "/shared/s"], f"no cluster answers at {NOWHERE}"),
        ("{}", [], "a submitted study needs a name that a resubmission finds again: give --study-dir, an"),
        ("{}", ["--study-dir", "studies/s"], "'studies/s' (study-dir) would lie in the job's own folder"),
        ("{}", ["--study-dir", "/shared/s", "--set", "data.root=photos"], "data.root is 'photos', which does not go"),
        ("{seed: x}", ["--study-dir", "/shared/s"], "base.yaml: seed: "),
    ],
)
def test_a_study_is_read_before_it_is_submitted(
    base: str, options: list[str], expected: str, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "s.yaml").write_text("base: base.yaml\nrows: {natural: {defense.name: natural}}")

    code, error = run("study", "s.yaml", *options, "--address", NOWHERE)

    assert code == 2
    assert expected in error
    assert error.count("\n") == 1


SWEEP = ["--space", "space.yaml", "--trials", "3", "--sweep-dir", "/shared/s"]


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        ("{}", SWEEP, f"no cluster answers at {NOWHERE}"),
        ("{}", ["--sweep-dir", "/shared/s"], "a sweep needs --space and --trials"),
        ("{}", SWEEP[:4], "a submitted sweep needs a name that a resubmission finds again: give --sweep-dir, an"),
        ("{attack: {epsilonn: 1}}", SWEEP, "attack.epsilonn"),
        ("{}", [*SWEEP, "--set", "attack.epsilonn=1"], "attack.epsilonn"),
        ("{}", [*SWEEP, "--set", "data.root=photos"], "data.root is 'photos', which does not go along"),
        ("{}", [*SWEEP, "--grace-period", "99"], "--grace-period must be between 1 and train.epochs"),
        ("{}", ["--resume", "/shared/s"], f"no cluster answers at {NOWHERE}"),
    ],
)
def test_a_sweep_is_read_before_it_is_submitted(
    base: str, options: list[str], expected: str, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "space.yaml").write_text("defense.diversity_weight: {uniform: [0, 1]}")
    config = [] if "--resume" in options else ["--config", "base.yaml"]

    code, error = run("sweep", *config, *options, "--address", NOWHERE)

    assert code == 2
    assert expected in error
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error


def planned(tmp_path: Path, *arguments: str, here: Path | None = None, **values: Any) -> Any:
    command = values.pop("command", ("train",))
    empty = {"config": None, "assignments": None, "run_dir": None, "resume": None, "overwrite": False}
    return plan_job(
        command,
        arguments,
        values=empty | {"resume_or_start": False} | values,
        files=collect(tmp_path),
        here=here or tmp_path,
        environment={},
    )


def test_a_submitted_training_is_named_after_its_folder_and_can_be_submitted_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text("seed: 3")
    folder = "s3://bucket/runs/γ 0.5?region=eu"

    typed = ["--config", "a.yaml", "--run-dir", folder]
    job = planned(tmp_path, *typed, here=tmp_path / "mine", config=Path("a.yaml"), run_dir=folder)

    assert job.name == "train-0.5"
    assert job.entrypoint == (
        f"cd mine && exec python -m eat_dist train --config a.yaml --run-dir '{folder}' --resume-or-start"
    )
    assert "no MLflow server is named" in job.warnings[0]


@pytest.mark.parametrize("given", [{"overwrite": True, "run_dir": "/a"}, {"resume": "/a"}])
def test_what_the_user_asked_for_instead_is_left_as_it_is(given: dict[str, Any], tmp_path: Path) -> None:
    assert "--resume-or-start" not in planned(tmp_path, "--as-typed", **given).entrypoint


@pytest.mark.parametrize(
    ("command", "values", "name"),
    [
        (("evaluate",), {"target": "/shared/runs/a/"}, "evaluate-a"),
        (("evaluate",), {"target": "mymodel:build", "output": "s3://bucket/e1"}, "evaluate-e1"),
        (("data", "prepare"), {"out": "/shards/cub200", "dataset": "cub200"}, "data-prepare-cub200"),
        (("embed",), {"run_dir": "/shared/runs/a", "output": "/o.parquet"}, "embed-a"),
    ],
)
def test_other_jobs_are_named_after_what_they_work_on(
    command: tuple[str, ...], values: dict[str, Any], name: str, tmp_path: Path
) -> None:
    assert planned(tmp_path, command=command, **values).name == name


def test_a_job_gets_the_tracking_server_and_what_was_asked_for_and_no_secret_unasked() -> None:
    here = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ACCESS_KEY_ID": "id",
        "RAY_AUTH_TOKEN": "token",
    }

    variables = job_environment(["AWS_ACCESS_KEY_ID", "AWS_REGION=eu=1", "EMPTY="], here)

    assert variables == {
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_REGION": "eu=1",
        "EMPTY": "",
    }


def test_what_is_typed_wins_over_the_variables_and_a_cluster_address_is_no_url() -> None:
    both = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}

    assert job_address("https://typed:3/", both) == "https://typed:3"
    assert job_address(None, both) == "http://a:1"
    assert job_address(None, {"RAY_ADDRESS": "http://b:2"}) == "http://b:2"
    with pytest.raises(ClusterError, match="which cluster"):
        job_address(None, {"RAY_ADDRESS": "10.0.0.1:6379"})


def test_an_exit_code_is_explained_where_the_log_says_why() -> None:
    assert "not installed on the cluster" in explain(1, "/usr/bin/python: No module named eat_dist\n")
    assert "no `python`" in explain(127, "")
    assert explain(2, "error: a bad config") == ""


TOKENS = {
    "nothing": ({}, None),
    "the file in the home folder": ({"HOME": "with"}, "from-home"),
    "a file named": ({"HOME": "with", "RAY_AUTH_TOKEN_PATH": "named"}, "from-named"),
    "the variable": ({"HOME": "with", "RAY_AUTH_TOKEN_PATH": "named", "RAY_AUTH_TOKEN": " typed "}, "typed"),
    "an empty variable": ({"HOME": "with", "RAY_AUTH_TOKEN": ""}, "from-home"),
    "an empty file": ({"HOME": "empty"}, None),
}
ASK_RAY = """
import json, os, sys
from ray._raylet import AuthenticationTokenLoader
loader, found = AuthenticationTokenLoader.instance(), []
for case in json.load(sys.stdin):
    for name in ("HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ.update(case)
    loader.reset_cache()
    header = loader.get_token_for_http_header(ignore_auth_mode=True)
    found.append(header.get("authorization", "").removeprefix("Bearer ") or None)
json.dump(found, sys.stdout)
"""


def token_cases(folder: Path) -> list[tuple[dict[str, str], str | None]]:
    for home, text in {"with": " from-home\n\n", "empty": " \n", "bare": None}.items():
        (folder / home / ".ray").mkdir(parents=True)
        if text is not None:
            (folder / home / ".ray" / "auth_token").write_text(text)
    (folder / "named").write_text("from-named\n")

    def placed(given: dict[str, str]) -> dict[str, str]:
        paths = {"HOME": "bare"} | {name: given[name] for name in ("HOME", "RAY_AUTH_TOKEN_PATH") if name in given}
        return given | {name: str(folder / path) for name, path in paths.items()}

    return [(placed(given), expected) for given, expected in TOKENS.values()]


def test_a_token_is_found_where_ray_itself_finds_it(tmp_path: Path) -> None:
    cases = token_cases(tmp_path)

    mine = [token.value if (token := find_token(given)) is not None else None for given, _ in cases]
    rays = subprocess.run(
        [sys.executable, "-c", ASK_RAY],
        input=json.dumps([given for given, _ in cases]),
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert mine == [expected for _, expected in cases]
    assert json.loads(rays) == mine


def test_a_token_file_that_is_named_and_missing_is_an_error_and_no_token_is_ever_shown(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH names '/nope'"):
        find_token({"RAY_AUTH_TOKEN_PATH": "/nope"})
    token = find_token({"RAY_AUTH_TOKEN": "secret"})
    assert "secret" not in repr(token)
    assert "secret" not in repr(Access("http://a", {"Authorization": "Bearer secret"}))


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as ``script`` says and keeps what it was sent."""

    script: ClassVar[tuple[int, bytes, dict[str, str]]] = (200, b"{}", {})
    tokens: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        status, body, headers = self.script
        self.tokens.append(self.headers.get("Authorization"))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        Server.tokens = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_token_goes_to_no_server_that_does_not_ask(server: str) -> None:
    Server.script = (200, b'{"ray_version": "2.60.0"}', {})

    assert reach(server, {"RAY_AUTH_TOKEN": "secret"}).headers == {}
    assert Server.tokens == [None]


def test_a_token_does_not_follow_a_redirection(server: str) -> None:
    Server.script = (307, b"", {"Location": f"{server}/elsewhere"})

    with pytest.raises(ClusterError, match=r"is no Ray dashboard \(HTTP 307\)"):
        reach(server, {"RAY_AUTH_TOKEN": "secret"})
    assert Server.tokens == [None]


@pytest.mark.parametrize("script", [(200, b"<html>", {}), (404, b"", {}), (200, b"{}", {})])
def test_something_else_that_answers_is_one_line(server: str, script: Any) -> None:
    Server.script = script

    with pytest.raises(ClusterError, match="is no Ray dashboard"):
        reach(server, {})


SCRIPTS = {path.stem: path for path in sorted((REPOSITORY / "jobs").glob("*.py"))}


@pytest.mark.parametrize("script", ["train", "prepare_data"])
def test_a_job_script_takes_the_options_of_its_command(script: str) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPTS[script]), "--no-such-option"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 2
    assert "No such option" in result.stderr
    assert {"train": " train ", "prepare_data": " data prepare "}[script] in result.stderr


def test_there_is_a_script_for_each_command_that_runs_on_a_cluster() -> None:
    assert {"train", "evaluate", "embed", "prepare_data", "sweep"} <= set(SCRIPTS)


def test_a_config_beside_a_faulty_path_is_not_loaded_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: no")

    with pytest.raises(ConfigError, match="seed"):
        planned(tmp_path, run_dir="/a", config=Path("a.yaml"), here=Path("/"))
