"""Whole runs through a real ``mlflow server`` on loopback: recorded, compared, registered, shown in its web page."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eat_dist.console import Console
from eat_dist.models.ensemble import load_ensemble
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.runs import start_run
from eat_dist.tracking import delivery, end_run
from mlflow_server import (
    GAMMAS,
    Recorded,
    Server,
    clean_environment,
    client,
    config_for,
    free_port,
    record,
    stand_in,
    warnings_of,
)

EPOCHS, ITERATIONS = 4, 20  # of small_config


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("mlflow")
    server = Server(folder)
    with clean_environment():
        try:
            server.start()
            yield record(server, folder)
        finally:
            server.kill()


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """As everywhere; MLflow's variables are as they were afterwards."""
    with clean_environment():
        yield run


def cells(out: str, name: str) -> list[str]:
    """The row of the table that begins with a name."""
    [line] = [line for line in out.splitlines() if line.replace("└", " ").split("│")[0].strip() == name]
    return [cell.strip() for cell in line.split("│")]


@pytest.mark.slow
def test_a_run_is_recorded_whole_under_its_stable_names(recorded: Recorded) -> None:
    """Slow, as every first test here: a real MLflow server starts, and four small runs are trained and evaluated."""
    import mlflow.data

    run_id, gamma = recorded.trials[0], GAMMAS[0]
    run, summary = recorded.client.get_run(run_id), recorded.summaries[run_id]
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"gamma-{gamma:g}")
    assert (
        run.data.tags.items()
        >= {
            "mlflow.parentRunId": recorded.parent,
            "dataset": "digits",
            "backbone": "convnet",
            "defense": "eat",
            "cluster": "local",
            "run_folder": str(recorded.folder / f"gamma-{gamma:g}"),
        }.items()
    )
    assert re.fullmatch("[0-9a-f]{40}", run.data.tags["git.commit"])
    assert run.data.params["defense.transfer_strength"] == str(gamma)

    # Iterations and epochs are apart: an x axis means one thing.
    history = recorded.client.get_metric_history(run_id, "ensemble/clean_loss")
    assert [entry.step for entry in history] == list(range(1, ITERATIONS + 1))
    means = recorded.client.get_metric_history(run_id, "epoch/clean_loss")
    assert [entry.step for entry in means] == list(range(1, EPOCHS + 1))
    per_epoch = np.array([entry.value for entry in history]).reshape(EPOCHS, -1).mean(axis=1)
    np.testing.assert_allclose([entry.value for entry in means], per_epoch, rtol=1e-5)
    assert {f"epoch/member_{rank}/adversarial_loss" for rank in range(3)} <= set(run.data.metrics)

    assert run.data.tags.items() >= {"evaluation.epsilon": "0.2", "evaluation.protocol": "quick"}.items()
    metrics = run.data.metrics
    assert metrics["clean/nmi"] == summary["clean"]["nmi"]
    by_objective = [figures["r_at_1"] for figures in summary["attacked"].values()]
    assert len(set(by_objective)) > 1
    assert metrics["attacked/pgd2/r_at_1"] == min(by_objective)
    assert metrics["attacked/pgd2/nearest_negative/r_at_1"] == summary["attacked"]["pgd2/nearest_negative"]["r_at_1"]
    assert metrics["worst/r_at_1"] <= metrics["attacked/pgd2/r_at_1"]

    sums = json.loads((recorded.folder / f"gamma-{gamma:g}" / "run.json").read_text())["data"]
    inputs = {
        {tag.key: tag.value for tag in entry.tags}["mlflow.data.context"]: entry for entry in run.inputs.dataset_inputs
    }
    assert set(inputs) == {"training", "testing"}
    for context, name, classes in (("training", "train", 5), ("testing", "test", 5)):
        entry = inputs[context]
        tags = {tag.key: tag.value for tag in entry.tags}
        assert (entry.dataset.name, entry.dataset.digest, tags["sha256"]) == ("digits", sums[name][:36], sums[name])
        assert tags["classes"] == str(classes)
        profile = json.loads(entry.dataset.profile)
        assert profile["num_rows"] == int(tags["images"]) > 800
        assert mlflow.data.get_source(entry.dataset).to_dict()["tags"]["dataset"] == "digits"
    artifacts = [file.path for file in recorded.client.list_artifacts(run_id)]
    assert set(artifacts) == {"config.yaml", "summary.json", "figures"}  # and no image


