"""What is found out about a model, images and numbers before an evaluation begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from eat_dist.batch import Batch
from eat_dist.config import EvaluationConfig, parse_config
from eat_dist.data.images import LabelledImages
from eat_dist.errors import ConfigError, DataError, EatError
from eat_dist.evaluation.model_check import (
    ModelFacts,
    check_epsilons,
    check_images,
    check_model,
    parse_numbers,
)

PIXELS = 3 * 4 * 4


def small_set(classes: int = 3, per_class: int = 4) -> LabelledImages:
    count = classes * per_class
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    images[0, 0, 0, :2] = torch.tensor([0, 255])  # the whole range in the first
    labels = torch.arange(classes).repeat_interleave(per_class)
    return LabelledImages(images, labels, tuple("abcdef"[:classes]), tuple(map(str, range(count))))


class Net(nn.Module):
    """A linear map to D = 5, its input and output changed by a test."""

    def __init__(
        self,
        before: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
        after: Callable[[torch.Tensor], Any] = lambda embeddings: functional.normalize(embeddings, dim=1),
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(PIXELS, 5)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(5, PIXELS, generator=torch.Generator().manual_seed(1)))
            self.head.bias.zero_()

    def forward(self, images: torch.Tensor) -> Any:
        return self.after(self.norm(self.head(self.before(images).flatten(1))))


def checked(model: nn.Module, images: LabelledImages | None = None, batch_size: int = 256) -> ModelFacts:
    return check_model(model, images or small_set(), batch_size=batch_size, device="cpu")


def fault(call: Callable[[], object], expected: type[EatError] = ConfigError) -> str:
    with pytest.raises(EatError) as error:
        call()
    assert type(error.value) is expected
    message = str(error.value)
    assert "\n" not in message
    return message


def unit(embeddings: torch.Tensor) -> torch.Tensor:
    return functional.normalize(embeddings, dim=1)


# A model that is right


def test_a_sound_model_passes_and_is_left_as_it_was() -> None:
    """The net comes in training mode with one parameter frozen; dropout must be off during the check."""
    model = Net(after=lambda embeddings: unit(functional.dropout(embeddings, training=model.training)))
    model.head.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    facts = checked(model)
    assert facts == ModelFacts(5, 0.0, 1.0)
    assert (facts.randomised, facts.warnings(eot_draws=1)) == (False, ())
    assert model.training
    assert [parameter.requires_grad for parameter in model.head.parameters()] == [True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_a_few_images_from_all_over_the_set_are_tried(batch_size: int) -> None:
    """Of 12 images in order of their classes: 2 for batches of 1 (one alone shows nothing), at most 8."""
    sizes: list[list[float]] = []

    def record(images: torch.Tensor) -> torch.Tensor:
        sizes.append((images[:, 0, 0, 0] * 255).round().tolist())
        return images

    images = small_set()
    checked(Net(before=record), images, batch_size)
    first = images.images[:, 0, 0, 0].tolist()
    positions = {1: [0, 6], 3: [0, 4, 8], 256: [0, 1, 3, 4, 6, 7, 9, 10]}[batch_size]
    tried = [first[position] for position in positions]
    assert sizes == [tried, tried, tried[:1]]


def test_an_embedding_of_half_precision_passes() -> None:
    assert checked(Net(after=lambda embeddings: unit(embeddings).half())).dim == 5


# A model that is not


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda out: (unit(out), out), "must return a tensor of embeddings [B, D]; got tuple"),
        (lambda out: None, "must return a tensor of embeddings [B, D]; got NoneType"),
        (
            lambda out: unit(out)[:, :, None],
            "must map 8 images to float embeddings [8, D], D at least 2; got float32 [8, 5, 1]",
        ),
        (
            lambda out: unit(out).squeeze(0),
            "must map 1 images to float embeddings [1, D], D at least 2; got float32 [5]",
        ),
        (lambda out: unit(out)[:3], "got float32 [3, 5]"),
        (lambda out: unit(out[:, :1]), "got float32 [8, 1]"),
        (lambda out: out.argmax(dim=1, keepdim=True).expand(-1, 5), "got int64 [8, 5]"),
        (lambda out: out * float("nan"), "must be finite; NaN or infinity for 8 of 8 images"),
        (lambda out: unit(out) / torch.arange(len(out))[:, None], "NaN or infinity for 1 of 8 images"),
        (lambda out: unit(out) * torch.linspace(1, 3, len(out))[:, None], "lengths from 1 to 3. Give --normalise"),
        (lambda out: unit(out) * 1.002, "must have length 1; the model's have lengths from 1.002 to 1.002"),
        (lambda out: out * 0, "must have a direction; got one of length 0"),
        (lambda out: unit(out).detach(), "detached from the images"),
        (lambda out: unit(out - out.mean(dim=0) / 2), "must not depend on the rest of its batch; alone and among 8"),
        (lambda out: out.reshape(7, 7), "raised RuntimeError: shape '[7, 7]' is invalid for input of size 40"),
    ],
)
def test_a_wrong_output_is_one_line_that_says_what_came(after: Callable[[torch.Tensor], Any], expected: str) -> None:
    assert expected in fault(lambda: checked(Net(after=after)))


def test_a_fault_inside_the_model_says_what_it_was_given() -> None:
    """The net takes 48 numbers an image; images of one channel have 16. Only the first line of a fault is shown."""
    message = fault(lambda: checked(Net(before=lambda images: images[:, :1])))
    assert message.startswith(
        "the model raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x16 and 48x5)"
    )
    assert message.endswith("(its input: float32 [8, 3, 4, 4] on cpu, values in [0, 1])")

    def fail(images: torch.Tensor) -> torch.Tensor:
        raise KeyError

    assert "raised KeyError: no message (" in fault(lambda: checked(Net(before=fail)))


def test_a_model_that_changes_its_input_is_refused() -> None:
    assert "in-place operation" in fault(lambda: checked(Net(before=lambda images: images.sub_(0.5))))


@pytest.mark.parametrize(
    "before",
    [
        lambda images: images.detach(),
        lambda images: torch.from_numpy(np.clip(images.detach().numpy(), 0, 1)),
        lambda images: (images * 255).byte().float() / 255,
    ],
    ids=["detach", "numpy", "byte"],
)
def test_a_step_that_cuts_the_gradient_off_points_to_bpda(before: Callable[[torch.Tensor], torch.Tensor]) -> None:
    message = fault(lambda: checked(Net(before=before)))
    assert "detached from the images" in message
    assert "eat_dist.attacks.bpda" in message


def test_a_model_under_no_grad_has_no_gradient() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        model = Net()
        model.forward = context()(model.forward)  # type: ignore[method-assign]
        assert "detached from the images" in fault(lambda model=model: checked(model))  # type: ignore[misc]


def test_batch_statistics_in_evaluation_are_found() -> None:
    """BatchNorm over one image of one number a channel is an error of torch's; over instances it is no fault."""

    def batch_norm(images: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(images, None, None, training=True)

    message = fault(lambda: checked(Net(before=batch_norm)))
    assert "must not depend on the rest of its batch" in message
    assert "BatchNorm in training mode" in message
    checked(Net(before=functional.instance_norm))


# A model that misleads an attack


def test_a_randomised_model_is_flagged_and_asks_for_draws() -> None:
    """Noise of 0.1 on pixels also changes one image against the batch, which is not held against it.

    The caller's random numbers go on as if nothing had been drawn.
    """
    model = Net(before=lambda images: images + 0.1 * torch.randn_like(images))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    facts = checked(model)
    assert torch.equal(torch.rand(2), expected)
    assert facts.randomised
    [warning] = facts.warnings(eot_draws=1)
    assert "--eot-draws N" in warning
    assert facts.warnings(eot_draws=20) == ()


def test_gradients_that_are_zero_or_infinite_are_counted() -> None:
    """Rounding has slope 0 everywhere. √x has an infinite one at 0: in two of the eight tried images."""
    facts = checked(Net(before=lambda images: (images * 8).round() / 8))
    assert facts.usable_gradients == 0
    [warning] = facts.warnings(eot_draws=20)
    assert "at 100% of the images tried the model's gradient is zero or not finite" in warning
    assert "eat_dist.attacks.bpda" in warning

    images = small_set(classes=2)
    pixels = images.images.clamp(min=1)
    pixels[[2, 5], 0, 0, 0] = 0
    facts = checked(Net(before=torch.sqrt), replace(images, images=pixels))
    assert facts.usable_gradients == 0.75
    assert "at 25% of the images" in facts.warnings(eot_draws=1)[0]


# Images


@dataclass(frozen=True, eq=False)
class OwnImages(LabelledImages):
    """A set of an API user's, whose batches are not what they should be."""

    change: Callable[[torch.Tensor], torch.Tensor] = lambda images: images

    def batch(self, indices: Any, device: torch.device | str) -> Batch:
        found = super().batch(indices, device)
        return replace(found, images=self.change(found.images))


def with_batches(change: Callable[[torch.Tensor], torch.Tensor]) -> OwnImages:
    return OwnImages(**vars(small_set()), change=change)


def test_a_sound_set_passes_with_and_without_the_models_shape() -> None:
    check_images(small_set(), model_shape=(3, 4, 4))
    check_images(with_batches(lambda images: images), model_shape=None)
    check_images(replace(small_set(2, 2), is_query=torch.tensor([True, False, True, False])), model_shape=None)


def test_images_of_another_size_than_the_models_are_named() -> None:
    message = fault(lambda: check_images(small_set(), model_shape=(1, 28, 28)), DataError)
    assert "built for images of 1×28×28 (C×H×W); the test set has 3×4×4. Set data.image_size" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda images: images * 255, "pixels must be in [0, 1]; image 0 has 0 to 255."),
        (lambda images: images - 0.5, "image 0 has -0.5 to 0.5."),
        (lambda images: images.log(), "image 0 has -inf to 0."),
        (lambda images: images.masked_fill(torch.arange(12).view(-1, 1, 1, 1) == 7, torch.nan), "image 7 has NaN"),
        (lambda images: images.double(), "must be float32 [12, 3, 4, 4]; got float64 [12, 3, 4, 4]"),
        (lambda images: images[:, :1], "must be float32 [12, 3, 4, 4]; got float32 [12, 1, 4, 4]"),
    ],
    ids=["bytes", "centred", "infinite", "nan", "double", "grey"],
)
def test_batches_that_are_not_pixels_in_0_1_are_named(
    change: Callable[[torch.Tensor], torch.Tensor], expected: str
) -> None:
    assert expected in fault(lambda: check_images(with_batches(change), model_shape=None), DataError)


