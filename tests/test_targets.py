"""What can be evaluated: run folders, MLflow models from a real store, files of weights, anybody's module."""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eat_dist.config import ModelConfig, RunConfig, dump_config, parse_config
from eat_dist.data.images import LabelledImages
from eat_dist.errors import ConfigError, EatError, StorageError
from eat_dist.evaluation.model_check import check_model
from eat_dist.models.ensemble import EmbeddingEnsemble, EnsembleSpec, save_ensemble
from eat_dist.runs.target import Target, names_run, open_target
from eat_dist.tracking import Tracker
from eat_dist.tracking.store import ENVIRONMENT

MODEL = ModelConfig(widths=(4, 8), embedding_dim=6)
CONFIG = parse_config({"model": {"widths": [4, 8], "embedding_dim": 6}, "seed": 7})
WriteModule = Callable[[str], str]


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, not on the module path, and no MLflow variables; all is restored after."""
    for name in [*os.environ, *ENVIRONMENT, "MLFLOW_TRACKING_URI", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"]:
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, "")  # remembers the value, absent or not, and restores it
            monkeypatch.delenv(name)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture
def write_module(working_folder: Path) -> WriteModule:
    """Write a module of the user's into the working folder; its name."""
    numbers = itertools.count()

    def write(text: str) -> str:
        name = f"my_model_{next(numbers)}"
        (working_folder / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{text}\n", encoding="utf-8")
        return name

    return write


def opened(
    text: str | Path, *, config: RunConfig | None = None, normalise: bool = False, tracking_uri: str | None = None
) -> Target:
    return open_target(str(text), config=config, normalise=normalise, tracking_uri=tracking_uri)


def fault(text: str | Path, expected: type[EatError] = ConfigError, **options: Any) -> str:
    with pytest.raises(EatError) as error:
        opened(text, **options)
    assert type(error.value) is expected
    message = str(error.value)
    assert "\n" not in message
    return message


def ensemble_in(folder: Path, *, members: int = 3, channels: int = 1, inverted: bool = False) -> EmbeddingEnsemble:
    torch.manual_seed(0)
    spec = EnsembleSpec(MODEL, (channels, 8, 8), members=members, inverted=inverted)
    ensemble = spec.build().eval()
    save_ensemble(folder, ensemble, spec=spec)
    return ensemble


def some_images(channels: int = 1) -> torch.Tensor:
    return torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def embedded(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        output: torch.Tensor = model(images)
    return output


# Run folders


def test_a_run_folder_opens_with_its_config_and_its_ensemble(working_folder: Path) -> None:
    ensemble = ensemble_in(working_folder / "run" / "model", inverted=True)
    (working_folder / "run" / "config.yaml").write_text(dump_config(CONFIG), encoding="utf-8")
    for text in ("run", "run/", (working_folder / "run").as_uri()):
        target = opened(text)
        assert (target.kind, target.name, target.config) == ("run", text, CONFIG)
        assert target.folder is not None
        assert target.folder.path == str(working_folder / "run")
        assert (target.image_shape, target.inverted) == ((1, 8, 8), True)
        assert torch.equal(embedded(target.model, some_images()), embedded(ensemble, some_images()))


@pytest.mark.parametrize("name", ["weights.safetensors", "runs:", "module:function"])
def test_a_folder_that_exists_is_a_run_whatever_it_is_called(name: str, working_folder: Path) -> None:
    ensemble_in(working_folder / name / "model")
    (working_folder / name / "config.yaml").write_text(dump_config(CONFIG), encoding="utf-8")
    assert opened(name).kind == "run"


def test_a_folder_that_is_no_run_or_not_finished_is_named(working_folder: Path) -> None:
    (working_folder / "half").mkdir()
    assert "is not a run folder: it has no config.yaml" in fault("half", StorageError)
    (working_folder / "half" / "config.yaml").write_text(dump_config(CONFIG), encoding="utf-8")
    message = fault("half", StorageError)
    assert "no model/ensemble.json" in message
    assert "--resume" in message


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("s3://bucket/runs/a", True),
        ("s3://bucket/member_0.safetensors", False),
        ("models://profile@databricks/name/1", False),
        ("runs:/0/ensemble", False),
        ("runs/none", False),
        ("module:function", False),
    ],
)
def test_a_url_is_a_run_unless_it_is_mlflows_or_weights(text: str, run: bool) -> None:
    assert names_run(text) is run


@pytest.mark.parametrize("text", ["foo", "runs/none", "a-b:c", "a:b:c", "module:", ":function", "", "net.onnx"])
def test_what_fits_no_form_is_told_all_four(text: str) -> None:
    assert fault(text) == f"'{text}' is no run folder, MLflow model URI, .safetensors file or module:function."


def test_pickled_weights_are_pointed_to_a_function(working_folder: Path) -> None:
    (working_folder / "net.pth").write_bytes(b"")
    assert "Pickled weights are not read" in fault("net.pth")


# Files of weights


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_with_their_config_are_an_ensemble_of_one(channels: int, working_folder: Path) -> None:
    ensemble = ensemble_in(working_folder, channels=channels)
    target = opened("member_1.safetensors", config=CONFIG)
    assert (target.kind, target.folder, target.config, target.image_shape) == ("weights", None, None, None)
    assert isinstance(target.model, EmbeddingEnsemble)
    images = some_images(channels)
    assert torch.equal(embedded(target.model, images), embedded(ensemble.members[1], images))
    assert not torch.equal(embedded(target.model, images), embedded(ensemble.members[0], images))


