"""What can be evaluated: a run, an ensemble in MLflow, a file of weights, or anybody's PyTorch model."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors.torch import load as load_safetensors
from torch import nn
from torch.nn import functional

from eat_dist.config import InferenceConfig, ModelConfig, RunConfig
from eat_dist.errors import ConfigError, StorageError
from eat_dist.models import Embedder, EmbeddingEnsemble
from eat_dist.models.ensemble import load_ensemble, load_spec
from eat_dist.runs.saved import config_of
from eat_dist.storage import Folder
from eat_dist.tracking.fetch import fetch_ensemble

_NAMED_AT_MOST = 3
_MLFLOW, _WEIGHTS = ("runs:/", "models:/"), ".safetensors"
_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Target:
    """A model to be evaluated, in evaluation mode.

    Attributes:
        kind: Which of the four forms it was given in.
        name: As it was given.
        model: Maps images in [0, 1] to embeddings: an :class:`EmbeddingEnsemble` on the CPU, or with ``module`` the
            user's network, where and in which number format its function left it.
        folder: The run folder (``run``).
        config: The run's saved config (``run``).
        image_shape: (C, H, W) that the model was built for (``run``, ``mlflow``); None: not known.
        inverted: Whether it expects black and white exchanged (ink 1, paper 0), as ``ensemble.json`` says.
        inference: The defense that ``model`` is behind.
    """

    kind: Literal["run", "mlflow", "weights", "module"]
    name: str
    model: nn.Module
    folder: Folder | None = None
    config: RunConfig | None = None
    image_shape: tuple[int, int, int] | None = None
    inverted: bool = False
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def open_target(text: str, *, config: RunConfig | None, normalise: bool, tracking_uri: str | None) -> Target:
    """Open what the user named.

    The first rule that fits decides: a folder that exists is a run; ``runs:/`` and ``models:/`` begin an MLflow URI;
    ``.safetensors`` ends a file of weights; any other URL is a run; ``a.b:c`` is a function of the user's, which is
    **run**, as any program of his. Nothing else of a target is executed or unpickled.

    Args:
        text: Path, URL, MLflow model URI, or ``module:function``.
        config: Its section ``model`` says what network a file of weights belongs to; not read for other forms.
        normalise: Scale a ``module``'s embeddings to length 1; those of the other forms have it.
        tracking_uri: MLflow's store; None: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder.

    Raises:
        ConfigError: No form fits, weights without a config, or a function that does not give a model.
        StorageError: A file, folder or MLflow model is missing, damaged, or does not fit.
    """
    if names_run(text):
        return _from_run(text)
    if text.startswith(_MLFLOW):
        return _from_mlflow(text, tracking_uri)
    if names_weights(text):
        return _from_weights(text, config)
    module, _, function = text.partition(":")
    if all(part.isidentifier() for part in (*module.split("."), function)):
        model = _from_function(module, function)
        return Target("module", text, Normalised(model).eval() if normalise else model)
    hint = " Pickled weights are not read: load them in a function of yours." if text.endswith(_PICKLED) else ""
    raise ConfigError(f"'{text}' is no run folder, MLflow model URI, .safetensors file or module:function.{hint}")


def names_run(text: str) -> bool:
    """Whether a target is taken for a run folder: one that exists, or a URL of neither MLflow nor weights."""
    if os.path.isdir(os.path.expanduser(text)):
        return True
    return "://" in text and not text.startswith(_MLFLOW) and not names_weights(text)


def names_weights(text: str) -> bool:
    """Whether a target is taken for a file of weights: by the ending of its path, a URL's query left out."""
    return (text.partition("?")[0] if "://" in text else text).endswith(_WEIGHTS)


