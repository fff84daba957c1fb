"""What is no MLflow server, but answers all the same, and what is no store at all, is named in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eat_dist.config import parse_config
from eat_dist.tracking import Tracker, end_run
from mlflow_server import clean_environment, stand_in, warnings_of

NO_MLFLOW = {
    "a web server": ((404, "text/html", b"<html>no</html>"), "no MLflow server (it answers /version with HTTP 404"),
    "a web page": ((200, "text/html", b"<html>hello</html>"), "no MLflow server (it answers /version with HTTP 200"),
    "a gate": ((401, "text/plain", b"who are you?"), "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME"),
}


def start(uri: str) -> Tracker:
    config = parse_config({"tracking": {"uri": uri}})
    return Tracker.start(config, run_name="a run", tags={}, resume_run_id="0" * 32, wait=60)


@pytest.mark.parametrize("case", NO_MLFLOW)
def test_what_is_no_mlflow_server_is_named_in_one_warning(case: str, caplog: pytest.LogCaptureFixture) -> None:
    answer, expected = NO_MLFLOW[case]
    with clean_environment(), stand_in(lambda _: answer) as uri:
        tracker = start(uri)
        tracker.log_metrics({"loss": 1.0}, 1)
        assert not tracker.close("FINISHED")
    [warning] = warnings_of(caplog)
    assert expected in warning
    assert uri in warning
    assert tracker.missing == 3


WRONG_STORES = {
    "./mlruns": "plain folder any more; give sqlite:///FILE.db",
    "file:///nowhere/mlruns": "plain folder any more; give sqlite:///FILE.db",
    "nonsense": "plain folder any more; give sqlite:///FILE.db",
    "ftp://x": "MLflow has no store of that kind; give sqlite:///FILE.db",
    "mysql+nothing://anna:geheim@127.0.0.1/x": "Can't load plugin",
}


@pytest.mark.parametrize("uri", WRONG_STORES)
def test_a_store_that_mlflow_cannot_use_is_one_line_for_every_command_that_reads(
    uri: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for command in (("register", "0" * 32, "digits"), ("evaluate", "models:/digits/1"), ("compare", "an experiment")):
        with clean_environment(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            code, out, error = run(*command)
        assert (code, out) == (2, "")
        assert error.startswith("error: no store to ")
        assert error.count("\n") == 1
        assert WRONG_STORES[uri] in error
        assert uri.replace("anna:geheim", "***") in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_store_mlflow_cannot_use_is_told_what_to_give(caplog: pytest.LogCaptureFixture) -> None:
    with clean_environment():
        assert not start("./mlruns").close("FINISHED")
        assert not end_run("./mlruns", "0" * 32, "KILLED")
    silent, keeps = warnings_of(caplog)
    for warning in (silent, keeps):
        assert "MLflow at ./mlruns cannot be used: MLflow keeps no runs in a plain folder any more; give sql" in warning
