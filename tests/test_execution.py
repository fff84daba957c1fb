"""How a network trains: frozen BatchNorm, warm-up, number and memory formats, compilation, micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eat_dist.attacks import frozen
from eat_dist.config import LossConfig, ModelConfig, TrainConfig
from eat_dist.errors import ConfigError
from eat_dist.losses import make_loss
from eat_dist.models import (
    Embedder,
    EmbeddingEnsemble,
    EnsembleSpec,
    apply_execution,
    build_embedder,
    load_ensemble,
    save_ensemble,
)
from eat_dist.models.ensemble import cpu_state
from eat_dist.models.execution import Execution
from eat_dist.seeding import generator

CLASSES = 4


def network(*, freeze: bool = True, channels: int = 1, widths: tuple[int, ...] = (8, 16), **train: Any) -> Embedder:
    """In training mode, with BatchNorm statistics that are not the initial ones."""
    config = ModelConfig(widths=widths, embedding_dim=6, freeze_batch_norm=freeze)
    model = build_embedder(config, in_channels=channels, generator=generator(0, "weights"))
    for module in batch_norms(model):
        module.train()
    model(random_images(40, channels))
    apply_execution(model, TrainConfig(**train), torch.device("cpu"))
    return model.train()


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def random_images(count: int, channels: int = 1, size: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=generator(0, "images"))


def loss_and_gradients(model: Embedder, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Proxy Anchor's loss on the batch, its gradients by parameter name, and the images' one."""
    dtype = images.dtype
    loss = make_loss(
        LossConfig(alpha=32, margin=0.1), num_classes=CLASSES, embedding_dim=6, generator=generator(0, "proxies")
    ).to(dtype)
    images = images.clone().requires_grad_(True)
    model.zero_grad()
    value = loss(model(images), torch.arange(len(images)) % CLASSES)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert images.grad is not None
    return gradients | {"loss": value.detach(), "images": images.grad}


# --- Frozen BatchNorm and warm-up ---


def affine(model: Embedder) -> list[nn.Parameter]:
    return [parameter for module in batch_norms(model) for parameter in module.parameters()]


def test_a_frozen_batch_norm_keeps_statistics_weights_and_biases_in_training_mode() -> None:
    model = network(freeze=True)
    before = {name: tensor.clone() for name, tensor in cpu_state(model).items() if "blocks.1." in name}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss_and_gradients(model, random_images(8))
    optimiser.step()
    assert model.training
    assert not any(module.training for module in batch_norms(model))
    assert all(torch.equal(cpu_state(model)[name], tensor) for name, tensor in before.items())


def test_batch_norm_trains_where_it_is_not_frozen() -> None:
    model = network(freeze=False)
    before = batch_norms(model)[0].running_mean.clone()
    assert {"backbone.blocks.1.weight", "backbone.blocks.1.bias"} < loss_and_gradients(model, random_images(8)).keys()
    assert not torch.equal(batch_norms(model)[0].running_mean, before)


def test_an_ensemble_put_into_training_mode_leaves_frozen_batch_norms_alone() -> None:
    ensemble = EmbeddingEnsemble([network(freeze=True), network(freeze=False)]).eval().train()
    frozen_member, free_member = ensemble.members
    assert not any(module.training for module in batch_norms(frozen_member))
    assert all(module.training for module in batch_norms(free_member))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_warm_up_trains_the_head_alone_and_its_end_leaves_frozen_batch_norms_frozen(freeze: bool) -> None:
    model = network(freeze=freeze)
    model.train_head_only(True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    gradients = loss_and_gradients(model, random_images(8))
    assert gradients.keys() == {"head.weight", "head.bias", "loss", "images"}
    model.train_head_only(False)
    without_gradient = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    assert without_gradient == ({id(parameter) for parameter in affine(model)} if freeze else set())


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("warm_up", [True, False])
def test_an_attack_restores_every_mode_and_flag(freeze: bool, warm_up: bool) -> None:
    model = network(freeze=freeze)
    model.train_head_only(warm_up)

    def modes_and_flags() -> tuple[list[bool], list[bool]]:
        return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    before = modes_and_flags()
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert modes_and_flags() == before


# --- bfloat16 ---


def test_bfloat16_embeddings_are_float32_of_length_one_near_those_of_float32() -> None:
    images = random_images(32)
    expected, embeddings = network()(images), network(precision="bf16")(images)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(32))
    assert not torch.equal(embeddings, expected)
    # bfloat16 keeps 8 bits: 2⁻⁸ = 0.004 relative to numbers of at most 1, a few roundings one after the other.
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=0.03)


def test_bfloat16_gives_float32_gradients_that_mostly_agree_in_sign() -> None:
    images = random_images(32)
    expected, gradients = (loss_and_gradients(network(**train), images) for train in ({}, {"precision": "bf16"}))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 0.1
    agreeing = (gradients["images"].sign() == expected["images"].sign()).float().mean()
    assert float(agreeing) > 0.9


