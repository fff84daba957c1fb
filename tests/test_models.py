"""Embedders, their fusion, and the folder an ensemble is saved in."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eat_dist.config import ModelConfig
from eat_dist.errors import ConfigError, StorageError
from eat_dist.models import EmbeddingEnsemble, EnsembleSpec, build_embedder, load_ensemble, save_ensemble
from eat_dist.models.ensemble import cpu_state, load_spec, weights_digest
from eat_dist.seeding import derive_seed, generator

SMALL = ModelConfig(widths=(4, 8), embedding_dim=5, mean=0.5, std=0.5)


def member(rank: int = 0, config: ModelConfig = SMALL, channels: int = 1) -> nn.Module:
    """Fresh weights, and BatchNorm statistics that are not the initial ones."""
    model = build_embedder(config, in_channels=channels, generator=generator(0, "weights", rank))
    model.train()(random_images(20, channels))
    return model.eval()


def random_images(count: int = 3, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, 12, 12, generator=generator(0, "images"))


@torch.no_grad()
def embed(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    embeddings: torch.Tensor = model(images)
    return embeddings


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_embeddings_have_length_one(channels: int, training: bool) -> None:
    embeddings = embed(member(channels=channels).train(training), random_images(7, channels))
    assert embeddings.shape == (7, 5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("training", [True, False])
def test_an_embedding_is_the_head_of_average_plus_maximum_of_the_features(training: bool) -> None:
    """Bit by bit the formula written out, with the convnet's own mean and std of 0.5."""
    model, images = member(config=ModelConfig(widths=(4, 8), embedding_dim=5)).train(training), random_images(7)
    with torch.no_grad():
        features = model.backbone((images - 0.5) / 0.5)
        projected = model.head(features.mean((2, 3)) + features.amax((2, 3)))
        expected = projected / projected.norm(dim=1, keepdim=True)
    assert torch.equal(embed(model, images), expected)


def test_normalisation_is_inside_the_model() -> None:
    """A network that subtracts 0.3 sees x − 0.2 as one that subtracts 0.5 sees x; likewise for the divisor."""
    images = random_images()
    expected = embed(member(), images)
    shifted, scaled = (
        build_embedder(
            ModelConfig(widths=(4, 8), embedding_dim=5, **changed), in_channels=1, generator=generator(1)
        ).eval()
        for changed in ({"mean": 0.3, "std": 0.5}, {"mean": 0.25, "std": 0.25})
    )
    for model, inputs in ((shifted, images - 0.2), (scaled, images / 2)):
        model.load_state_dict(member().state_dict())  # mean and std are the config's, not the weights'
        torch.testing.assert_close(embed(model, inputs), expected, rtol=0, atol=1e-5)
        assert float((embed(model, images) - expected).abs().max()) > 1e-3


