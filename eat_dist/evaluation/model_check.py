"""Whether a model, images and numbers can be evaluated, found out in a second and not after an hour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from eat_dist.attacks import frozen
from eat_dist.config.base import Number
from eat_dist.data.images import ImageSet
from eat_dist.errors import ConfigError, DataError

_TRIED_BY_MODEL, _TRIED_VALUES = 8, 64
_LENGTH_TOLERANCE = 1e-3
_BATCH_TOLERANCE = 1e-3
# Between identical calls: far above what the order of additions on a GPU changes, far below any noise that defends.
_REPEAT_TOLERANCE = 1e-4

_NUMBER = TypeAdapter[float](Number)


@dataclass(frozen=True)
class ModelFacts:
    """What :func:`check_model` found out about a model that can be evaluated.

    Attributes:
        dim: D, numbers in an embedding.
        largest_difference: Of any number in the embeddings of the same images between two identical calls.
        usable_gradients: Share of the tried images, in [0, 1], at which the gradient of the embedding is finite and
            not zero.
    """

    dim: int
    largest_difference: float
    usable_gradients: float

    @property
    def randomised(self) -> bool:
        """Whether two identical calls differ by more than rounding (1e-4)."""
        return self.largest_difference > _REPEAT_TOLERANCE

    def warnings(self, *, eot_draws: int) -> tuple[str, ...]:
        """What makes an attack look weaker, and so the model more robust, than it is; one line each.

        Args:
            eot_draws: Passes averaged in every reading of the attacked objective (expectation over transformation).
        """
        found = []
        if self.randomised and eot_draws == 1:
            found.append(
                f"the model answers two identical calls differently (by up to {self.largest_difference:.2g}), so one "
                f"pass misleads an attack; average over its randomness with --eot-draws N (20 or more)"
            )
        if self.usable_gradients < 1:
            found.append(
                f"at {1 - self.usable_gradients:.0%} of the images tried the model's gradient is zero or not finite: "
                f"attacks by gradient fail there without any robustness. Wrap non-differentiable steps (rounding, "
                f"JPEG) with eat_dist.attacks.bpda, or trust black-box attacks only"
            )
        return tuple(found)


def check_model(model: nn.Module, images: ImageSet, *, batch_size: int, device: torch.device | str) -> ModelFacts:
    """Run a model on a few images, spread over the set, as the evaluation will.

    Three passes over at most 8 images and one over the first of them alone, in evaluation mode. The model's mode and
    flags are restored, torch's global generators are left as they were. Whether an embedding depends on the rest of
    its batch is not tried where the model is randomised: its own noise would hide it.

    Args:
        model: On ``device``, in the number format of the evaluation.
        images: What will be attacked.
        batch_size: Images of one pass of the evaluation.
        device: Where to compute.

    Raises:
        ConfigError: The model raises; its output is no float tensor [B, D] with D ≥ 2 on its device; it is not finite,
            not of length 1 (± 1e-3), without gradient to the images, or changes by more than 1e-3 with the batch.
    """
    device = torch.device(device)
    count = min(len(images), max(2, min(batch_size, _TRIED_BY_MODEL)))
    batch = images.batch(_spread(len(images), count), device).images
    with torch.random.fork_rng([device] if device.type == "cuda" else []), frozen(model):
        embeddings, usable = _embed_with_gradient(model, batch)
        again, alone = _embed(model, batch), _embed(model, batch[:1])
    facts = ModelFacts(embeddings.shape[1], float((again - embeddings).abs().max()), usable)
    change = float((alone - again[:1]).abs().max())
    if not facts.randomised and change > _BATCH_TOLERANCE:
        raise ConfigError(
            f"an image's embedding must not depend on the rest of its batch; alone and among {count} it differs by "
            f"{change:.2g}. Look for BatchNorm in training mode or another normalisation over the batch."
        )
    return facts


def check_images(images: ImageSet, *, model_shape: tuple[int, int, int] | None) -> None:
    """Check a test set that no dataset of ours has checked: at most 64 images, and all labels.

    Args:
        images: Queries and gallery together.
        model_shape: (C, H, W) that the model was built for; None: not known.

    Raises:
        DataError: Labels or classes that retrieval cannot use, images of another shape, or pixels that are not
            float32 in [0, 1].
    """
    _check_classes(images)
    if model_shape is not None and images.image_shape != model_shape:
        raise DataError(
            f"the model was built for images of {_sizes(model_shape)} (C×H×W); the test set has "
            f"{_sizes(images.image_shape)}. Set data.image_size, or choose another dataset."
        )
    chosen = _spread(len(images), min(len(images), _TRIED_VALUES))
    batch = images.batch(chosen, "cpu").images
    if batch.dtype != torch.float32 or batch.shape != (len(chosen), *images.image_shape):
        raise DataError(
            f"a batch of {len(chosen)} images must be float32 {[len(chosen), *images.image_shape]}; got "
            f"{_form(batch)}. Mend the image set's batch()."
        )
    outside = ~((batch >= 0) & (batch <= 1)).flatten(1).all(dim=1)  # NaN compares false
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        pixels = batch[first]
        got = "NaN" if bool(pixels.isnan().any()) else f"{float(pixels.min()):.4g} to {float(pixels.max()):.4g}"
        raise DataError(
            f"pixels must be in [0, 1]; image {int(chosen[first])} has {got}. Divide 8-bit values by 255, and move "
            f"normalisation by mean and standard deviation into the model."
        )


def check_epsilons(values: Sequence[float], norm: Literal["linf", "l2", "l0"]) -> tuple[float, ...]:
    """Check the radii of a robustness curve: finite, at least 0, strictly increasing; at most 1 in L∞ and L0.

    Args:
        values: Pixel units, images in [0, 1]; in L0 the share of the pixels that may change.
        norm: Of the ball.

    Raises:
        ConfigError: They are not.
    """
    for value in values:
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"epsilon must be finite and at least 0; got {value:g}")
        if norm == "linf" and value > 1:
            raise ConfigError(
                f"epsilon is in units of images in [0, 1], so at most 1 in L∞; got {value:g}. "
                f"Did you mean {value:g}/255?"
            )
        if norm == "l0" and value > 1:
            raise ConfigError(f"epsilon in l0 is the share of pixels that may change, at most 1; got {value:g}")
    return _increasing(values, "epsilons")


def parse_numbers(text: str, *, what: str) -> tuple[float, ...]:
    """Read ``"0,2/255,4/255"``; each number as the configuration reads it (``8/255``, ``1e-3``).

    Args:
        text: At least one number, separated by commas.
        what: What they are, for the message (``"--epsilons"``).

    Raises:
        ConfigError: One of them is no finite number.
    """
    numbers = []
    for item in text.split(","):
        try:
            numbers.append(_NUMBER.validate_python(item.strip()))
        except ValidationError as error:
            raise ConfigError(
                f"{what} takes numbers separated by commas, e.g. 0,2/255,4/255; got '{item.strip()}' in '{text}'"
            ) from error
    return tuple(numbers)


def _embed(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Checked embeddings [B, D] float32, detached."""
    with torch.no_grad(), _faults_as_one_line(batch):
        output = model(batch)
    return _checked(output, batch).float()


