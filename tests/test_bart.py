"""BaRT's transform groups, each by hand, and how they are put in a row."""

from __future__ import annotations

import colorsys
import itertools
import math

import pytest
import torch

from eat_dist.config import InferenceConfig
from eat_dist.inference import bart
from eat_dist.inference.bart_groups import (
    COLOUR_GROUPS,
    GROUPS,
    colour_precision,
    colour_space,
    contrast,
    denoising,
    fft_perturbation,
    grey_scale,
    jpeg_noise,
    noise_injection,
    swirl,
    zoom,
)
from eat_dist.inference.compression import jpeg
from eat_dist.inference.resampling import gaussian, resample
from eat_dist.inference.table import make_transform
from eat_dist.seeding import generator


def numbers(*values: float) -> torch.Tensor:
    """What one image draws; ½ where nothing is said."""
    return torch.tensor([[*values, *[0.5] * (8 - len(values))]])


def still(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(torch.cat([images, images[:, :1]], dim=1))


def image(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[list(rows)]])


def test_colour_precision_rounds_all_channels_alike_or_each_by_its_own_step() -> None:
    """s = 8 + ⌊193·u⌋: 8 and 200. In steps of ⅛ 0.30 is nearest to 0.25, in steps of 1/200 it stays."""
    images = torch.full((1, 3, 1, 1), 0.30)
    alike = colour_precision(images, numbers(0.0, 0.0, 0.999, 0.999), still(images))
    each = colour_precision(images, numbers(0.9, 0.0, 0.999, 0.999), still(images))
    assert alike.flatten().tolist() == pytest.approx([0.25, 0.25, 0.25])
    assert each.flatten().tolist() == pytest.approx([0.25, 0.30, 0.30])


@pytest.mark.parametrize(("drawn", "quality"), [(0.0, 55), (0.5, 75), (0.999, 95)])
def test_jpeg_noise_has_qualities_from_55_to_95(drawn: float, quality: int) -> None:
    images = torch.rand(1, 3, 16, 16, generator=generator(0))
    assert torch.equal(jpeg_noise(images, numbers(drawn), still(images)), jpeg(images, [quality]))


def test_a_swirl_turns_by_less_the_farther_from_its_centre() -> None:
    """On the image of its own coordinates, which linear interpolation gives back exactly, away from the border.

    The map is scikit-image's: θ = s·e^(−ρ / r) + atan2, r = R·ln 2 / 5; drawn are s, R and the centre.
    """
    size = 16
    across = torch.arange(size).float()[None, :].expand(size, size) / size
    images = torch.stack([across, across.T])[:, None]
    drawn = torch.tensor([[0.9, 1.0, 0.4, 0.6, 0, 0, 0, 0]]).repeat(2, 1)
    moved = swirl(images, drawn, still(images)) * size
    strength, radius = 0.01 + 0.9 * 1.99, 200 / 256 * size * math.log(2) / 5
    centre = (0.4 * (size - 1), 0.6 * (size - 1))
    turned = 0.0
    for y, x in itertools.product(range(3, size - 3), repeat=2):
        dx, dy = x - centre[0], y - centre[1]
        rho = math.hypot(dx, dy)
        theta = strength * math.exp(-rho / radius) + math.atan2(dy, dx)
        expected = (centre[0] + rho * math.cos(theta), centre[1] + rho * math.sin(theta))
        assert (float(moved[0, 0, y, x]), float(moved[1, 0, y, x])) == pytest.approx(expected, abs=1e-3)
        turned = max(turned, abs(theta - math.atan2(dy, dx)))
    assert turned > 0.5  # the control: something was turned


def test_the_six_kinds_of_noise_by_hand() -> None:
    """A value of 0.25 under a noise of 1, −3 and 3: Gaussian, shot, salt, pepper, both, speckle."""
    images = torch.full((1, 1, 1, 3), 0.25)
    noise = torch.tensor([[1.0, -3.0, 3.0], [9.0, 9.0, 9.0]]).view(1, 2, 1, 3)  # the last channel is not for it
    shot = math.sqrt(0.25 / 256)
    expected = [
        [0.35, -0.05, 0.55],
        [0.25 + shot, 0.25 - 3 * shot, 0.25 + 3 * shot],
        [0.25, 1, 1],
        [0.25, 0, 0],
        [0.25, 0, 1],
        [0.275, 0.175, 0.325],
    ]
    for kind, row in enumerate(expected):
        found = noise_injection(images, numbers((kind + 0.5) / 6), noise)
        assert found.flatten().tolist() == pytest.approx(row), kind