def test_weights_depend_on_the_generator_alone() -> None:
    torch.manual_seed(0)
    first = cpu_state(build_embedder(SMALL, in_channels=1, generator=generator(0, "weights", 0)))
    torch.manual_seed(1)
    again = cpu_state(build_embedder(SMALL, in_channels=1, generator=generator(0, "weights", 0)))
    other = cpu_state(build_embedder(SMALL, in_channels=1, generator=generator(0, "weights", 1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if name.endswith("weight") and first[name].ndim > 1]
    assert len(drawn) == 3
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_weights_are_drawn_layer_by_layer_from_the_generator() -> None:
    """What a seed means must not change: convolutions from the first on, then the head, √(2 / fan-out) each."""
    state = cpu_state(build_embedder(SMALL, in_channels=1, generator=generator(0, "weights", 0)))
    stream = generator(0, "weights", 0)
    for name, fan_out in (("backbone.blocks.0", 4 * 9), ("backbone.blocks.3", 8 * 9), ("head", 5)):
        weight = state[f"{name}.weight"]
        assert torch.equal(weight, torch.empty_like(weight).normal_(std=math.sqrt(2 / fan_out), generator=stream))


def test_building_a_model_does_not_disturb_later_draws_of_its_generator() -> None:
    """Two builds from one generator are two different models: the stream is consumed, not copied."""
    stream = generator(0)
    first, second = (cpu_state(build_embedder(SMALL, in_channels=1, generator=stream)) for _ in range(2))
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_initial_weights_are_kaiming_normal_with_fan_out() -> None:
    """Standard deviation √(2 / (64 · 9)) for a 3×3 convolution to 64 channels: 32·64·9 draws, standard error 0.5 %."""
    model = build_embedder(ModelConfig(widths=(32, 64), embedding_dim=50), in_channels=1, generator=generator(0))
    convolution = model.backbone.blocks[3]
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert model.head.weight.std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.06)
    assert not model.head.bias.any()


def test_the_convnet_has_the_parameters_counted_by_hand() -> None:
    """3×3 convolutions without bias 1→4 and 4→8: 36 + 288; BatchNorm 2·4 + 2·8; head 8·5 + 5."""
    assert sum(parameter.numel() for parameter in member().parameters()) == 36 + 288 + 8 + 16 + 45
    model = build_embedder(
        ModelConfig(widths=(32, 64, 128), embedding_dim=64), in_channels=1, generator=generator(0)
    )  # 32, 64, 128 → 64
    by_hand = 9 * (32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 64 + 64
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 101_152


def test_all_blocks_of_the_convnet_but_the_last_halve_the_resolution() -> None:
    backbone = build_embedder(
        ModelConfig(widths=(32, 64, 128), embedding_dim=64), in_channels=3, generator=generator(0)
    ).backbone
    assert backbone(torch.rand(2, 3, 28, 28)).shape == (2, 128, 7, 7)
    assert backbone(torch.rand(2, 3, 9, 9)).shape == (2, 128, 3, 3)  # 9 → 5 → 3
    assert backbone.out_channels == 128


def test_an_unknown_backbone_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"called 'convnett'; known: .*convnet, .*Did you mean 'convnet'"):
        build_embedder(ModelConfig(backbone="convnett"), in_channels=1, generator=generator(0))


def test_the_cosine_of_fused_embeddings_is_the_mean_of_the_members_cosines() -> None:
    ensemble, images = EmbeddingEnsemble([member(rank) for rank in range(3)]), random_images(6)
    fused = embed(ensemble, images)
    assert fused.shape == (6, 15)
    torch.testing.assert_close(fused.norm(dim=1), torch.ones(6))
    cosines = [one @ one.T for one in (embed(model, images) for model in ensemble.members)]
    assert float((cosines[0] - cosines[1]).abs().max()) > 1e-3
    torch.testing.assert_close(fused @ fused.T, (cosines[0] + cosines[1] + cosines[2]) / 3)


def test_an_ensemble_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one member; got none"):
        EmbeddingEnsemble([])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ensemble = EmbeddingEnsemble([member(rank) for rank in range(2)])
    save_ensemble(tmp_path / "model", ensemble, spec=EnsembleSpec(SMALL, (1, 12, 12), 2, resize=14))
    return tmp_path / "model"


def test_a_saved_ensemble_comes_back_exactly(saved: Path) -> None:
    ensemble = EmbeddingEnsemble([member(rank) for rank in range(2)])
    loaded = load_ensemble(saved)
    assert not any(module.training for module in loaded.modules())
    for name, tensor in ensemble.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(embed(loaded, random_images()), embed(ensemble.eval(), random_images()))
    assert load_spec(saved) == EnsembleSpec(SMALL, (1, 12, 12), 2, resize=14)
    assert sorted(path.name for path in saved.iterdir()) == [
        "ensemble.json",
        "member_0.safetensors",
        "member_1.safetensors",
    ]


def test_an_ensemble_is_resized_to_its_height_by_default() -> None:
    assert EnsembleSpec(SMALL, (3, 12, 10), 2).resize == 12


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "ensemble.json").read_text())
        (folder / "ensemble.json").write_text(json.dumps(content | changes))

    return edit


def truncated(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])

    return cut


