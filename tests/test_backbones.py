"""The backbones: their form, what they expect of an image, and their pretrained weights."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from eat_dist.config import ModelConfig
from eat_dist.errors import ConfigError, StorageError
from eat_dist.models import (
    BACKBONES,
    Embedder,
    EmbeddingEnsemble,
    EnsembleSpec,
    build_embedder,
    load_ensemble,
    save_ensemble,
)
from eat_dist.models.bn_inception import BLOCKS
from eat_dist.models.ensemble import cpu_state
from eat_dist.models.pretrained import load_backbone_weights
from eat_dist.models.table import Backbone
from eat_dist.seeding import generator

State = dict[str, torch.Tensor]

# Ioffe & Szegedy 2015, figure 5, with what the published weights change: 4c and 4d project to 128 channels, so 4c, 4d
# and 4e put out 608, 608 and 1056. Columns: input, 1×1, 3×3 reduce, 3×3, double reduce, double, projection, output.
INCEPTION = {
    "3a": (192, 64, 64, 64, 64, 96, 32, 256),
    "3b": (256, 64, 64, 96, 64, 96, 64, 320),
    "3c": (320, 0, 128, 160, 64, 96, 0, 576),
    "4a": (576, 224, 64, 96, 96, 128, 128, 576),
    "4b": (576, 192, 96, 128, 96, 128, 128, 576),
    "4c": (576, 160, 128, 160, 128, 160, 128, 608),
    "4d": (608, 96, 128, 192, 160, 192, 128, 608),
    "4e": (608, 0, 128, 192, 192, 256, 0, 1056),
    "5a": (1056, 352, 192, 320, 160, 224, 128, 1024),
    "5b": (1024, 352, 192, 320, 192, 224, 128, 1024),
}


def bn_inception_shapes() -> dict[str, tuple[int, ...]]:
    """Every entry of the published file but the classifier: convolutions with bias, each with its BatchNorm."""
    layers = [("conv1_7x7_s2", 3, 64, 7), ("conv2_3x3_reduce", 64, 64, 1), ("conv2_3x3", 64, 192, 3)]
    for block, (channels, one, reduce, three, double_reduce, double, projection, _) in INCEPTION.items():
        layers += [
            (f"inception_{block}_{name}", inputs, outputs, kernel)
            for name, inputs, outputs, kernel in (
                ("1x1", channels, one, 1),
                ("3x3_reduce", channels, reduce, 1),
                ("3x3", reduce, three, 3),
                ("double_3x3_reduce", channels, double_reduce, 1),
                ("double_3x3_1", double_reduce, double, 3),
                ("double_3x3_2", double, double, 3),
                ("pool_proj", channels, projection, 1),
            )
            if outputs
        ]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs, kernel in layers:
        shapes |= {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}
        shapes |= {f"{name}_bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}_bn.num_batches_tracked"] = ()
    return shapes


def on_meta(name: str) -> Backbone:
    """Shapes without numbers: quick even for a large network."""
    with torch.device("meta"):
        return BACKBONES[name](ModelConfig(), 3)


def small(name: str = "convnet", **config: Any) -> ModelConfig:
    return ModelConfig(backbone=name, widths=(4, 8), embedding_dim=5, **config)


def built(config: ModelConfig, channels: int = 3, seed: int = 0) -> Embedder:
    return build_embedder(config, in_channels=channels, generator=generator(seed)).eval()


def random_images(size: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, size, size, generator=generator(0, "images"))


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
    seen: State = {}

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
        (small(std=(0.1, 0.2, 0.3)), 1, r"model\.std must have 1 or 1 values here; got 3"),
        (small("resnet18"), 2, r"backbone 'resnet18' takes images of 1 or 3 channels; the data have 2"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(config: ModelConfig, channels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(config, channels)


# --- Pretrained weights ---


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    stream = generator(0, "published")
    return {
        name: torch.rand(shape, generator=stream) if shape else torch.tensor(3)  # variances are positive
        for name, shape in shapes.items()
    }


def test_the_published_form_of_bn_inception_loads_completely(tmp_path: Path) -> None:
    """Converted from Caffe before torch counted batches: BatchNorm of shape [1, C], no counter; with classifier."""
    state = {name: tensor for name, tensor in random_state(bn_inception_shapes()).items() if tensor.ndim}
    file = {name: tensor.unsqueeze(0) if "_bn." in name else tensor for name, tensor in state.items()}
    file |= {"last_linear.weight": torch.zeros(1000, 1024), "last_linear.bias": torch.zeros(1000)}
    torch.save(file, tmp_path / "bn.pth", _use_new_zipfile_serialization=False)
    loaded = cpu_state(built(small("bn_inception", weights=str(tmp_path / "bn.pth"))).backbone)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert {name for name in loaded if name not in state} == {
        name for name, shape in bn_inception_shapes().items() if not shape
    }


@pytest.mark.parametrize(
    ("name", "network", "classifier"),
    [
        ("mobilenet_v2", torchvision.models.mobilenet_v2, "classifier"),
        ("resnet18", torchvision.models.resnet18, "fc"),
        ("resnet50", torchvision.models.resnet50, "fc"),
    ],
)
def test_a_state_dict_of_torchvision_fits_and_gives_its_features(
    tmp_path: Path, name: str, network: Callable[[], nn.Module], classifier: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = network().eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    backbone = built(small(name, weights=str(tmp_path / "whole.pth"))).backbone
    setattr(whole, classifier, nn.Identity())
    images = random_images(64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).mean((2, 3)), whole(images))


def as_safetensors(state: State, folder: Path) -> str:
    save_file(state, folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


def as_torch(state: Any, folder: Path) -> str:
    torch.save(state, folder / "weights.pth")
    return str(folder / "weights.pth")


FORMS: dict[str, Callable[[State, Path], str]] = {
    "safetensors": as_safetensors,
    "torch": as_torch,
    "under state_dict": lambda state, folder: as_torch({"epoch": 3, "state_dict": state}, folder),
    "under model": lambda state, folder: as_torch({"model": state}, folder),
    "of a data-parallel network": lambda state, folder: as_torch({f"module.{k}": v for k, v in state.items()}, folder),
    "by URL": lambda state, folder: "file://" + as_safetensors(state, folder),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_load_from_every_documented_form(tmp_path: Path, form: str) -> None:
    state = cpu_state(built(small(), seed=1).backbone)
    location = FORMS[form](state, tmp_path)
    fresh, loaded = built(small()), built(small(weights=location))
    assert all(torch.equal(tensor, state[name]) for name, tensor in cpu_state(loaded.backbone).items())
    assert torch.equal(loaded.head.weight, fresh.head.weight)  # drawn as without pretrained weights


def test_a_relative_path_is_one_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = cpu_state(built(small(), seed=1).backbone)
    as_torch(state, tmp_path)
    monkeypatch.chdir(tmp_path)
    loaded = cpu_state(built(small(weights="weights.pth")).backbone)
    assert torch.equal(loaded["blocks.0.weight"], state["blocks.0.weight"])


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


MISFITS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (lambda state: without(state, "blocks.3.weight"), r"1 missing \(blocks\.3\.weight\)\."),
    "unexpected": (lambda state: state | {"blocks.9.bias": torch.zeros(1)}, r"1 unexpected \(blocks\.9\.bias\)\."),
    "of another shape": (
        lambda state: state | {"blocks.3.weight": torch.zeros(8, 4, 1, 1)},
        r"1 of another shape \(blocks\.3\.weight \[8, 4, 1, 1\] instead of \[8, 4, 3, 3\]\)\.",
    ),
    "of another network": (
        lambda state: {f"other.{name}": tensor for name, tensor in state.items()},
        r"10 missing \(blocks\.0\.weight, blocks\.1\.weight, blocks\.1\.bias, …\); 12 unexpected \(other\.blocks",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_of_another_architecture_are_refused_and_nothing_is_loaded(tmp_path: Path, misfit: str) -> None:
    change, message = MISFITS[misfit]
    backbone = built(small()).backbone
    before = {name: tensor.clone() for name, tensor in cpu_state(backbone).items()}
    location = as_torch(change(cpu_state(built(small(), seed=1).backbone)), tmp_path)
    with pytest.raises(StorageError, match=r"of another architecture than backbone 'convnet': " + message) as caught:
        load_backbone_weights(backbone, small(weights=location))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cpu_state(backbone).items())


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    location = as_torch({"blocks.0.weight": Trap(tmp_path / "sprung")}, tmp_path)
    with pytest.raises(StorageError, match=r"weights\.pth' holds pickled objects.*Save the state dict alone") as caught:
        built(small(weights=location))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    torch.load(location, weights_only=False)  # the trap is armed
    assert (tmp_path / "sprung").exists()


def as_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", None, r"model\.weights: cannot read '.*a\.pth': No such file"),
        ("a.pth", b"", r"a\.pth' is damaged or no file of weights"),
        ("a.pth", b"hello world", r"a\.pth' is damaged or no file of weights"),
        ("a.pth", as_bytes({"a": torch.zeros(99)})[:-300], r"a\.pth' is damaged or no file of weights"),
        ("a.safetensors", b"hello world", r"a\.safetensors' is damaged or no file of weights"),
        ("a.pt", as_bytes([1]), r"a\.pt' must hold a state dict .*; got list"),
        ("a.pt", as_bytes({"epoch": 1}), r"a\.pt' must hold a state dict .*; got dict"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StorageError, match=message) as caught:
        built(small(weights=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_there_are_no_imagenet_weights_for_the_convnet() -> None:
    with pytest.raises(ConfigError, match=r"no ImageNet weights for backbone 'convnet'; set model\.weights to none"):
        built(small(weights="imagenet"))


def test_every_other_backbone_names_a_publisher_and_a_checksum() -> None:
    for name in set(BACKBONES) - {"convnet"}:
        url = on_meta(name).imagenet_url
        assert url is not None
        assert url.startswith(("https://download.pytorch.org/models/", "http://data.lip6.fr/cadene/"))
        assert len(url.rpartition("-")[2].removesuffix(".pth")) >= 8


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The folder ``published`` over HTTP, and an empty cache of torch."""
    (tmp_path / "published").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "published"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def publish(tmp_path: Path, *, honest: bool = True) -> tuple[State, str]:
    state = cpu_state(built(small(), seed=1).backbone)
    file = Path(as_torch(state, tmp_path))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8] if honest else "0" * 8
    file.rename(tmp_path / "published" / f"convnet-{digest}.pth")
    return state, f"convnet-{digest}.pth"