def test_classes_and_roles_that_retrieval_cannot_use_are_named() -> None:
    def of(images: LabelledImages) -> str:
        return fault(lambda: check_images(images, model_shape=None), DataError)

    assert "at least two classes; it has 1" in of(small_set(1))
    alone = replace(small_set(2, 2), labels=torch.tensor([0, 0, 0, 1]))
    assert "test class 'b' has one image; a class needs at least two" in of(alone)
    assert "test class 'c' has no image" in of(replace(small_set(2), class_names=("a", "b", "c")))
    roles = torch.tensor([True, False, True, True])
    assert "class 'b' has queries only" in of(replace(small_set(2, 2), is_query=roles))
    assert "there is no query" in of(replace(small_set(2, 2), is_query=torch.zeros(4, dtype=torch.bool)))


def test_labels_that_are_no_class_numbers_are_named() -> None:
    for labels, expected in (
        (torch.tensor([0, 0, 5, 5]), "labels must be in 0 … 1, one for each of the 2 class names; got 0 to 5"),
        (torch.tensor([0.0, 0, 1, 1]), "labels must be int64 [4], one an image; got float32 [4]"),
        (torch.tensor([0, 0, 1]), "labels must be int64 [4], one an image; got int64 [3]"),
    ):
        images = small_set(2, 2)
        object.__setattr__(images, "labels", labels)  # our own class would refuse them
        assert expected in fault(lambda images=images: check_images(images, model_shape=None), DataError)  # type: ignore[misc]