def test_a_mean_for_three_channels_does_not_keep_colour_weights_out(working_folder: Path) -> None:
    ensemble_in(working_folder, channels=3)
    values = {"widths": [4, 8], "embedding_dim": 6, "mean": [0.4, 0.5, 0.6]}
    target = opened("member_0.safetensors", config=parse_config({"model": values}))
    assert embedded(target.model, some_images(3)).shape == (5, 6)


def test_weights_without_a_config_of_another_network_or_damaged_are_one_line(working_folder: Path) -> None:
    """[4, 8] has two blocks of a convolution (…0.weight) and a BatchNorm (…1.*); a third would be 6 and 7."""
    ensemble_in(working_folder)
    assert "--config" in fault("member_0.safetensors")
    deeper = parse_config({"model": {"widths": [4, 8, 8], "embedding_dim": 6}})
    message = fault("member_0.safetensors", StorageError, config=deeper)
    assert "does not fit model.backbone 'convnet'" in message
    assert "6 missing (backbone.blocks.6.weight, backbone.blocks.7.weight, backbone.blocks.7.bias, …)" in message
    shallower = parse_config({"model": {"widths": [4], "embedding_dim": 6}})
    message = fault("member_0.safetensors", StorageError, config=shallower)
    assert "6 unexpected (" in message
    assert "head.weight [6, 8] instead of [6, 4]" in message
    assert "'resnet99'" in fault("member_0.safetensors", StorageError, config=_with_backbone("resnet99"))
    (working_folder / "bad.safetensors").write_bytes(b"no weights")
    assert "is damaged or no .safetensors file" in fault("bad.safetensors", StorageError, config=CONFIG)
    assert "No such file" in fault("gone.safetensors", StorageError, config=CONFIG)


def _with_backbone(name: str) -> RunConfig:
    return parse_config({"model": {"backbone": name}})


# Anybody's module


def test_a_torchvision_network_opens_and_passes_the_check_only_normalised(write_module: WriteModule) -> None:
    """A ResNet-18 puts out logits, whose lengths are far from 1."""
    name = write_module(
        "from torchvision.models import resnet18\n"
        "def build(seed=0):\n    torch.manual_seed(seed)\n    return resnet18(weights=None)"
    )
    images = LabelledImages((some_images(3) * 255).byte(), torch.tensor([0, 0, 0, 1, 1]), ("a", "b"), tuple("uvwxy"))
    raw = opened(f"{name}:build")
    assert (raw.kind, raw.folder, raw.config, raw.image_shape, raw.inverted) == ("module", None, None, None, False)
    with pytest.raises(ConfigError, match=r"must have length 1.* --normalise"):
        check_model(raw.model, images, batch_size=4, device="cpu")
    unit = opened(f"{name}:build", normalise=True)
    facts = check_model(unit.model, images, batch_size=4, device="cpu")
    assert (facts.dim, facts.randomised, facts.usable_gradients) == (1000, False, 1.0)
    expected = nn.functional.normalize(embedded(raw.model, some_images(3)), dim=1)
    torch.testing.assert_close(embedded(unit.model, some_images(3)), expected)


def test_a_class_a_package_and_a_training_mode_are_all_fine(working_folder: Path) -> None:
    package = working_folder / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "layers.py").write_text("from torch import nn\nLAYER = nn.Dropout()\n", encoding="utf-8")
    (package / "nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, *layers, **options):\n"
        "        from my_package.layers import LAYER\n"
        "        super().__init__(nn.Flatten(), LAYER)\n",
        encoding="utf-8",
    )
    images = some_images()
    assert torch.equal(embedded(opened("my_package.nets:Net").model, images), images.flatten(1))


@pytest.mark.parametrize(
    ("text", "function", "expected"),
    [
        ("build = 3", "build", "must be a function that returns the model; got an object of int"),
        ("build = nn.Linear(2, 2)", "build", "must be a function that returns the model; got an object of Linear"),
        ("def build(): pass", "biuld", "has no 'biuld'. Did you mean 'build'?"),
        ("def build(path, *, dim): pass", "build", "is called without arguments, but needs path, dim"),
        ("def build(): return {'a': 1}", "build", "() must return a torch.nn.Module; got dict"),
        ("def build(): pass", "build", "() must return a torch.nn.Module; got NoneType"),
        ("def build():\n    raise ValueError('no\\nweights')", "build", "build() raised ValueError: no weights ("),
        ("def build():\n    raise SystemExit(3)", "build", "build() raised SystemExit: 3 ("),
        ("import my_missing_library", "build", "raised ModuleNotFoundError: No module named 'my_missing_library' ("),
        ("1 / 0", "build", "raised ZeroDivisionError: division by zero ("),
        ("def", "build", "raised SyntaxError"),
    ],
)
def test_a_function_that_gives_no_model_is_one_line_that_says_what_came(
    text: str, function: str, expected: str, write_module: WriteModule
) -> None:
    name = write_module(text)
    assert expected in fault(f"{name}:{function}")


def test_a_fault_names_the_line_of_the_users_file(write_module: WriteModule, working_folder: Path) -> None:
    """Two lines of imports come first."""
    name = write_module("def build():\n    raise OSError")
    assert fault(f"{name}:build").endswith(f"raised OSError: no message ({working_folder / name}.py:4)")


def test_a_module_that_is_not_there_says_where_it_was_looked_for(working_folder: Path) -> None:
    assert fault("my_none.nets:build").startswith(
        f"there is no module 'my_none' in the working folder ({working_folder})"
    )


# MLflow


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