@pytest.mark.slow
def test_children_are_beneath_their_parent_and_a_dead_one_is_ended_by_the_driver(
    recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    def status(run_id: str) -> str:
        return str(recorded.client.get_run(run_id).info.status)

    children = recorded.client.search_runs([recorded.experiment], f"tags.`mlflow.parentRunId` = '{recorded.parent}'")
    assert {child.info.run_id for child in children} == {*recorded.trials, recorded.dead}
    assert recorded.parent not in {child.info.run_id for child in children}
    assert status(recorded.dead) == "RUNNING"
    assert end_run(recorded.server.uri, recorded.dead, "KILLED")
    assert status(recorded.dead) == "KILLED"
    assert end_run(recorded.server.uri, recorded.dead, "FAILED")  # it has ended: nothing changes
    assert end_run(recorded.server.uri, recorded.trials[0], "FAILED")
    assert (status(recorded.dead), status(recorded.trials[0])) == ("KILLED", "FINISHED")
    assert warnings_of(caplog) == []

    assert not end_run(recorded.server.uri, "0" * 32, "FAILED")
    assert not end_run(f"http://127.0.0.1:{free_port()}", recorded.dead, "FAILED")
    assert not end_run("sqlite:////no/such/folder/a.db", recorded.dead, "FAILED")
    assert not end_run("no-such-scheme://a", recorded.dead, "FAILED")
    assert not end_run(None, None, "FAILED")
    assert len(warnings_of(caplog)) == 4  # of a run that never was, nothing need be said


@pytest.mark.slow
def test_the_registered_version_loads_and_says_where_it_is_from(
    recorded: Recorded, run: Callable[..., tuple[int, str, str]]
) -> None:
    import mlflow

    version = recorded.client.get_model_version("digits-natural", "1")
    summary = recorded.summaries[recorded.alone]
    assert (version.run_id, version.status) == (recorded.alone, "READY")
    assert (
        version.tags.items()
        >= {
            "dataset": "digits",
            "defense": "natural",
            "clean/r_at_1": f"{summary['clean']['r_at_1']:.4f}",
            "worst/nmi": f"{summary['worst']['nmi']:.4f}",
            "weights_sha256": summary["weights_sha256"],
        }.items()
    )
    assert "attacked/pgd2/r_at_1" in version.tags
    assert "attacked/pgd2/nearest_negative/r_at_1" not in version.tags

    mlflow.set_tracking_uri(recorded.server.uri)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_ensemble(recorded.folder / "natural" / "model")(images)
    embedded = mlflow.pyfunc.load_model("models:/digits-natural/1").predict(images.numpy())
    np.testing.assert_allclose(embedded, expected.numpy(), atol=1e-6)

    # Again, from the folder or by the run's id: the same weights of one run are one version. Another run is the next.
    uri = ("--tracking-uri", recorded.server.uri)
    for again in (str(recorded.folder / "natural"), recorded.alone):
        code, out, error = run("register", again, "digits-natural", *uri)
        assert code == 0, error
        assert "registered   models:/digits-natural/1\n" in out
    assert "models:/digits-natural/2" in run("register", recorded.trials[0], "digits-natural", *uri)[1]
    assert recorded.client.get_model_version("digits-natural", "2").tags["defense"] == "eat"
    assert len(recorded.client.search_model_versions("name = 'digits-natural'")) == 2


@pytest.mark.slow
def test_a_run_that_mlflow_never_got_is_sent_when_it_is_registered(
    recorded: Recorded, run: Callable[..., tuple[int, str, str]]
) -> None:
    settings = config_for(recorded.server.uri, "tracking.enabled=false", "train.epochs=1")
    start_run(settings, run_dir="untracked", overwrite=False, console=Console())

    for _ in range(2):
        code, out, error = run("register", "untracked", "digits-late")
        assert code == 0, error
        assert "registered   models:/digits-late/1\n" in out

    run_id = recorded.client.get_model_version("digits-late", "1").run_id
    sent = recorded.client.get_run(run_id)
    assert json.loads(Path("untracked/summary.json").read_text())["mlflow_run_id"] == run_id
    assert (sent.info.status, sent.data.params["train.epochs"]) == ("FINISHED", "1")
    assert "worst/r_at_1" in sent.data.metrics
    recorded.client.delete_run(run_id)


@pytest.mark.slow
def test_compare_shows_the_best_first_with_trials_beneath_and_writes_the_report(
    recorded: Recorded, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorded.server.uri)
    end_run(recorded.server.uri, recorded.dead, "KILLED")

    code, out, error = run("compare", "gamma and epsilon", "--sort", "clean/nmi", "-o", "page.html")

    assert code == 0, error
    header = next(line for line in out.splitlines() if "status" in line)
    columns = [column.strip() for column in header.split("┃")]
    assert columns[:8] == ["run", "status", "dataset", "defense", "rule", "M", "seed", "clean/nmi %"]
    # The trials differ in γ alone, which the sweep itself and the natural run do not use but have, too.
    assert columns[-1] == "defense.transfer_strength"
    figures = {run_id: summary["clean"]["nmi"] for run_id, summary in recorded.summaries.items()}
    names = {run_id: f"gamma-{gamma:g}" for run_id, gamma in zip(recorded.trials, GAMMAS, strict=True)}
    names[recorded.alone] = "natural"
    best = max(figures, key=lambda run_id: figures[run_id])
    for run_id, name in names.items():
        star = " *" if run_id == best else ""
        assert cells(out, name)[7] == f"{100 * figures[run_id]:.1f}{star}"
    first, second = sorted(recorded.trials, key=lambda run_id: -figures[run_id])
    lines = [line.split("│")[0].rstrip().lstrip(" ") for line in out.splitlines()]
    beneath = ["sweep", f"└ {names[first]}", f"└ {names[second]}", "└ pruned"]
    assert lines[lines.index("sweep") :][: len(beneath)] == beneath
    assert cells(out, "pruned")[1] == "KILLED"
    assert "not in the report: sweep, pruned (it has no run folder)" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(name in page for name in names.values())

    # One trial, by its id: nothing is beneath. One parent, by its id: its trials come with it.
    assert "gamma-2" not in run("compare", recorded.trials[0])[1]
    assert "└ gamma-2" in run("compare", recorded.parent)[1]
    newest = run("compare", recorded.experiment, "--last", "1")[1]
    assert "natural" in newest
    assert "gamma" not in newest


@pytest.mark.slow
def test_paging_brings_every_run_once(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    from eat_dist.tracking import reading

    whole = reading.find_runs(["gamma and epsilon"], tracking_uri=recorded.server.uri)
    monkeypatch.setattr(reading, "PAGE", 2)
    paged = reading.find_runs(["gamma and epsilon"], tracking_uri=recorded.server.uri)
    assert [entry.run_id for entry in paged] == [entry.run_id for entry in whole]
    assert len(whole) == len({entry.run_id for entry in whole}) == 5
    last = reading.find_runs(["gamma and epsilon"], tracking_uri=recorded.server.uri, last=2)
    assert [entry.run_id for entry in last] == [entry.run_id for entry in whole]  # the sweep is the second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gamma and epsilon", "--sort", "attacked/pgd2/r_at_one"], "the nearest: attacked/pgd2/r_at_"),
        (["gama and epsilon"], "Did you mean 'gamma and epsilon'?"),
        (["0" * 32], "has no run 000"),
        (["gamma and epsilon", "--last", "0"], "--last must be at least 1; got 0"),
        (["gamma and epsilon", "-o", "page.pdf"], "to end in .html"),
        (["gamma and epsilon", "--tracking-uri", "sqlite:///nothing.db"], "there is no MLflow store at"),
    ],
)
def test_what_compare_cannot_do_is_one_line(
    recorded: Recorded,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorded.server.uri)
    code, out, error = run("compare", *arguments)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert expected in error
    assert not list(Path.cwd().iterdir())