def _embed_with_gradient(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Checked embeddings [B, D] float32, detached, and the share of the images with a usable gradient."""
    images = batch.clone().requires_grad_(True)
    with torch.enable_grad(), _faults_as_one_line(batch):
        output = model(images)
    embeddings, gradient = _checked(output, batch), None
    if embeddings.requires_grad:
        # Any direction but the embedding's own, along which a length of 1 does not change.
        direction = torch.linspace(-1, 1, embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
        with torch.enable_grad(), _faults_as_one_line(batch):
            (gradient,) = torch.autograd.grad((embeddings @ direction).sum(), images, allow_unused=True)
    if gradient is None:
        raise ConfigError(
            "the attacks need gradients, but the model's output is detached from the images. Take torch.no_grad(), "
            ".detach() and NumPy out of its forward pass, or wrap non-differentiable steps with eat_dist.attacks.bpda."
        )
    rows = gradient.flatten(1)
    usable = rows.isfinite().all(dim=1) & rows.ne(0).any(dim=1)
    return embeddings.detach().float(), float(usable.float().mean())


@contextmanager
def _faults_as_one_line(images: torch.Tensor) -> Iterator[None]:
    """Around a stranger's code, which may raise anything, at many lines' length."""
    try:
        yield
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "no message")
        raise ConfigError(
            f"the model raised {type(error).__name__}: {first} (its input: float32 {list(images.shape)} on "
            f"{images.device}, values in [0, 1])"
        ) from error


def _checked(output: object, images: torch.Tensor) -> torch.Tensor:
    """The output as embeddings [B, D] of length 1."""
    if not isinstance(output, torch.Tensor):
        raise ConfigError(
            f"the model must return a tensor of embeddings [B, D]; got {type(output).__name__}. Wrap it in a module "
            f"that returns the embeddings alone."
        )
    count = len(images)
    if output.ndim != 2 or len(output) != count or output.shape[1] < 2 or not output.is_floating_point():
        raise ConfigError(
            f"the model must map {count} images to float embeddings [{count}, D], D at least 2; got {_form(output)}"
        )
    if output.device != images.device:
        raise ConfigError(f"the model's embeddings must stay on {images.device}; got them on {output.device}")
    if not bool(output.isfinite().all()):
        bad = int((~output.isfinite()).any(dim=1).sum())
        raise ConfigError(f"the model's embeddings must be finite; NaN or infinity for {bad} of {count} images")
    lengths = output.detach().float().norm(dim=1)
    if float(lengths.min()) == 0:
        raise ConfigError("the model's embeddings must have a direction; got one of length 0")
    if float((lengths - 1).abs().max()) > _LENGTH_TOLERANCE:
        raise ConfigError(
            f"embeddings must have length 1; the model's have lengths from {float(lengths.min()):.4g} to "
            f"{float(lengths.max()):.4g}. Give --normalise to scale them."
        )
    return output


def _check_classes(images: ImageSet) -> None:
    """What retrieval needs, in the words of :func:`eat_dist.data.images.check`."""
    labels = images.labels
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        raise DataError(f"labels must be int64 [{len(images)}], one an image; got {_form(labels)}")
    if images.num_classes < 2:
        raise DataError(
            f"the test set needs at least two classes; it has {images.num_classes}. Add images of another class."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < images.num_classes:
        raise DataError(
            f"labels must be in 0 … {images.num_classes - 1}, one for each of the {images.num_classes} class names; "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    counts = torch.bincount(labels, minlength=images.num_classes).tolist()
    for name, count in zip(images.class_names, counts, strict=True):
        if count < 2:
            raise DataError(
                f"test class '{name}' has {'one image' if count else 'no image'}; a class needs at least two to be "
                f"retrieved. Remove it or add images."
            )
    if images.is_query is not None:
        lost = set(labels[images.is_query].tolist()) - set(labels[~images.is_query].tolist())
        if lost or not bool(images.is_query.any()):
            what = f"class '{images.class_names[min(lost)]}' has queries only" if lost else "there is no query"
            raise DataError(f"every query needs a gallery image of its class; {what}. Complete the test set.")


def _spread(length: int, count: int) -> torch.Tensor:
    """``count`` different positions [count] int64 in 0 … length − 1, evenly: neighbours are often of one class."""
    return torch.arange(count) * length // count


def _increasing(values: Sequence[float], what: str) -> tuple[float, ...]:
    if not values or any(after <= before for before, after in pairwise(values)):
        shown = ", ".join(f"{value:g}" for value in values) or "none"
        raise ConfigError(f"{what} must be one or more, each above the one before; got {shown}")
    return tuple(values)


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _sizes(shape: tuple[int, int, int]) -> str:
    return "×".join(map(str, shape))