def test_the_fft_group_removes_high_frequencies_and_scales_the_others() -> None:
    """k = 0: the mean alone is left; k ≥ ½: all stay. Of a noise of 0 the factor is 1, of a large one 1.02."""
    images = torch.rand(1, 1, 8, 6, generator=generator(0))
    smooth = fft_perturbation(images, numbers(0.0), still(images))
    torch.testing.assert_close(smooth, images.mean().expand_as(images))
    torch.testing.assert_close(fft_perturbation(images, numbers(0.9), still(images)), images)
    torch.testing.assert_close(fft_perturbation(images, numbers(0.9), still(images) + 9), 1.02 * images)
    # k = 0.95·0.2 = 0.19 cycles a pixel keeps the wave of one period in 8 pixels (⅛) and not that of two (¼).
    down = torch.arange(8) * 2 * math.pi / 8
    waves = (down.cos() + (2 * down).cos())[:, None].expand(8, 6)[None, None]
    torch.testing.assert_close(
        fft_perturbation(waves, numbers(0.2), still(waves)), down.cos()[:, None].expand(8, 6)[None, None]
    )


def test_the_fft_groups_factors_do_not_depend_on_the_noise_that_is_injected(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def keeps(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        seen.append(noise)
        return images

    monkeypatch.setattr(bart, "GROUPS", (keeps,))
    monkeypatch.setattr(bart, "COLOUR_GROUPS", ())
    make_transform(InferenceConfig(name="bart"), pool=None)(
        torch.rand(20, 3, 16, 16, generator=generator(0)), generator(1)
    )
    fields = seen[0].transpose(0, 1).flatten(1)
    assert fields.shape == (4, 20 * 16 * 16)
    assert float((torch.corrcoef(fields) - torch.eye(4)).abs().max()) < 0.06  # 4 / √5120


def test_a_zoom_cuts_its_share_off_each_side() -> None:
    """On the image of its own columns: what is seen begins at 16·a and goes on for 16·(1 − a − b)."""
    size = 16
    images = (torch.arange(size).float() + 0.5)[None, :].expand(size, size)[None, None] / size
    found = zoom(images, numbers(0.5, 0.0, 0.5, 1.0), still(images)) * size
    before, after = 10 / 256, 50 / 256
    for column in range(2, size - 2):
        expected = size * (before + (1 - before - after) * (column + 0.5) / size)
        assert float(found[0, 0, 3, column]) == pytest.approx(expected, abs=1e-4)


def test_colour_spaces_are_moved_within_their_ranges() -> None:
    """Y by + 0.05 is that much more of every channel; V by − 0.25 is what the standard library makes of it."""
    images = torch.rand(1, 3, 4, 4, generator=generator(0)) * 0.8 + 0.1
    lighter = colour_space(images, numbers(0.9, 1.0, 0.5, 0.5), still(images))
    torch.testing.assert_close(lighter, images + 0.05)
    found = colour_space(images, numbers(0.1, 0.9, 0.3, 0.0), still(images))
    for y, x in itertools.product(range(4), repeat=2):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, y, x].tolist())
        moved = (hue + 0.8 * 0.05, saturation - 0.4 * 0.25, value - 0.25)
        expected = colorsys.hsv_to_rgb(moved[0] % 1, max(moved[1], 0), max(moved[2], 0))
        assert found[0, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)
    grey = torch.full((1, 3, 1, 1), 0.5)
    assert colour_space(grey, numbers(0.1), still(grey)).flatten().tolist() == pytest.approx([0.5] * 3)


def test_contrast_is_equalised_or_stretched() -> None:
    """Four equally frequent values become ¼, ½, ¾ and 1. Stretched from the lowest to the last but one rank."""
    images = image([0.1, 0.2], [0.3, 0.4])
    equalised = contrast(images, numbers(0.1, 0.999), still(images))
    assert equalised.flatten().tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    stretched = contrast(images, numbers(0.9, 0.5, 0.0, 0.999), still(images))
    assert stretched.flatten().tolist() == pytest.approx([0.0, 0.5, 1.0, 1.5], abs=1e-5)  # the caller clips
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert torch.equal(contrast(flat, numbers(0.9), still(flat)), flat)


