"""What can be evaluated without a store: run folders, files of weights, anybody's module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from target_forms import alone_in, embedded, ensemble_in, fault, opened, some_images
from torch import nn

from eat_dist.config import RunConfig, dump_config, parse_config
from eat_dist.data.images import LabelledImages
from eat_dist.errors import ConfigError, StorageError
from eat_dist.evaluation.model_check import check_model
from eat_dist.models.ensemble import EmbeddingEnsemble
from eat_dist.runs.target import names_run

CONFIG = parse_config({"model": {"widths": [4, 8], "embedding_dim": 6}, "seed": 7})
WriteModule = Callable[[str], str]


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with alone_in(tmp_path / "work", monkeypatch) as folder:
        yield folder


@pytest.fixture
def write_module(working_folder: Path) -> WriteModule:
    """Write a module of the user's into the working folder; its name."""
    numbers = itertools.count()

    def write(text: str) -> str:
        name = f"my_model_{next(numbers)}"
        (working_folder / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{text}\n", encoding="utf-8")
        return name

    return write


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
