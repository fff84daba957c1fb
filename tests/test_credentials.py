"""Passwords of MLflow's store: refused in a config, and never printed, kept or sent when the environment has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eat_dist.config import load_config, parse_config
from eat_dist.console import Console
from eat_dist.credentials import redacted
from eat_dist.errors import ConfigError
from eat_dist.tracking.store import reason
from mlflow_server import Server, clean_environment, client

SECRET = "geheim"
HOLDING = {
    f"https://anna:{SECRET}@mlflow.example.org/a": "https://***@mlflow.example.org/a",
    f"https://{SECRET}@mlflow.example.org": "https://***@mlflow.example.org",
    f"postgresql+psycopg2://anna:{SECRET}@db:5432/mlflow": "postgresql+psycopg2://***@db:5432/mlflow",
    f"postgresql://anna:{SECRET}@more@db/mlflow": "postgresql://***@db/mlflow",
    f"mysql://anna:a/{SECRET}@db/mlflow": "mysql://***@db/mlflow",
    f"postgresql://db/mlflow?user=anna&password={SECRET}&sslmode=require": (
        "postgresql://db/mlflow?user=anna&password=***&sslmode=require"
    ),
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3Da%3BPWD%3D{SECRET}": "mssql+pyodbc:///?odbc_connect=***",
}
HARMLESS = (
    "http://127.0.0.1:5000",
    "https://mlflow.example.org/team",
    "postgresql://db:5432/mlflow?sslmode=require",
    "sqlite:///mlflow.db",
    "sqlite:////home/anna@work/a:b@c/mlflow.db",
    "databricks",
)


@pytest.mark.parametrize("uri", HOLDING)
def test_a_uri_with_credentials_is_refused_by_a_config_and_not_repeated(uri: str) -> None:
    for read in (
        lambda: load_config(None, [f"tracking.uri={uri}"]),
        lambda: parse_config({"tracking": {"uri": uri}, "train": {"epochs": 0}}),
    ):
        with pytest.raises(ConfigError, match=r"tracking\.uri: the URI holds credentials") as caught:
            read()
        message = str(caught.value)
        assert "\n" not in message
        assert SECRET not in message
        for better in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
            assert better in message


@pytest.mark.parametrize("uri", HARMLESS)
def test_a_uri_without_credentials_is_taken_and_shown_as_it_is(uri: str) -> None:
    assert parse_config({"tracking": {"uri": uri}}).tracking.uri == uri
    assert redacted(uri) == uri


@pytest.mark.parametrize("uri", HOLDING)
def test_what_the_environment_names_is_shown_without_its_password(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    Console().mlflow(uri, "0" * 32)
    Console().mlflow(None, "0" * 32)
    printed = capsys.readouterr().out
    assert f"{HOLDING[uri]}\n" in printed
    assert SECRET not in printed
    assert reason(ValueError(f"cannot reach {uri} today")) == f"cannot reach {HOLDING[uri]} today"


def test_a_password_that_lies_where_an_error_is_cut_off_is_not_shown() -> None:
    uri = f"postgresql://anna:{SECRET}@db/mlflow"
    assert SECRET not in reason(ValueError(f"{'x' * (199 - len(uri.partition('@')[0]))} {uri}"))


@pytest.mark.slow
def test_a_run_with_a_password_in_the_environments_uri_neither_keeps_nor_sends_it(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Slow because a real MLflow server is started, which does not look at the password."""
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    holding = server.uri.replace("//", f"//anna:{SECRET}@")
    settings = [
        *("data.batch_size=200", "data.images_per_class=40", "model.widths=[8,16]", "attack.num_steps=2"),
        *("train.epochs=1", "cluster.backend=local", "evaluation.num_steps=1", "evaluation.members=false"),
        "evaluation.kmeans_seeds=1",
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    try:
        server.start()
        with clean_environment(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", holding)
            code, out, error = run("train", *options, "--run-dir", "sent")
            assert (code, SECRET in out + error) == (0, False), error
            assert f"open MLflow  {server.uri.replace('//', '//***@')}" in out
            patch.delenv("MLFLOW_TRACKING_URI")
            code, out, error = run("train", *options, "--set", "tracking.enabled=false", "--run-dir", "unsent")
            assert code == 0, error
            code, out, error = run("register", "unsent", "digits", "--tracking-uri", holding)
            assert (code, SECRET in out + error) == (0, False), error
        store = client(server.uri)
        experiment = store.get_experiment_by_name("eat_dist")
        runs = store.search_runs([experiment.experiment_id])
        assert {run.info.run_name for run in runs} == {"sent", "unsent"}
        for kept in runs:
            assert kept.data.params["tracking.uri"] in ("None", server.uri.replace("//", "//***@"))
            assert SECRET not in str(kept.to_dictionary())
    finally:
        server.kill()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