def test_published_weights_are_downloaded_once_and_checked(tmp_path: Path, server: str) -> None:
    state, name = publish(tmp_path)
    for _ in range(2):
        backbone = built(small()).backbone
        backbone.imagenet_url = f"{server}/{name}"
        load_backbone_weights(backbone, small(weights="imagenet"))
        assert torch.equal(backbone.state_dict()["blocks.0.weight"], state["blocks.0.weight"])
        (tmp_path / "published" / name).unlink(missing_ok=True)  # the second time it comes from the cache
    assert (tmp_path / "cache/hub/checkpoints" / name).exists()


def test_a_download_with_another_checksum_is_refused_and_not_kept(tmp_path: Path, server: str) -> None:
    _, name = publish(tmp_path, honest=False)
    with pytest.raises(StorageError, match=r'invalid hash value \(expected "00000000"'):
        built(small(weights=f"{server}/{name}"))
    assert not any((tmp_path / "cache/hub/checkpoints").iterdir())


@pytest.mark.parametrize("fault", ["no such file", "nobody there"])
def test_without_the_network_the_message_says_what_to_download_and_where_to_put_it(
    tmp_path: Path, server: str, fault: str
) -> None:
    url = f"{server}/absent.pth" if fault == "no such file" else "http://127.0.0.1:1/absent.pth"
    expected = (
        f"cannot download {url} (.*). Download it elsewhere, then set model.weights to the file's path or put the file "
        f"into {tmp_path / 'cache/hub/checkpoints'}."
    )
    with pytest.raises(StorageError, match=expected) as caught:
        built(small(weights=url))
    assert "\n" not in str(caught.value)


def test_a_saved_ensemble_never_asks_for_pretrained_weights(tmp_path: Path) -> None:
    config = small(weights=str(tmp_path / "gone.pth"))
    with pytest.raises(StorageError, match=r"gone\.pth"):
        built(config)
    spec = EnsembleSpec(config, (3, 12, 12), 1)
    save_ensemble(tmp_path / "model", EmbeddingEnsemble([built(small())]), spec=spec)
    loaded = load_ensemble(tmp_path / "model")
    assert torch.equal(loaded.members[0].head.weight, built(small()).head.weight)