def test_grey_is_mixed_in_wholly_in_part_or_but_for_one_channel() -> None:
    """Channels 0.2, 0.4 and 0.9, equal weights: the mean of all is 0.5; without the last it is 0.3."""
    images = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1)
    equal, last = [0.5, 0.5, 0.5], 0.9
    expected = {
        0.1: [0.5, 0.5, 0.5],
        0.3: [0.2 * 0.2 + 0.5 * 0.8, 0.4 * 0.5 + 0.5 * 0.5, 0.9],  # shares 0 (at least 0.2), ½ and 1 of their own
        0.6: [0.3, 0.3, 0.9],
        0.9: [0.2, 0.4, 0.9 * 0.1 + 0.3 * 0.9],  # p = 0.1 + 0.8·1
    }
    for kind, channels in expected.items():
        found = grey_scale(images, numbers(kind, *equal, 0.0, 0.5, 1.0, last), still(images))
        assert found.flatten().tolist() == pytest.approx(channels, abs=1e-5), kind


def test_a_bright_pixel_is_blurred_outvoted_or_averaged() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 4, 4] = 1
    sigma = torch.tensor([0.3])  # 0.1 + ½·(0.5 − 0.1)
    blurred = denoising(images, numbers(0.1, 0.5), still(images))
    torch.testing.assert_close(blurred, resample(images, gaussian(8, sigma=sigma), gaussian(8, sigma=sigma)))
    assert float(denoising(images, numbers(0.5), still(images)).abs().max()) == 0
    mean = denoising(images, numbers(0.9), still(images))
    assert float(mean[0, 0, 4, 4]) == pytest.approx(1 / 9)
    assert float(mean.sum()) == pytest.approx(1)


def test_there_are_ten_groups_for_colours_and_eight_for_grey() -> None:
    assert (len(GROUPS), len(COLOUR_GROUPS)) == (10, 2)
    assert set(COLOUR_GROUPS) < set(GROUPS)


def test_each_image_goes_through_k_different_groups_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group g turns x into (x + g) / 10, so the digits of what is left are the groups, the last one first."""

    def writes(digit: int) -> object:
        return lambda images, drawn, noise: (images + digit) / 10

    monkeypatch.setattr(bart, "GROUPS", tuple(writes(digit) for digit in range(6)))
    monkeypatch.setattr(bart, "COLOUR_GROUPS", ())
    transform = make_transform(InferenceConfig(name="bart", groups=3), pool=None)
    done = transform(torch.zeros(1500, 1, 8, 8, dtype=torch.float64), generator(0))
    assert bool((done == done[:, :, :1, :1]).all())
    rows = [f"{value:.3f}"[2:] for value in done[:, 0, 0, 0].tolist()]
    assert all(len(set(row)) == 3 for row in rows)
    assert len(set(rows)) == 6 * 5 * 4  # every choice in every order
    assert "".join(rows).count("0") == pytest.approx(750, abs=100)
    all_of_them = make_transform(InferenceConfig(name="bart", groups=10), pool=None)
    digits = f"{float(all_of_them(torch.zeros(1, 1, 8, 8, dtype=torch.float64), generator(0))[0, 0, 0, 0]):.6f}"[2:]
    assert sorted(digits) == list("012345")


def test_grey_images_are_spared_the_colour_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def black(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(images)

    def same(images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return images

    monkeypatch.setattr(bart, "GROUPS", (black, same))
    monkeypatch.setattr(bart, "COLOUR_GROUPS", (black,))
    transform = make_transform(InferenceConfig(name="bart", groups=2), pool=None)
    assert float(transform(torch.ones(4, 1, 8, 8)).min()) == 1
    assert float(transform(torch.ones(4, 3, 8, 8)).max()) == 0


def test_what_a_group_does_to_an_image_is_clipped_and_does_not_touch_the_others() -> None:
    transform = make_transform(InferenceConfig(name="bart"), pool=None)
    images = torch.rand(1, 3, 16, 16, generator=generator(0)).repeat(40, 1, 1, 1)
    before = images.clone()
    done = transform(images, generator(1))
    assert torch.equal(images, before)
    assert len(done.flatten(1).unique(dim=0)) == 40
    assert (float(done.min()), float(done.max())) == pytest.approx((0, 1), abs=0.05)
