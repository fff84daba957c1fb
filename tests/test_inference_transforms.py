"""The defenses at inference: each transform by hand, and what all of them hold to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from eat_dist.attacks import Generators, Interleaved
from eat_dist.config import InferenceConfig
from eat_dist.errors import ConfigError
from eat_dist.inference import INFERENCE_DEFENSES, Defended, check_inference, options_of, randomisation
from eat_dist.inference.compression import jpeg, rounded
from eat_dist.inference.resampling import gaussian, linear, resample, whole
from eat_dist.inference.table import ImageTransform, make_transform
from eat_dist.inference.total_variation import smoothed
from eat_dist.seeding import generator

POOL = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8, generator=generator("pool"))
# Every transform there is, by itself and together.
CASES: dict[str, dict[str, Any]] = {
    "randomisation": {"name": "randomisation"},
    "bart": {"name": "bart", "groups": 10},
    "mixup_inference": {"name": "mixup_inference"},
    "crop_rescale": {"name": "input_transform", "transforms": ("crop_rescale",)},
    "bit_depth": {"name": "input_transform", "transforms": ("bit_depth",)},
    "jpeg": {"name": "input_transform", "transforms": ("jpeg",)},
    "total_variation": {"name": "input_transform"},
    "all four": {
        "name": "input_transform",
        "transforms": ("crop_rescale", "bit_depth", "jpeg", "total_variation"),
        "crop": 0.8,
        "drop": 0.2,
    },
}
DETERMINISTIC = ("bit_depth", "jpeg")


def transform_of(case: str, shape: tuple[int, int, int] = (3, 12, 12)) -> ImageTransform:
    channels, height, width = shape
    return make_transform(InferenceConfig(**CASES[case]), pool=POOL[:, :channels, :height, :width])


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth in parts, with values from 0 to 1."""
    coarse = torch.rand(shape[0], shape[1], 3, 3, generator=generator("pictures", seed))
    return functional.interpolate(coarse, size=shape[2:], mode="bilinear")