class Normalised(nn.Module):
    """A model with its embeddings scaled to length 1.

    Args:
        model: Maps images to [B, D].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        """[B, C, H, W] → [B, D] of length 1; what is no float [B, D] is handed on, for the check of the model."""
        output = self.model(images)
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.ndim == 2:
            return functional.normalize(output, dim=1)
        return output


def _from_run(text: str) -> Target:
    folder = Folder.at(text)
    config = config_of(folder)
    if not folder.exists("model/ensemble.json"):
        raise StorageError(
            f"'{folder}' has no trained ensemble (no model/ensemble.json); finish it: "
            f"eat-dist train --resume {folder.argument}"
        )
    model = folder.child("model")
    spec = load_spec(model)
    return Target("run", text, load_ensemble(model), folder, config, spec.image_shape, spec.inverted, spec.inference)


def _from_mlflow(text: str, tracking_uri: str | None) -> Target:
    with tempfile.TemporaryDirectory() as destination:
        model = fetch_ensemble(text, destination, tracking_uri=tracking_uri)
        spec = load_spec(model)
        return Target(
            "mlflow",
            text,
            load_ensemble(model),
            image_shape=spec.image_shape,
            inverted=spec.inverted,
            inference=spec.inference,
        )


def _from_weights(text: str, config: RunConfig | None) -> Target:
    if config is None:
        raise ConfigError(f"'{text}' is weights alone; give the YAML with their section 'model' with --config")
    folder, file = Folder.of_file(text)
    content = folder.read(file)
    try:
        state = load_safetensors(content)
    except Exception as error:  # safetensors raises its own types for a damaged or foreign file
        raise StorageError(f"'{text}' is damaged or no .safetensors file: {_words(error)}") from error
    # Weights do not say for how many channels they are, except by the shape of a first convolution.
    misfits = {channels: _misfits(config.model, channels, state) for channels in (3, 1)}
    channels = next((channels for channels, faults in misfits.items() if not faults), None)
    if channels is None:
        raise StorageError(
            f"'{text}' does not fit model.backbone '{config.model.backbone}' of the config: "
            f"{min(misfits.values(), key=len)}. Give the config that it was trained with."
        )
    embedder = Embedder(config.model, channels)
    embedder.load_state_dict(state)
    return Target("weights", text, EmbeddingEnsemble([embedder]).eval())


def _misfits(config: ModelConfig, channels: int, state: Mapping[str, torch.Tensor]) -> str:
    """How a state differs from what an embedder of this form takes; empty if it does not."""
    try:
        with torch.device("meta"):  # shapes without numbers
            expected = Embedder(config, channels).state_dict()
    except ConfigError as error:  # a mean of three values, one channel
        return str(error)
    shapes = [
        f"{key} {list(value.shape)} instead of {list(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    faults = (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
        ("of another shape", shapes),
    )
    return "; ".join(f"{len(keys)} {what} ({_first(keys)})" for what, keys in faults if keys)


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NAMED_AT_MOST]) + (", …" if len(keys) > _NAMED_AT_MOST else "")


def _from_function(module: str, name: str) -> nn.Module:
    """The model that a function of the user's makes, in evaluation mode."""
    text = f"{module}:{name}"
    function = _function(_import(module), name)
    with _faults_as_one_line(f"{text}()"):
        model = function()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{text}() must return a torch.nn.Module; got {type(model).__name__}")
    model.eval()
    return model


def _import(module: str) -> ModuleType:
    # In front, and for good, as `python -m` has it: a model may import more of its own when it is called.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        with _faults_as_one_line(f"importing '{module}'"):
            return importlib.import_module(module)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}."):
            raise ConfigError(
                f"there is no module '{cause.name}' in the working folder ({os.getcwd()}) or among the installed ones"
            ) from error
        raise


def _function(module: ModuleType, name: str) -> Callable[[], object]:
    """The module's function of that name, which can be called without arguments."""
    where = f"'{module.__name__}' ({getattr(module, '__file__', None) or 'built in'})"
    if not hasattr(module, name):
        nearest = difflib.get_close_matches(name, dir(module), n=1)
        raise ConfigError(f"{where} has no '{name}'" + (f". Did you mean '{nearest[0]}'?" if nearest else ""))
    function = getattr(module, name)
    if not callable(function) or isinstance(function, nn.Module):
        raise ConfigError(
            f"'{name}' in {where} must be a function that returns the model; got an object of {type(function).__name__}"
        )
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except ValueError:  # some functions in C have no signature; calling them tells
        needed = []
    if needed:
        raise ConfigError(
            f"'{name}' in {where} is called without arguments, but needs {', '.join(needed)}. Give a function that "
            f"fills them in."
        )
    made: Callable[[], object] = function
    return made


@contextmanager
def _faults_as_one_line(what: str) -> Iterator[None]:
    """Around the user's own code, which may raise anything; ``sys.exit`` is no way to end an evaluation."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}"
        raise ConfigError(f"{what} raised {type(error).__name__}: {_words(error)} ({where})") from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