# Numbers


def test_numbers_are_read_as_the_configuration_reads_them() -> None:
    assert parse_numbers("0, 2/255,1e-1", what="--epsilons") == (0.0, 2 / 255, 0.1)
    assert parse_numbers("8/255", what="x")[0] == parse_config({"attack": {"epsilon": "8/255"}}).attack.epsilon


@pytest.mark.parametrize("text", ["", "1,", "1,,2", "a", "1/0", "1/2/3", "inf", "nan", "1e999", "0;1"])
def test_what_is_no_list_of_numbers_is_one_line(text: str) -> None:
    message = fault(lambda: parse_numbers(text, what="--epsilons"))
    assert message.startswith("--epsilons takes numbers separated by commas, e.g. 0,2/255,4/255; got '")
    assert message.endswith(f"' in '{text}'")


def test_epsilons_must_increase_within_their_norm() -> None:
    assert check_epsilons([0, 0.5, 1], "linf") == (0, 0.5, 1)
    assert check_epsilons([0, 3.5], "l2") == (0, 3.5)
    assert check_epsilons([0.01], "l0") == (0.01,)
    assert "Did you mean 8/255?" in fault(lambda: check_epsilons([8], "linf"))
    assert "share of pixels" in fault(lambda: check_epsilons([1.5], "l0"))
    for values, expected in (
        ([-0.1], "finite and at least 0; got -0.1"),
        ([float("nan")], "finite and at least 0; got nan"),
        ([float("inf")], "finite and at least 0; got inf"),
        ([0.1, 0.1], "each above the one before; got 0.1, 0.1"),
        ([0.2, 0.1], "each above the one before; got 0.2, 0.1"),
        ([], "one or more, each above the one before; got none"),
    ):
        assert expected in fault(lambda values=values: check_epsilons(values, "l2"))  # type: ignore[misc]


def test_fractions_must_increase_up_to_1() -> None:
    assert EvaluationConfig(fractions=(0.1, 0.5, 1)).fractions == (0.1, 0.5, 1)
    for values, expected in (
        ((0, 0.5), "must rise from above 0; got 0, 0.5"),
        ((50,), "at most 1; got 50"),
        ((float("nan"),), "finite number"),
        ((0.5, 0.1), "must rise from above 0; got 0.5, 0.1"),
        ((), "at least 1 item"),
    ):
        with pytest.raises(ValidationError, match=expected):
            EvaluationConfig(fractions=values)