def scripted(monkeypatch: pytest.MonkeyPatch, module: Any, *rows: list[float]) -> None:
    """Have a module draw these numbers, a row an image."""
    monkeypatch.setattr(module, "uniform", lambda like, generators: torch.tensor(rows, dtype=like.dtype))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 12, 9), (3, 9, 12)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_pixels_stay_in_range_and_every_image_keeps_a_usable_gradient(case: str, shape: tuple[int, int, int]) -> None:
    images = pictures(6, *shape).requires_grad_(True)
    weights = torch.rand(6, *shape, generator=generator("weights"))
    for seed in range(3):
        done = transform_of(case, shape)(images, generator(seed))
        assert done.shape[:2] == images.shape[:2]
        assert 0 <= float(done.detach().min()) <= float(done.detach().max()) <= 1 + 1e-6
        (gradient,) = torch.autograd.grad((done * functional.interpolate(weights, done.shape[2:])).sum(), images)
        assert bool(gradient.isfinite().all())
        usable = gradient.flatten(1).ne(0).any(dim=1).float().mean()
        assert float(usable) >= (0.8 if case == "bart" else 1)  # ten groups may clip all of a small image


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_views_and_what_is_not_random_says_so(case: str) -> None:
    images, transform = pictures(8, 3, 12, 12), transform_of(case)
    one, again, other = (transform(images, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (case in DETERMINISTIC) == (not transform.randomised)


@pytest.mark.parametrize("case", CASES)
def test_without_generators_torchs_global_one_is_drawn_from(case: str) -> None:
    images, transform = pictures(8, 3, 12, 12), transform_of(case)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        one, next_one = transform(images), transform(images)
        torch.manual_seed(3)
        assert torch.equal(transform(images), one)
    assert torch.equal(one, next_one) == (case in DETERMINISTIC)
    before = torch.get_rng_state()
    transform(images, generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", CASES)
def test_with_a_generator_an_image_its_view_does_not_depend_on_the_others(case: str) -> None:
    images, transform = pictures(6, 3, 12, 12), transform_of(case)

    def own(rows: list[int]) -> Generators:
        return [generator("own", row) for row in rows]

    whole_batch = transform(images, own([0, 1, 2, 3, 4, 5]))
    torch.testing.assert_close(transform(images[[4, 1]], own([4, 1])), whole_batch[[4, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_replicas_draw_what_one_process_draws_for_their_images(case: str) -> None:
    images, transform = pictures(6, 3, 12, 12), transform_of(case)
    whole_batch = transform(images, generator(5))
    for index in range(2):
        part = transform(images[index::2], Interleaved(generator(5), index, 2))
        torch.testing.assert_close(part, whole_batch[index::2], rtol=0, atol=1e-6)


def test_an_image_grows_to_the_nearest_pixels_and_is_put_on_a_black_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """2×2 on a canvas of 3×3: at its own size one down and none to the right; and at full size, pixel ⌊i·2/3⌋."""
    scripted(monkeypatch, randomisation, [0.0, 0.99, 0.0], [0.99, 0.5, 0.5])
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2) / 4
    small, large = transform_grown(1.5)(image.repeat(2, 1, 1, 1)) * 4
    assert small[0].tolist() == [[0, 0, 0], [1, 2, 0], [3, 4, 0]]
    assert large[0].tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]


def transform_grown(growth: float) -> ImageTransform:
    return make_transform(InferenceConfig(name="randomisation", growth=growth), pool=None)


def test_sizes_go_up_to_the_papers_share_and_all_of_them_and_all_places_occur() -> None:
    standard = make_transform(InferenceConfig(name="randomisation"), pool=None)
    for size, largest in ((8, 9), (28, 31), (32, 35), (224, 248), (299, 331)):
        assert standard(torch.zeros(1, 1, size, size)).shape == (1, 1, largest, largest)
    seen = standard(torch.ones(400, 1, 8, 8), generator(0)).flatten(1)
    # Five views of 8×8: the whole canvas in half of the cases, one of four corners in the others.
    views, counts = seen.unique(dim=0, return_counts=True)
    assert len(views) == 5
    full = counts[views.sum(dim=1) == 81]
    assert 160 < int(full) < 240
    assert int(counts.min()) > 30


def test_resampling_is_the_crop_scaled_as_torch_scales_it() -> None:
    images = pictures(2, 3, 9, 12)
    rows = linear(9, count=7, start=torch.tensor([2.0, 0.0]), extent=torch.tensor([4.0, 9.0]))
    columns = linear(12, count=5, start=torch.tensor([3.0, 4.0]), extent=torch.tensor([6.0, 8.0]))
    found = resample(images, rows, columns)
    for number, crop in enumerate((images[:1, :, 2:6, 3:9], images[1:, :, :, 4:])):
        expected = functional.interpolate(crop, size=(7, 5), mode="bilinear", align_corners=False)
        torch.testing.assert_close(found[number : number + 1], expected, rtol=0, atol=1e-6)


def test_a_gaussian_blur_weighs_by_distance_within_the_image() -> None:
    """σ = 1 on three pixels: e^0, e^−½ and e^−2, made to sum to 1; σ = 0.1 leaves everything in place."""
    near, far = 0.6065, 0.1353
    wide, narrow = gaussian(3, sigma=torch.tensor([1.0, 0.1]))
    expected = torch.tensor([[1, near, far], [near, 1, near], [far, near, 1]])
    torch.testing.assert_close(wide, expected / expected.sum(dim=1, keepdim=True), rtol=0, atol=1e-4)
    torch.testing.assert_close(narrow, torch.eye(3), rtol=0, atol=1e-6)


def test_whole_numbers_are_equally_likely_and_never_the_count_itself() -> None:
    assert whole(torch.tensor([0.0, 0.24, 0.25, 0.999999]), 4).tolist() == [0, 0, 1, 3]
    assert whole(torch.tensor([1.0, 0.5]), torch.tensor([3, 1])).tolist() == [2, 0]


def test_rounding_and_its_approximate_gradient_by_hand() -> None:
    """Three bits: 0.2·7 = 1.4 is nearest to 1, 0.95·7 = 6.65 to 7."""
    transform = make_transform(InferenceConfig(name="input_transform", transforms=("bit_depth",)), pool=None)
    images = torch.tensor([0.2, 0.95]).view(1, 1, 1, 2).requires_grad_(True)
    done = transform(images)
    assert done.flatten().tolist() == pytest.approx([1 / 7, 1.0])
    assert torch.autograd.grad(done.sum(), images)[0].flatten().tolist() == [1.0, 1.0]
    assert rounded(images.detach(), 2).flatten().tolist() == [0.0, 1.0]


def test_jpeg_keeps_what_it_can_and_each_image_has_its_own_quality() -> None:
    grey = torch.full((1, 1, 9, 11), 100 / 255)
    assert torch.equal(jpeg(grey, [75]), grey)
    noisy = torch.rand(1, 1, 16, 16, generator=generator(0)).repeat(3, 1, 1, 1).requires_grad_(True)
    done = jpeg(noisy, [95, 5, 95])
    good, bad, same = ((view - noisy[0]).abs().mean().item() for view in done.detach())
    assert good == same
    assert good < 0.5 * bad
    assert torch.equal(torch.autograd.grad(done.sum(), noisy)[0], torch.ones_like(noisy))


def test_total_variation_of_two_pixels_by_hand() -> None:
    """½(z₁ − a)² + ½(z₂ − b)² + λ|z₁ − z₂|: both move by λ towards each other, or meet in the middle."""
    images = torch.tensor([[0.2, 0.8], [0.4, 0.42]]).view(2, 1, 1, 2)
    found = smoothed(images, torch.ones_like(images), weight=0.05, iterations=500).view(2, 2)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75], [0.41, 0.41]]), rtol=0, atol=1e-4)