# --- Micro-batches ---


@pytest.mark.parametrize(("count", "size"), [(24, 8), (23, 8), (9, 8), (8, 8), (5, 1)])
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(count: int, size: int) -> None:
    """In float64, with a loss that compares all images of the batch with each other."""
    images = random_images(count).double()
    whole, parts = network().double(), network(micro_batch_size=size).double()
    expected, gradients = loss_and_gradients(whole, images), loss_and_gradients(parts, images)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 + 4  # loss and images; two convolutions, the head's weight and bias
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_an_attack_gets_the_same_image_gradient_from_micro_batches() -> None:
    images = random_images(10).double()

    def image_gradient(model: Embedder) -> torch.Tensor:
        with frozen(model):
            attacked = images.clone().requires_grad_(True)
            return torch.autograd.grad(model(attacked)[:, 0].sum(), attacked)[0]

    whole, parts = network(freeze=False).double(), network(freeze=False, micro_batch_size=4).double()
    torch.testing.assert_close(image_gradient(parts), image_gradient(whole), rtol=1e-10, atol=1e-12)


def test_micro_batches_without_gradients_give_the_same_embeddings() -> None:
    images = random_images(10)
    with torch.no_grad():
        embeddings = network(micro_batch_size=4)(images)
        torch.testing.assert_close(embeddings, network()(images))
    assert not embeddings.requires_grad


@pytest.mark.parametrize("size", [4, 5])
def test_micro_batches_agree_with_the_whole_batch_in_bfloat16_and_channels_last(size: int) -> None:
    """But for the order of sums: a parameter's gradient is rounded to bfloat16 once a part."""
    images = random_images(12, channels=3)
    whole, parts = (
        loss_and_gradients(network(channels=3, precision="bf16", channels_last=True, **train), images)
        for train in ({}, {"micro_batch_size": size})
    )
    for name, gradient in parts.items():
        assert float((gradient - whole[name]).norm() / whole[name].norm()) < 0.01


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                if storage.data_ptr() not in self.living:
                    self.living[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.living.pop, storage.data_ptr())
                    self.peak = max(self.peak, sum(self.living.values()))
        return results


def test_micro_batches_hold_the_activations_of_one_part_at_a_time() -> None:
    """Parts of a quarter need little more than a quarter of the memory, forward and backward together."""

    def peak(model: Embedder) -> int:
        images = random_images(32, size=24)
        with PeakMemory() as memory:
            model(images).sum().backward()
        return memory.peak

    assert peak(network(micro_batch_size=8)) < 0.35 * peak(network())


# --- Memory format ---


def test_channels_last_changes_the_memory_format_and_not_the_numbers() -> None:
    images = random_images(16, channels=3)
    plain, model = network(channels=3), network(channels=3, channels_last=True)
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    expected, gradients = loss_and_gradients(plain, images), loss_and_gradients(model, images)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)
    weight = model.backbone.blocks[3].weight
    for tensor in (weight, seen[0]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


# --- Compilation ---


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_numbers_under_the_same_names() -> None:
    """Slow: starting the compiler and compiling the pass of a training step and that of an attack."""
    images = random_images(8)
    plain, model = network(), network(compile=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, gradients = loss_and_gradients(plain, images), loss_and_gradients(model, images)
    with frozen(plain), frozen(model), torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == list(plain.state_dict())


@contextmanager
def no_compiler() -> Iterator[None]:
    import torch._inductor.config as settings

    torch.compiler.reset()
    with settings.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        yield


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_a_missing_compiler_is_one_line_that_says_to_do_without() -> None:
    model = network(widths=(3,), compile=True)
    with (
        no_compiler(),
        pytest.raises(ConfigError, match=r"torch\.compile failed.*Set train\.compile to false") as caught,
    ):
        model(random_images(2))
    assert "\n" not in str(caught.value)


# --- What stays ---

SETTINGS: dict[str, dict[str, Any]] = {
    "precision": {"precision": "bf16"},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "micro_batch_size": {"micro_batch_size": 4},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_execution_is_not_saved_with_the_weights(tmp_path: Path, setting: str) -> None:
    plain, model = network(), network(**SETTINGS[setting])
    config = ModelConfig(widths=(8, 16), embedding_dim=6)
    for name, member in (("plain", plain), ("set", model)):
        save_ensemble(tmp_path / name, EmbeddingEnsemble([member]), spec=EnsembleSpec(config, (1, 16, 16), 1))
    assert (tmp_path / "set/member_0.safetensors").read_bytes() == (
        tmp_path / "plain/member_0.safetensors"
    ).read_bytes()
    assert load_ensemble(tmp_path / "set").members[0].execution == Execution()