def without_one_tensor(folder: Path) -> None:
    state = load_file(folder / "member_1.safetensors")
    del state["head.bias"]
    save_file(state, folder / "member_1.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda folder: (folder / "ensemble.json").unlink(), r"ensemble\.json': No such file"),
    "half a json": (truncated("ensemble.json"), r"ensemble\.json' is not valid JSON"),
    "json of something else": (
        lambda folder: (folder / "ensemble.json").write_text("[]"),
        r"ensemble\.json' is damaged",
    ),
    "an earlier schema": (edited(schema=1), r"ensemble\.json' has schema 1; this version reads 3"),
    "a later schema": (edited(schema=4), r"ensemble\.json' has schema 4; this version reads 3"),
    "no network": (edited(model=None), r"ensemble\.json' is damaged"),
    "an unknown key in the network": (edited(model={"depth": 3}), r"ensemble\.json' is damaged"),
    "an image of two dimensions": (edited(image_shape=[12, 12]), r"ensemble\.json' is damaged"),
    "channels that are text": (edited(image_shape=["a", 12, 12]), r"ensemble\.json' is damaged"),
    "a resize to nothing": (edited(resize=0), r"ensemble\.json' is damaged"),
    "a resize that is text": (edited(resize="14"), r"ensemble\.json' is damaged"),
    "members that are text": (edited(members="two"), r"ensemble\.json' is damaged"),
    "no members": (edited(members=0), r"ensemble\.json' is damaged"),
    "more members than files": (edited(members=3), r"member_2\.safetensors': No such file"),
    "another architecture": (
        edited(model={"widths": [4, 9], "embedding_dim": 5}),
        r"member_0\.safetensors' does not fit: .*size mismatch",
    ),
    "half a weights file": (truncated("member_1.safetensors"), r"member_1\.safetensors' does not fit"),
    "an empty weights file": (
        lambda folder: (folder / "member_0.safetensors").write_bytes(b""),
        r"member_0\.safetensors' does not fit",
    ),
    "a missing tensor": (without_one_tensor, r"member_1\.safetensors' does not fit: .*head\.bias"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line_that_names_the_file(saved: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(saved)
    with pytest.raises(StorageError, match=expected) as caught:
        load_ensemble(saved)
    assert "\n" not in str(caught.value)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_loading_never_unpickles(saved: Path, tmp_path: Path, save: Callable[[Any, Any], None]) -> None:
    with (saved / "member_0.safetensors").open("wb") as file:
        save(Trap(tmp_path / "sprung"), file)
    with pytest.raises(StorageError, match=r"member_0\.safetensors' does not fit"):
        load_ensemble(saved)
    assert not (tmp_path / "sprung").exists()
    with (saved / "member_0.safetensors").open("rb") as file:  # the trap is armed
        torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert (tmp_path / "sprung").exists()


def test_the_digest_changes_with_one_bit_of_any_tensor() -> None:
    states = [cpu_state(member(0)), cpu_state(member(1))]
    digests = {weights_digest(states)}
    for name, tensor in states[1].items():
        changed = tensor.clone()
        changed.view(-1)[-1:].view(torch.uint8)[0] ^= 1
        digests.add(weights_digest([states[0], states[1] | {name: changed}]))
    assert len(digests) == 1 + len(states[1])


def test_the_digest_knows_shape_type_and_rank_but_not_the_order_of_names() -> None:
    states = [cpu_state(member(0)), cpu_state(member(1))]
    digest = weights_digest(states)
    assert weights_digest([dict(reversed(state.items())) for state in states]) == digest
    assert weights_digest(states[::-1]) != digest
    zeros = torch.zeros(2, 2)
    tensors = (zeros, zeros.view(4), zeros.int(), zeros.to(torch.bfloat16))
    assert len({weights_digest([{"a": tensor}]) for tensor in tensors}) == 4
    assert weights_digest([{"a": zeros[:, 0]}]) == weights_digest(
        [{"a": torch.zeros(2)}]
    )  # memory layout is none of it


def test_seeds_are_the_first_bytes_of_a_sha256_and_tell_their_parts_apart() -> None:
    text = "int:3\x1fstr:attack\x1fint:0"
    assert derive_seed(3, "attack", 0) == int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    parts = [(1,), ("1",), (1, 1), (11,), ("1", 1), (1, "1"), ("a", "b"), ("ab",), ("b", "a")]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert all(0 <= derive_seed(*part) < 2**63 for part in parts)
    draws = [torch.rand(3, generator=generator(0, "x")) for _ in range(2)]
    assert torch.equal(*draws)