class Interfering(Console):
    """Does something to the server at an iteration, as a night does."""

    def __init__(self, at: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self.at = at

    @contextlib.contextmanager
    def training(self, schedule: Any) -> Iterator[Callable[[EnsembleStatistics], None]]:
        def show(ensemble: EnsembleStatistics) -> None:
            self.at.get(ensemble.iteration, lambda: None)()

        yield show


@pytest.mark.slow
@pytest.mark.parametrize("returns", [False, True])
def test_a_server_killed_in_mid_run_costs_one_warning_and_nothing_if_it_returns(
    returns: bool,
    recorded: Recorded,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Slow: the server is killed by SIGKILL, and started again in mid-run or after it."""
    mortal = recorded.server
    events = {8: mortal.kill} | ({16: mortal.start} if returns else {})
    monkeypatch.setattr("eat_dist.console.Console", lambda: Interfering(events))
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.2)
    settings = config_for(mortal.uri, f"tracking.experiment=outage {returns}")
    Path("run.yaml").write_text(json.dumps(settings.model_dump(mode="json")), encoding="utf-8")

    code, out, error = run("train", "--config", "run.yaml", "--run-dir", "out")

    assert code == 0, error
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["clean"]["r_at_1"] > 0.2
    [warning] = warnings_of(caplog)
    assert "does not answer" in warning
    assert "all metrics are in the run folder" in warning
    assert ("records did not arrive there" in out) is not returns
    if not returns:
        mortal.start()  # too late
    tracked = client(mortal.uri).get_run(summary["mlflow_run_id"])
    steps = [entry.step for entry in client(mortal.uri).get_metric_history(tracked.info.run_id, "ensemble/clean_loss")]
    if returns:
        assert tracked.info.status == "FINISHED"
        assert steps == list(range(1, ITERATIONS + 1))
        assert tracked.data.metrics["clean/r_at_1"] == pytest.approx(summary["clean"]["r_at_1"])
        assert [model.status for model in client(mortal.uri).search_logged_models([tracked.info.experiment_id])] == [
            "READY"
        ]
    else:
        # Nobody told MLflow: the table says since when. Resumed, the run gets its figures and its end.
        assert tracked.info.status == "RUNNING"
        assert len(steps) < 10
        assert "RUNNING, last news" in run("compare", tracked.info.run_id, "--tracking-uri", mortal.uri)[1]
        assert run("train", "--resume", "out")[0] == 0
        tracked = client(mortal.uri).get_run(tracked.info.run_id)
        assert tracked.info.status == "FINISHED"
        assert tracked.data.metrics["clean/r_at_1"] == pytest.approx(summary["clean"]["r_at_1"])


def has_token(request: BaseHTTPRequestHandler) -> tuple[int, str, bytes] | None:
    return None if request.headers["Authorization"] == "Bearer let-me-in" else (401, "text/plain", b"")


@pytest.mark.slow
def test_a_token_from_the_environment_opens_a_guarded_server(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "let-me-in")
    with stand_in(has_token, behind=recorded.server.port) as uri:
        assert end_run(uri, recorded.trials[0], "FAILED")
        assert warnings_of(caplog) == []
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong")
        assert not end_run(uri, recorded.trials[0], "FAILED")
    [warning] = warnings_of(caplog)
    assert "refuses access" in warning
    assert "wrong" not in warning


@pytest.mark.slow
def test_a_server_that_does_not_know_its_own_name_is_told_how_to_be_started(
    recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    """127.0.0.2 stands for a server's public name, which MLflow refuses by itself."""
    with stand_in(lambda _: None, behind=recorded.server.port, host="127.0.0.2") as uri:
        assert not end_run(uri, recorded.trials[0], "FAILED")
    [warning] = warnings_of(caplog)
    host = uri.removeprefix("http://")
    assert f"start it with --allowed-hosts {host}" in warning


def from_before_models(request: BaseHTTPRequestHandler) -> tuple[int, str, bytes] | None:
    """What an MLflow 2 lacks, and its version; the rest is answered by the real server behind."""
    if "logged-models" in request.path:
        return 404, "text/html", b"Not Found"
    return (200, "text/plain", b"2.9.2") if request.path == "/version" else None


@pytest.mark.slow
def test_an_older_server_gets_the_figures_and_the_warning_names_both_versions(
    recorded: Recorded, run: Callable[..., tuple[int, str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stand_in(from_before_models, behind=recorded.server.port) as uri:
        finished = start_run(
            config_for(uri, "tracking.experiment=old", "train.epochs=1"),
            run_dir=str(tmp_path / "out"),
            overwrite=False,
            console=Console(),
        )
    [warning] = warnings_of(caplog)
    assert "did not take the model" in warning
    assert re.search(r"the server is MLflow 2\.9\.2, this is 3\.\d+", warning)
    assert finished.mlflow_missing == 1
    tracked = recorded.client.get_run(finished.mlflow_run_id)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["clean/nmi"] == finished.summary["clean"]["nmi"]


@pytest.mark.slow
def test_a_store_that_refuses_to_register_costs_one_warning(
    recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(request: BaseHTTPRequestHandler) -> tuple[int, str, bytes] | None:
        denied = b'{"error_code": "PERMISSION_DENIED", "message": "no new models here"}'
        return (403, "application/json", denied) if "registered-models" in request.path else None

    with stand_in(refuses, behind=recorded.server.port) as uri:
        finished = start_run(
            config_for(uri, "tracking.experiment=refused", "train.epochs=1", "tracking.register_as=digits"),
            run_dir=str(tmp_path / "out"),
            overwrite=False,
            console=Console(),
        )
    [warning] = warnings_of(caplog)
    assert "did not take the registration as 'digits' (PERMISSION_DENIED: no new models here)" in warning
    assert finished.registered is None
    assert (tmp_path / "out" / "summary.json").is_file()
    assert recorded.client.get_run(finished.mlflow_run_id).info.status == "FINISHED"


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_mlflows_own_page_shows_trials_nested_beneath_the_sweep_with_their_charts(
    recorded: Recorded, tmp_path: Path
) -> None:
    """Slow: a browser loads MLflow's application. The figures drawn are read from the chart itself."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    trials = [f"gamma-{gamma:g}" for gamma in GAMMAS]
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=quiet)
        page = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
        page.set_default_timeout(120_000)

        page.goto(f"{recorded.server.uri}/#/experiments/{recorded.experiment}/runs?compareRunsMode=CHART")
        for name in ("sweep", "natural"):
            page.get_by_role("link", name=name, exact=True).wait_for()
        assert [page.get_by_role("link", name=trial, exact=True).count() for trial in trials] == [0, 0]

        # The sign before a parent's name has no name of its own.
        page.locator("[data-component-id*=runnamecellrenderer]").first.click()
        for name in (*trials, "pruned"):
            page.get_by_role("link", name=name, exact=True).wait_for()

        # One chart of what was logged by epoch: a line for each run, over epochs.
        page.get_by_placeholder("Search metric charts").fill("^epoch/clean_loss$")
        drawn = "gd => gd.data && gd.data.filter(line => line.x && line.x.length > 1).length >= 3"
        page.wait_for_function(f"() => [...document.querySelectorAll('.js-plotly-plot')].some({drawn})")
        lines = page.evaluate(
            "() => [...document.querySelectorAll('.js-plotly-plot')]"
            ".flatMap(gd => gd.data.map(line => [line.name, [...(line.x || [])], [...(line.y || [])]]))"
        )
        page.screenshot(path=str(tmp_path / "runs.png"), timeout=120_000)  # to be looked at

        page.goto(f"{recorded.server.uri}/#/models/digits-natural/versions/1")
        page.get_by_text("attacked/pgd2/r_at_1").first.wait_for()
        browser.close()

    by_name = {str(name): (steps, values) for name, steps, values in lines if len(steps) > 1}
    for run_id, name in zip((*recorded.trials, recorded.alone), (*trials, "natural"), strict=True):
        [(steps, values)] = [line for label, line in by_name.items() if name in label]
        history = recorded.client.get_metric_history(run_id, "epoch/clean_loss")
        assert steps == [entry.step for entry in history] == list(range(1, EPOCHS + 1))
        assert values == pytest.approx([entry.value for entry in history])
