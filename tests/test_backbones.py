"""The backbones: their form, and what they expect of an image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from eat_dist.config import ModelConfig
from eat_dist.errors import ConfigError
from eat_dist.models import (
    Embedder,
)
from eat_dist.models.bn_inception import BLOCKS
from eat_dist.seeding import generator
from model_forms import INCEPTION, bn_inception_shapes, built, on_meta, random_images, small

# --- Form ---


@pytest.mark.parametrize(
    ("name", "whole", "classifier_inputs"),
    [
        # Published by torchvision, classifier of 1000 classes included.
        ("mobilenet_v2", 3_504_872, 1280),
        ("resnet18", 11_689_512, 512),
        ("resnet50", 25_557_032, 2048),
        # Of the published file: 10,260,224 without convolutions' biases (10,256,000 as an independent implementation of
        # the same table counts, which leaves out conv2_3x3_reduce: 64·64 + 2·64), 10,016 biases, and the classifier.
        ("bn_inception", 10_256_000 + 64 * 64 + 2 * 64 + 10_016 + 1_025_000, 1024),
    ],
)
def test_a_backbone_has_the_published_parameters_without_the_classifier(
    name: str, whole: int, classifier_inputs: int
) -> None:
    backbone = on_meta(name)
    assert backbone.out_channels == classifier_inputs
    assert sum(parameter.numel() for parameter in backbone.parameters()) == whole - 1000 * (classifier_inputs + 1)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50", "bn_inception"])
@pytest.mark.parametrize(("size", "grid"), [(224, 7), (96, 3)])
def test_a_backbone_puts_out_a_grid_of_a_thirty_second(name: str, size: int, grid: int) -> None:
    backbone = on_meta(name)
    features = backbone(torch.empty(2, 3, size, size, device="meta"))
    assert features.shape == (2, backbone.out_channels, grid, grid)


def test_the_blocks_of_bn_inception_have_the_channels_of_the_paper_but_for_4c_to_4e() -> None:
    depths, channels = {}, 192
    for block in BLOCKS:
        channels = depths[block.name] = block.out_channels(channels)
    assert depths == {block: row[-1] for block, row in INCEPTION.items()}
    figure_5 = dict(zip(INCEPTION, (256, 320, 576, 576, 576, 576, 576, 1024, 1024, 1024), strict=True))
    assert {block for block in depths if depths[block] != figure_5[block]} == {"4c", "4d", "4e"}


def test_bn_inception_has_the_names_and_shapes_of_the_published_weights() -> None:
    assert {name: tuple(tensor.shape) for name, tensor in on_meta("bn_inception").state_dict().items()} == (
        bn_inception_shapes()
    )


def test_bn_inception_pools_by_average_but_by_maximum_in_5b_and_where_it_halves() -> None:
    backbone = built(small("bn_inception")).backbone
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        return lambda _module, inputs: seen.update({name: inputs[0]})

    for name, module in backbone.named_modules():
        module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        backbone(torch.randn(2, 3, 64, 64, generator=generator(0)))
    for block in ("3a", "3b", "4a", "4b", "4c", "4d", "5a", "5b"):
        features, pooled = seen[f"inception_{block}_1x1"], seen[f"inception_{block}_pool_proj"]
        if block == "5b":
            expected = functional.max_pool2d(features, 3, stride=1, padding=1)
        else:  # the frame of zeros counts: the sum of nine cells over nine, at the border too
            expected = functional.pad(features, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).mean((-2, -1))
        torch.testing.assert_close(pooled, expected)
    for block, following in (("3c", "4a"), ("4e", "5a")):
        features, output = seen[f"inception_{block}_3x3_reduce"], seen[f"inception_{following}_1x1"]
        passed_on = functional.max_pool2d(features, 3, stride=2, ceil_mode=True)
        assert torch.equal(output[:, -features.shape[1] :], passed_on)


@pytest.mark.parametrize("size", [31, 32, 38, 95, 224, 227])
def test_bn_inception_takes_sides_whose_grids_stay_even(size: int) -> None:
    assert on_meta("bn_inception")(torch.empty(1, 3, size, 64, device="meta")).shape[1] == 1024


@pytest.mark.parametrize("size", [30, 39, 48, 84, 299])
def test_bn_inception_refuses_sides_that_would_not_fit_together(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"multiples of 32 pixels; got 64×{size}\. Set data\.image_size"):
        on_meta("bn_inception")(torch.empty(1, 3, 64, size, device="meta"))


# --- Input form ---


def seen_by_the_backbone(model: Embedder, images: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    return seen[-1]


def test_bn_inception_sees_blue_green_red_from_0_to_255_less_104_117_128() -> None:
    images = random_images(32)
    expected = 255 * images[:, [2, 1, 0]] - torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)
    seen = seen_by_the_backbone(built(small("bn_inception")), images)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_torchvision_networks_see_imagenet_normalisation(name: str) -> None:
    images = random_images(32)
    expected = torchvision.transforms.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(seen_by_the_backbone(built(small(name)), images), expected)


@pytest.mark.parametrize("name", ["resnet18", "bn_inception"])
def test_an_image_of_one_channel_is_repeated_for_a_backbone_of_three(name: str) -> None:
    grey, colour = built(small(name), channels=1), built(small(name), channels=3)
    images = random_images(32, channels=1)
    with torch.no_grad():
        assert torch.equal(grey(images), colour(images.expand(-1, 3, -1, -1)))


def test_configured_mean_and_std_are_in_the_units_and_order_of_the_backbone() -> None:
    images = random_images(32)
    model = built(small("bn_inception", mean=(10, 20, 30), std=(2, 4, 5)))
    blue_green_red = 255 * images.flip(1)
    expected = (blue_green_red - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor([2.0, 4, 5]).view(3, 1, 1)
    torch.testing.assert_close(seen_by_the_backbone(model, images), expected, rtol=0, atol=1e-4)


def test_one_configured_value_holds_for_all_channels() -> None:
    images = random_images(32)
    model = built(small("resnet18", mean=0.25, std=(0.5,)))
    torch.testing.assert_close(seen_by_the_backbone(model, images), (images - 0.25) / 0.5)


@pytest.mark.parametrize(
    ("config", "channels", "message"),
    [
        (small("resnet18", mean=(0.1, 0.2)), 3, r"model\.mean must have 1 or 3 values here; got 2: \[0\.1, 0\.2\]"),
        (small(std=(0.1, 0.2, 0.3)), 1, r"model\.std must have 1 value here; got 3"),
        (small("resnet18"), 2, r"backbone 'resnet18' takes images of 1 or 3 channels; the data have 2"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(config: ModelConfig, channels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(config, channels)
