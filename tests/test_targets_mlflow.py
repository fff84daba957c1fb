"""MLflow models from a real store as targets: every form of URI, and what is refused, never unpickled."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from target_forms import alone_in, embedded, ensemble_in, fault, opened, some_images

from eat_dist.config import parse_config
from eat_dist.errors import StorageError
from eat_dist.models.ensemble import EmbeddingEnsemble
from eat_dist.tracking import Tracker
from eat_dist.tracking.store import ENVIRONMENT


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with alone_in(tmp_path / "work", monkeypatch) as folder:
        yield folder


@dataclass(frozen=True)
class Store:
    """A sqlite store with one run of ours, whose model is registered, and a model of another making."""

    uri: str
    run_id: str
    model_id: str
    foreign_id: str
    escaping_id: str
    ensemble: EmbeddingEnsemble
    trap: Path


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        for name in (*ENVIRONMENT, "MLFLOW_TRACKING_URI"):
            patch.setenv(name, "")
            patch.delenv(name)
        ensemble = ensemble_in(folder / "model", inverted=True)
        settings = parse_config({"tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}})
        tracker = Tracker.start(settings, run_name="a run", tags={}, resume_run_id=None, wait=60)
        tracker.log_ensemble(str(folder / "model"), input_shape=(1, 8, 8))
        assert tracker.close("FINISHED")
        assert tracker.uri is not None
        assert tracker.run_id is not None
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
        run = client.get_run(tracker.run_id)
        [output] = run.outputs.model_outputs
        client.create_registered_model("digits")
        # As mlflow.register_model does it, which reads MLflow's global URI, and as it did in MLflow 2.
        mlflow.set_tracking_uri(tracker.uri)
        client.create_model_version("digits", f"models:/{output.model_id}", model_id=output.model_id)
        mlflow.set_tracking_uri(None)
        client.create_model_version("digits", f"runs:/{tracker.run_id}/ensemble", run_id=tracker.run_id)
        client.set_registered_model_alias("digits", "best", "1")

        trap = folder / "sprung"
        foreign = folder / "foreign"
        foreign.mkdir()
        (foreign / "model.pkl").write_bytes(pickle.dumps(Trap(trap)))
        about = "flavors:\n  python_function:\n    loader_module: {}\n    data: {}\n  sklearn: {{}}\n"
        ids = []
        for loader, data in (("mlflow.sklearn", "model.pkl"), ("eat_dist.pyfunc_model", "../../elsewhere")):
            (foreign / "MLmodel").write_text(about.format(loader, data), encoding="utf-8")
            model = client.create_logged_model(run.info.experiment_id, name="foreign")
            client.log_model_artifacts(model.model_id, str(foreign))
            client.finalize_logged_model(model.model_id, "READY")
            ids.append(model.model_id)
        yield Store(tracker.uri, tracker.run_id, output.model_id, *ids, ensemble, trap)


@pytest.mark.parametrize(
    "form",
    ["runs:/{run_id}/ensemble", "models:/{model_id}", "models:/digits/1", "models:/digits/2", "models:/digits@best"],
)
def test_every_form_of_mlflow_uri_gives_the_logged_ensemble(form: str, store: Store, working_folder: Path) -> None:
    """The store's URI is passed on: nothing appears in the working folder, where MLflow's default store would be."""
    text = form.format(run_id=store.run_id, model_id=store.model_id)
    target = opened(text, tracking_uri=store.uri)
    assert (target.kind, target.name, target.folder, target.config) == ("mlflow", text, None, None)
    assert (target.image_shape, target.inverted) == ((1, 8, 8), True)
    assert isinstance(target.model, EmbeddingEnsemble)
    assert torch.equal(embedded(target.model, some_images()), embedded(store.ensemble, some_images()))
    assert list(working_folder.iterdir()) == []


def test_the_store_is_the_environments_where_none_is_given(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert opened(f"models:/{store.model_id}").kind == "mlflow"


def test_a_model_of_another_making_is_refused_and_never_unpickled(store: Store) -> None:
    message = fault(f"models:/{store.foreign_id}", StorageError, tracking_uri=store.uri)
    assert "flavour python_function and sklearn (loader mlflow.sklearn)" in message
    assert "module:function" in message
    assert not store.trap.exists()
    pickle.loads(pickle.dumps(Trap(store.trap)))  # the trap does work
    assert store.trap.exists()


def test_a_model_that_points_outside_of_itself_is_refused(store: Store) -> None:
    message = fault(f"models:/{store.escaping_id}", StorageError, tracking_uri=store.uri)
    assert "names files outside of the model ('../../elsewhere')" in message


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("runs:/{run_id}/other", "has no model 'other'; its models: 'ensemble'"),
        ("runs:/" + "0" * 32 + "/ensemble", "cannot fetch 'runs:/000"),
        ("models:/m-" + "0" * 32, "cannot fetch 'models:/m-000"),
        ("models:/digits/9", "cannot fetch 'models:/digits/9'"),
        ("models:/digits@worst", "alias worst"),
        ("models:/digits/Production", "expected runs:/RUN_ID/ensemble, models:/NAME/VERSION"),
        ("runs:/{run_id}", "expected runs:/RUN_ID/ensemble, models:/NAME/VERSION"),
        ("models:/", "expected runs:/RUN_ID/ensemble, models:/NAME/VERSION"),
    ],
)
def test_a_model_that_the_store_does_not_have_is_one_line(form: str, expected: str, store: Store) -> None:
    assert expected in fault(form.format(run_id=store.run_id), StorageError, tracking_uri=store.uri)


def test_a_store_that_is_not_there_is_one_line_in_seconds(working_folder: Path) -> None:
    message = fault("models:/digits/1", StorageError)
    assert f"there is no MLflow store at 'sqlite:///{working_folder}/mlflow.db'" in message
    assert list(working_folder.iterdir()) == []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{probe.getsockname()[1]}"
    began = time.monotonic()
    message = fault("models:/digits/1", StorageError, tracking_uri=uri)
    assert time.monotonic() - began < 20
    assert "cannot fetch 'models:/digits/1' from MLflow at http://***@127.0.0.1" in message
    assert "refused" in message
