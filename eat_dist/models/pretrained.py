"""Pretrained weights of a backbone: from the publisher, a file or a bucket; never unpickled, never half-loaded."""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load as load_safetensors

from eat_dist.config import ModelConfig
from eat_dist.errors import ConfigError, StorageError
from eat_dist.models.table import Backbone
from eat_dist.storage import Folder

State = Mapping[str, torch.Tensor]

_CLASSIFIERS = ("fc.", "classifier.", "last_linear.")  # of torchvision's networks and of the published BN-Inception
_WRAPPERS = ("state_dict", "model")
_NAMED_AT_MOST = 3


def load_backbone_weights(backbone: Backbone, config: ModelConfig) -> None:
    """Load ``config.weights`` into a backbone, in place; ``none`` leaves it as it is.

    The file holds a state dict, plain or under ``state_dict`` or ``model``, as ``.safetensors`` or by ``torch.save``. A
    prefix ``module.`` and the classifier are left out; BatchNorm parameters of shape [1, C] (from Caffe) become [C];
    BatchNorm's batch counter may be missing (before torch 0.4.1 there was none). Everything else must fit exactly, and
    be finite floating-point numbers.

    Raises:
        ConfigError: ``imagenet`` for a backbone without published weights.
        StorageError: The file cannot be had, cannot be read without unpickling objects, does not fit,
            or holds other numbers.
    """
    if config.weights == "none":
        return
    location = config.weights
    published = backbone.imagenet_url
    if location == "imagenet":
        if published is None:
            raise ConfigError(
                f"there are no ImageNet weights for backbone '{config.backbone}'; set model.weights to none or to the "
                f"path of a file"
            )
        location = published
    state = _read(location, published=location == published)
    backbone.load_state_dict(_fitted(state, backbone.state_dict(), location, config.backbone))


def _fitted(found: State, expected: State, location: str, name: str) -> dict[str, torch.Tensor]:
    """``found`` with the names and shapes of ``expected``, or the error that says what does not fit."""
    if twice := _counted("under both names", [key for key in found if f"module.{key}" in found]):
        raise StorageError(
            f"model.weights: '{location}' holds tensors with and without 'module.', {twice}. Save only those that are "
            f"meant."
        )
    found = {key.removeprefix("module."): value for key, value in found.items()}
    found = {key: value for key, value in found.items() if key in expected or not key.startswith(_CLASSIFIERS)}
    found |= {key: value for key, value in expected.items() if key.endswith("num_batches_tracked") and key not in found}
    for key, value in found.items():
        if key in expected and value.shape == (1, *expected[key].shape) and expected[key].ndim == 1:
            found[key] = value.squeeze(0)
    shapes = [
        f"{key} {list(value.shape)} instead of {list(expected[key].shape)}"
        for key, value in found.items()
        if key in expected and value.shape != expected[key].shape
    ]
    misfits = [
        _counted("missing", [key for key in expected if key not in found]),
        _counted("unexpected", [key for key in found if key not in expected]),
        _counted("of another shape", shapes),
    ]
    if any(misfits):
        raise StorageError(
            f"model.weights: '{location}' is of another architecture than backbone '{name}': "
            f"{'; '.join(filter(None, misfits))}. Choose the model.backbone that it was made with, or other weights."
        )
    numbers = {key: value for key, value in found.items() if expected[key].is_floating_point()}  # all but counters
    unusable = [
        # Integers are quantised weights, which mean nothing without their scale.
        _counted("not floating-point", [key for key, value in numbers.items() if not value.is_floating_point()]),
        # In the network's own precision: what is too large for it would be infinite there.
        _counted(
            "not finite", [key for key, value in numbers.items() if not value.to(expected[key].dtype).isfinite().all()]
        ),
    ]
    if any(unusable):
        raise StorageError(
            f"model.weights: '{location}' holds tensors that no network computes with: "
            f"{'; '.join(filter(None, unusable))}. Get it again, or choose other weights."
        )
    return found


def _counted(what: str, items: Sequence[str]) -> str:
    more = ", …" if len(items) > _NAMED_AT_MOST else ""
    return f"{len(items)} {what} ({', '.join(items[:_NAMED_AT_MOST])}{more})" if items else ""


def _read(location: str, *, published: bool) -> State:
    if location.startswith(("http://", "https://")):
        if "@" in urlsplit(location).netloc:
            raise StorageError("model.weights: a URL with credentials would be stored with the run; download the file")
        location = str(_download(location, published=published))
    try:
        folder, file = Folder.of_file(location)
        content = folder.read(file)
    except StorageError as error:
        raise StorageError(f"model.weights: {error}") from error
    try:
        state = _parse(content, safetensors=file.endswith(".safetensors"))
    except UnpicklingError as error:
        raise StorageError(
            f"model.weights: '{location}' holds pickled objects; they could run code, so they are not loaded. Save the "
            f"state dict alone, as .safetensors or by torch.save."
        ) from error
    except Exception as error:  # safetensors, torch and zipfile raise their own types for a damaged or foreign file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StorageError(
            f"model.weights: '{location}' is damaged or no file of weights ({reason}); .safetensors, .pth and .pt are "
            f"read. Get it again, or choose another."
        ) from error
    within = [key for key in _WRAPPERS if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)]
    if len(within) > 1:
        raise StorageError(
            f"model.weights: '{location}' holds one state dict under 'state_dict' and another under 'model'. Save only "
            f"the one that is meant."
        )
    if within:
        state = state[within[0]]
    if not (isinstance(state, Mapping) and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise StorageError(
            f"model.weights: '{location}' must hold a state dict (names with tensors), plain or under 'state_dict' or "
            f"'model'; got {type(state).__name__}"
        )
    return state


def _parse(content: bytes, *, safetensors: bool) -> Any:
    if safetensors:
        return load_safetensors(content)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _download(url: str, *, published: bool) -> Path:
    """The file in torch's cache folder, fetched on first use; its name's SHA-256 prefix, if any, is checked then.

    Published weights are found there under their own name, which nobody else's has. Of other URLs many end in
    ``model.safetensors``, so the file's name begins with a hash of the whole URL.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    name = posixpath.basename(urlsplit(url).path)
    file = cache / (name if published else f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}")
    if file.exists():
        return file
    digest = re.search(r"-([a-f0-9]{8,})\.", name)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), digest.group(1) if digest else None, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another SHA-256
        raise StorageError(
            f"cannot download {url} ({' '.join(str(error).split()) or type(error).__name__}). Download it elsewhere, "
            f"then set model.weights to the file's path or save it as {file}."
        ) from error
    return file
