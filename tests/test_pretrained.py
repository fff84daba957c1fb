"""Pretrained weights: from files of every documented form and from a publisher, never unpickled, never half-loaded."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from eat_dist.errors import ConfigError, StorageError
from eat_dist.models import (
    BACKBONES,
    EmbeddingEnsemble,
    EnsembleSpec,
    load_ensemble,
    save_ensemble,
)
from eat_dist.models.ensemble import cpu_state
from eat_dist.models.pretrained import load_backbone_weights
from eat_dist.seeding import generator
from model_forms import bn_inception_shapes, built, on_meta, random_images, small

State = dict[str, torch.Tensor]


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


def assert_refused(change: Callable[[State], Any], message: str, folder: Path) -> None:
    """A changed file is refused in one line, and nothing of it is in the network."""
    backbone = built(small()).backbone
    before = {name: tensor.clone() for name, tensor in cpu_state(backbone).items()}
    location = as_torch(change(cpu_state(built(small(), seed=1).backbone)), folder)
    with pytest.raises(StorageError, match=message) as caught:
        load_backbone_weights(backbone, small(weights=location))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cpu_state(backbone).items())


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_of_another_architecture_are_refused_and_nothing_is_loaded(tmp_path: Path, misfit: str) -> None:
    change, message = MISFITS[misfit]
    assert_refused(change, r"of another architecture than backbone 'convnet': " + message, tmp_path)


def changed(state: State, name: str, value: float) -> State:
    tensor = state[name].clone()
    tensor.view(-1)[-1] = value
    return state | {name: tensor}


UNUSABLE: dict[str, tuple[Callable[[State], Any], str]] = {
    "integers": (
        lambda state: {name: (tensor * 100).to(torch.int8) for name, tensor in state.items()},
        r"no network computes with: 10 not floating-point \(blocks\.0\.weight, .*, …\)\.",
    ),
    "NaN": (
        lambda state: changed(state, "blocks.1.bias", float("nan")),
        r"no network computes with: 1 not finite \(blocks\.1\.bias\)\.",
    ),
    "too large": (
        lambda state: changed(state | {"blocks.1.bias": state["blocks.1.bias"].double()}, "blocks.1.bias", 1e300),
        r"no network computes with: 1 not finite \(blocks\.1\.bias\)\.",
    ),
    "with and without module.": (
        lambda state: state | {"module.blocks.0.weight": state["blocks.0.weight"] + 1},
        r"with and without 'module\.', 1 under both names \(blocks\.0\.weight\)\. Save only those",
    ),
    "two state dicts": (
        lambda state: {"state_dict": state, "model": {name: tensor + 1 for name, tensor in state.items()}},
        r"holds one state dict under 'state_dict' and another under 'model'\. Save only the one",
    ),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_numbers_that_mean_nothing_and_weights_of_two_meanings_are_refused(tmp_path: Path, fault: str) -> None:
    change, message = UNUSABLE[fault]
    assert_refused(change, message, tmp_path)


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


def test_urls_that_end_in_one_name_are_different_files(tmp_path: Path, server: str) -> None:
    for seed, version in enumerate(("v1", "v2")):
        (tmp_path / "published" / version).mkdir()
        state = cpu_state(built(small(), seed=seed).backbone)
        save_file(state, tmp_path / "published" / version / "model.safetensors")
        for query in ("", "?download=true"):  # no part of the name that says what format it is
            url = f"{server}/{version}/model.safetensors{query}"
            loaded = cpu_state(built(small(weights=url)).backbone)
            assert torch.equal(loaded["blocks.0.weight"], state["blocks.0.weight"])
    cached = [file.name for file in (tmp_path / "cache/hub/checkpoints").iterdir()]
    assert len(cached) == 4
    assert all(name.endswith("-model.safetensors") for name in cached)


def test_a_download_with_another_checksum_is_refused_and_not_kept(tmp_path: Path, server: str) -> None:
    _, name = publish(tmp_path, honest=False)
    with pytest.raises(StorageError, match=r'invalid hash value \(expected "00000000"'):
        built(small(weights=f"{server}/{name}"))
    assert not any((tmp_path / "cache/hub/checkpoints").iterdir())


@pytest.mark.parametrize("fault", ["no such file", "nobody there"])
def test_without_the_network_the_message_says_what_to_download_and_where_to_put_it(
    tmp_path: Path, server: str, fault: str
) -> None:
    state = cpu_state(built(small(), seed=1).backbone)
    url = f"{server}/absent.pth" if fault == "no such file" else "http://127.0.0.1:1/absent.pth"
    expected = (
        rf"cannot download {url} \(.*\)\. Download it elsewhere, then set model\.weights to the file's path or save it "
        rf"as ({tmp_path}/cache/hub/checkpoints/.*-absent\.pth)\.$"
    )
    with pytest.raises(StorageError, match=expected) as caught:
        built(small(weights=url))
    assert "\n" not in str(caught.value)
    place = re.search(expected, str(caught.value))
    assert place is not None
    Path(as_torch(state, tmp_path)).rename(place.group(1))  # as the message says
    assert torch.equal(cpu_state(built(small(weights=url)).backbone)["blocks.0.weight"], state["blocks.0.weight"])


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(StorageError, match=r"model\.weights: a URL with credentials") as caught:
        built(small(weights="https://user:VERY-SECRET@example.invalid/x.pth"))
    assert "VERY-SECRET" not in str(caught.value)


def test_a_saved_ensemble_never_asks_for_pretrained_weights(tmp_path: Path) -> None:
    config = small(weights=str(tmp_path / "gone.pth"))
    with pytest.raises(StorageError, match=r"gone\.pth"):
        built(config)
    spec = EnsembleSpec(config, (3, 12, 12), 1)
    save_ensemble(tmp_path / "model", EmbeddingEnsemble([built(small())]), spec=spec)
    loaded = load_ensemble(tmp_path / "model")
    assert torch.equal(loaded.members[0].head.weight, built(small()).head.weight)