def test_missing_values_do_not_count_and_the_minimum_is_one() -> None:
    images = pictures(2, 3, 6, 7).double()
    kept = (torch.rand(images.shape, generator=generator(1)) < 0.5).double()
    found = smoothed(images, kept, weight=0.1, iterations=3000)
    other = torch.where(kept > 0, images, torch.rand(images.shape, generator=generator(2)).double())
    assert torch.equal(smoothed(other, kept, weight=0.1, iterations=3000), found)

    def value(z: torch.Tensor) -> float:
        down = functional.pad(z[:, :, 1:] - z[:, :, :-1], (0, 0, 0, 1))
        right = functional.pad(z[..., 1:] - z[..., :-1], (0, 1))
        return float(0.5 * (kept * (z - images) ** 2).sum() + 0.1 * (down**2 + right**2).sqrt().sum())

    least = value(found)
    for seed in range(20):
        step = 1e-3 * torch.randn(images.shape, generator=generator(seed)).double()
        assert value(found + step) > least
    assert least < min(value(images), value(torch.full_like(images, 0.5)))


def test_a_black_image_of_which_all_is_dropped_stays_finite() -> None:
    images = torch.zeros(1, 1, 8, 8)
    assert float(smoothed(images, torch.zeros_like(images), weight=0.03).abs().max()) == 0


class Flat(nn.Module):
    """The pixels as an embedding of length 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.normalize(images.flatten(1), dim=1)


def test_mixup_inference_is_the_mean_of_the_embeddings_of_mixtures_scaled_to_length_1() -> None:
    """Against a loop over the images and the views, with the numbers that the generator gives."""
    images = pictures(4, 3, 12, 12)
    config = InferenceConfig(name="mixup_inference", draws=3, share=0.7, pool=5)
    found = Defended(Flat(), config, pool=POOL, generators=lambda: generator(7))(images)
    drawn = generator(7)
    chosen = torch.stack([torch.rand(4, generator=drawn) for _ in range(3)])
    for row in range(4):
        total = torch.zeros(3 * 12 * 12)
        for view in range(3):
            other = POOL[int(chosen[view, row] * 5)].float() / 255
            mixed = (0.7 * images[row] + 0.3 * other).flatten()
            total += mixed / mixed.norm()
        torch.testing.assert_close(found[row], total / total.norm(), rtol=0, atol=1e-6)
    assert len(chosen.mul(5).long().unique()) > 1  # the control: more than one image was mixed in


def test_views_of_what_is_not_random_are_not_repeated() -> None:
    calls: list[int] = []

    class Counting(Flat):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            return super().forward(images)

    for transforms, times in ((("jpeg",), 1), (("crop_rescale",), 4)):
        calls.clear()
        defended = Defended(Counting(), InferenceConfig(name="input_transform", transforms=transforms, draws=4))
        embeddings = defended(pictures(2, 1, 8, 8))
        assert len(calls) == times
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_options_have_their_papers_defaults_and_foreign_ones_are_refused() -> None:
    assert options_of(InferenceConfig(name="mixup_inference")) == {"draws": 30, "share": 0.5, "pool": 200}
    assert options_of(InferenceConfig(name="bart", groups=3)) == {"training": False, "draws": 1, "groups": 3}
    with pytest.raises(ConfigError, match=r"'bart' takes the options training, draws, groups; got inference.bits = 3"):
        check_inference(InferenceConfig(name="bart", bits=3))
    with pytest.raises(ConfigError, match=r"'none' has no options; got inference.draws = 2"):
        check_inference(InferenceConfig(draws=2))
    with pytest.raises(ConfigError, match=r"got inference.training = True"):
        check_inference(InferenceConfig(name="mixup_inference", training=True))
    with pytest.raises(ConfigError, match=r"no defense at inference is called 'brat'.*Did you mean 'bart'"):
        check_inference(InferenceConfig(name="brat"))


def test_every_option_of_the_section_belongs_to_a_defense() -> None:
    taken = {option for name in INFERENCE_DEFENSES for option in INFERENCE_DEFENSES[name].options}
    assert taken == set(InferenceConfig.model_fields) - {"name"}
