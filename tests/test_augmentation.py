"""Crops are drawn as torchvision draws them, and both ways of scaling them give the same pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torchvision.transforms import v2

from eat_dist.data import augmentation
from eat_dist.data.augmentation import RATIO, SCALE, Crop, Crops, crop_and_flip, crop_and_flip_batch, draw_crops
from eat_dist.seeding import generator


def sizes_of(*sizes: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int64)


def random_images(sizes: torch.Tensor, channels: int, seed: int = 0) -> list[torch.Tensor]:
    source = generator(seed)
    return [
        torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=source)
        for height, width in sizes.tolist()
    ]


def kolmogorov_smirnov(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest distance between two samples' distribution functions."""
    first, second = first.sort().values, second.sort().values
    points = torch.cat([first, second])
    below = [torch.searchsorted(sample, points, right=True) / len(sample) for sample in (first, second)]
    return float((below[0] - below[1]).abs().max())


@pytest.mark.parametrize("size", [(375, 500), (500, 334), (200, 600), (32, 32)])
def test_areas_ratios_and_places_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    draws = 4000
    ours = draw_crops(sizes_of(size).expand(draws, 2), generator(1))
    transform = v2.RandomResizedCrop(224)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = [transform.make_params([torch.empty(3, *size)]) for _ in range(draws)]
    top, left, height, width = (torch.tensor([p[name] for p in drawn]) for name in ("top", "left", "height", "width"))
    theirs = Crops(top, left, height, width, flipped=torch.zeros(draws, dtype=torch.bool))
    critical = 1.95 * math.sqrt(2 / draws)  # of two such samples, one pair in a thousand is farther apart

    def noise(name: str) -> torch.Tensor:  # breaks the ties of small integers, equally for both
        return torch.rand(draws, generator=generator(2, name)) * 1e-6

    statistics: dict[str, Callable[[Crops], torch.Tensor]] = {
        "area": lambda crops: crops.height * crops.width / (size[0] * size[1]),
        "log ratio": lambda crops: (crops.width / crops.height).log(),
        "top": lambda crops: crops.top / size[0],
        "left": lambda crops: crops.left / size[1],
    }
    for name, statistic in statistics.items():
        distance = kolmogorov_smirnov(statistic(ours) + noise(name), statistic(theirs) + noise(name))
        assert distance < critical, (name, distance)


@pytest.mark.parametrize("size", [(2, 1000), (1000, 2), (3, 400), (1, 50), (50, 1)])
def test_where_no_rectangle_fits_the_crop_is_torchvisions_central_one(size: tuple[int, int]) -> None:
    (ours,) = draw_crops(sizes_of(size), generator(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = v2.RandomResizedCrop(224).make_params([torch.empty(3, *size)])
    assert {"top": ours.top, "left": ours.left, "height": ours.height, "width": ours.width} == theirs


def test_crops_lie_inside_their_images_and_keep_to_scale_and_ratio() -> None:
    sizes = torch.randint(100, 600, (5000, 2), generator=generator(0))
    crops = draw_crops(sizes, generator(1))
    assert int(crops.top.min()) == int(crops.left.min()) == 0
    assert bool((crops.top + crops.height <= sizes[:, 0]).all())
    assert bool((crops.left + crops.width <= sizes[:, 1]).all())
    # To the rounding of a side; the central crop of a strip may hold less than the smallest share.
    square = (sizes[:, 0] / sizes[:, 1] - 1).abs() < 0.2
    share = (crops.height * crops.width / sizes.prod(dim=1))[square]
    assert SCALE[0] * 0.95 < float(share.min()) < 0.1
    assert 0.9 < float(share.max()) <= 1
    ratio = crops.width / crops.height
    assert RATIO[0] * 0.97 < float(ratio.min()) < float(ratio.max()) < RATIO[1] * 1.03


def test_half_of_the_crops_are_mirrored() -> None:
    flipped = draw_crops(sizes_of((50, 50)).expand(10_000, 2), generator(3)).flipped
    assert abs(float(flipped.float().mean()) - 0.5) < 0.02


def test_the_crop_of_an_image_of_one_pixel_is_that_pixel() -> None:
    sizes = sizes_of((1, 1)).expand(50, 2)
    images = random_images(sizes, channels=3)
    crops = draw_crops(sizes, generator(0))
    assert {crop[:4] for crop in crops} == {(0, 0, 1, 1)}
    for image, crop, batched in zip(images, crops, crop_and_flip_batch(images, crops, 4), strict=True):
        assert torch.equal(crop_and_flip(image, crop, 4), image.expand(3, 4, 4))
        assert torch.equal(batched, image.expand(3, 4, 4) / 255)


def test_crops_are_a_function_of_the_generator_and_of_each_images_own_size() -> None:
    sizes = torch.randint(10, 300, (20, 2), generator=generator(0))
    first, again, other = (list(draw_crops(sizes, generator(seed))) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    changed = sizes.clone()
    changed[7] = 1
    theirs = list(draw_crops(changed, generator(5)))
    assert theirs[:7] + theirs[8:] == first[:7] + first[8:]


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    crops = draw_crops(sizes_of((20, 30)).expand(8, 2), generator(0))
    crop_and_flip_batch(random_images(sizes_of((20, 30)).expand(8, 2), 3), crops, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_crop_holds_the_pixels_of_its_rectangle_and_its_mirror_image_in_reverse() -> None:
    (image,) = random_images(sizes_of((9, 12)), channels=3)
    part = image[:, 2:7, 3:8]
    assert torch.equal(crop_and_flip(image, Crop(2, 3, 5, 5, flipped=False), 5), part)
    assert torch.equal(crop_and_flip(image, Crop(2, 3, 5, 5, flipped=True), 5), part.flip(-1))


@pytest.mark.parametrize("size", [8, 32, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_batched_product_is_within_one_level_of_torchvisions_scaling(channels: int, size: int) -> None:
    sizes = torch.cat([torch.randint(1, 260, (40, 2), generator=generator(size)), sizes_of((1, 200), (200, 1))])
    images = random_images(sizes, channels)
    crops = draw_crops(sizes, generator(4))
    one_by_one = torch.stack([crop_and_flip(image, crop, size) for image, crop in zip(images, crops, strict=True)])
    batched = crop_and_flip_batch(images, crops, size)
    assert batched.dtype == torch.float32
    assert torch.equal(batched, (batched * 255).round() / 255)
    difference = (batched * 255 - one_by_one.float()).abs()
    assert float(difference.max()) < 1.001
    assert float(difference.mean()) < 0.02


def test_a_batch_in_parts_is_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.randint(5, 60, (7, 2), generator=generator(0))
    images, crops = random_images(sizes, channels=3), draw_crops(sizes, generator(1))
    whole = crop_and_flip_batch(images, crops, 16)
    for at_once in (1, 3 * 60 * 60 * 2):
        monkeypatch.setattr(augmentation, "_AT_ONCE", at_once)
        parts = crop_and_flip_batch(images, crops, 16)
        assert float((whole - parts).abs().max()) < 1.001 / 255  # sums in another order may round otherwise
        assert float((whole != parts).float().mean()) < 1e-3
